"""The loss guard: checks on every rank, for every micro-batch, that the loss is real.

Batches are checked before the first forward of an optimizer step, results before the update. Both verdicts travel in
collectives that the step needs anyway, so that all ranks agree and none is left waiting.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .batching.collate import Batch
from .batching.loader import describe_bad_batch
from .loss import IGNORE, LossWeights
from .model.spec import ModelSpec
from .process import loss_text
from .step_stats import ForwardReport, MicroBatchStats

# A true cross-entropy below this many units of float32's resolution may be computed as exactly 0.0.
HONEST_ZERO_UNITS = 4.0

CHECKS = {
    "batch_keys": "the batch carries label_ids, label_audio_ids and audio_out_ids",
    "audio_out_count": "as many <|AUDIO_OUT|> tokens as clips, and clips begin where the batch says",
    "code_range": "audio codes lie within the codebooks, BOS and EOS included",
    "expanded_labels": "text labels are as long as the model's sequence",
    "audio_logits": "audio logits are [frames, codebooks, codes + 2]",
    "label_count": "the model was asked for as many labels as the batch holds",
    "finite": "losses are finite",
    "gradient": "the gradient norm is finite",
    "gradient_order": "gradients come in the same order on every rank",
    "text_loss": "text loss is above 0 where text is labelled",
    "audio_loss": "audio loss is above 0 where audio is labelled",
    "total": "total loss is above 0 where anything is labelled",
}
LIKELY_CAUSES = {
    "batch_keys": "something between the collator and the model filtered the batch; only `labels` may be dropped",
    "audio_out_count": "a text holds a literal <|AUDIO_OUT|>, or clips were dropped after tokenization",
    "code_range": "codes of another codec, or a corrupt code cache; delete the run's codes_cache folder",
    "expanded_labels": "labels were not expanded where <|AUDIO_OUT|> became many positions",
    "audio_logits": "audio_out_ids did not reach the model, so that it had no audio positions to predict",
    "label_count": "labels were shifted twice, masked in place, or cut between the collator and the loss",
    "finite": "the learning rate is too high, or fp16 overflows (use --dtype bf16); look at the rows named above",
    "gradient": "backward overflows while the loss is finite: a lower learning rate, or --dtype fp32 to find the layer",
    "gradient_order": "ranks with different versions of torch or of this program; zero1.json depends on no order",
    "text_loss": "label_ids are all masked, or the loss was replaced by a constant",
    "audio_loss": "label_audio_ids are all masked, unshifted and copied from the input, or replaced by a constant",
    "total": "both heads' labels were lost on the way to the loss",
}


@dataclass(frozen=True)
class Failure:
    """A failed check of a micro-batch on a rank."""

    check: str
    rank: int
    step: int
    micro_batch: int
    rows: tuple[str, ...]
    found: str
    saved_to: str = ""

    def __str__(self) -> str:
        lines = [
            f"loss check failed: {self.check} (rank {self.rank}, optimizer step {self.step}, "
            f"micro-batch {self.micro_batch})",
            f"  rows:    {', '.join(self.rows)}",
            f"  demands: {CHECKS[self.check]}",
            f"  found:   {self.found}",
            f"  likely:  {LIKELY_CAUSES[self.check]}",
        ]
        if self.saved_to:
            lines.append(f"  batch:   {self.saved_to}")
        return "\n".join(lines)

    def as_row(self) -> dict:
        """A flat row for W&B's table and the JSONL file."""
        return {**asdict(self), "rows": ", ".join(self.rows)}


class BadLossError(RuntimeError):
    """A loss check failed on some rank under `--on_bad_loss raise`; raised alike on every rank."""

    def __init__(self, failures: list[Failure]):
        self.failures = failures
        super().__init__("\n".join(map(str, failures)))


class Guard:
    """The checks of one rank, with counts of their failures so far."""

    def __init__(self, *, rank: int, output_dir: Path, spec: ModelSpec, weights: LossWeights):
        self.rank = rank
        self.output_dir = output_dir
        self.spec = spec
        self.weights = weights
        self.num_codebooks = len(weights.codebooks)
        self.failed: Counter[str] = Counter()
        self.honest_zeros = 0

    def check_batch(self, batch: Batch, step: int, micro_batch: int) -> list[Failure]:
        """Checks a batch before the forward: keys, placeholders, codes."""
        return self._failures(list(batch_problems(batch, self.spec)), batch, step, micro_batch)

    def check_result(
        self, batch: Batch, report: ForwardReport, stats: MicroBatchStats, step: int, micro_batch: int
    ) -> list[Failure]:
        """Checks the results of the forward."""
        problems = list(report.problems)
        if not problems:
            problems = self._result_problems(batch, stats)
        return self._failures(problems, batch, step, micro_batch)

    def check_gradient(self, batches: list[Batch], grad_norm: float, step: int) -> list[Failure]:
        """Reports a non-finite gradient norm; it is over all ranks, so each rank names its own rows."""
        found = [("gradient", f"gradient norm {grad_norm} over all ranks, while every loss was finite")]
        return self._failures(found, batches[0], step, 0)

    def check_gradient_order(self, batches: list[Batch], orders: list[list[float]], step: int) -> list[Failure]:
        """Reports a rank whose `Engine.gradient_order` differs from rank 0's."""
        if orders[self.rank] == orders[0]:
            return []
        (mine, _), (first, _) = orders[self.rank], orders[0]
        found = f"{mine:.0f} gradients, {first:.0f} on rank 0" if mine != first else "another order than on rank 0"
        return self._failures([("gradient_order", found)], batches[0], step, 0)

    def _result_problems(self, batch: Batch, stats: MicroBatchStats) -> list[tuple[str, str]]:
        text_sum, text_count, saturation, loss = stats.text_sum, stats.text_count, stats.text_saturation, stats.loss
        sums, counts = stats.codebook_sums, stats.codebook_counts
        problems: list[tuple[str, str]] = []
        expected = batch.codebook_counts or [0] * self.num_codebooks
        if text_count != batch.text_count:
            problems.append(("label_count", f"text: {text_count:.0f} labels reached the loss of {batch.text_count}"))
        if counts != expected:
            problems.append(("label_count", f"audio, by codebook: {counts} labels reached the loss of {expected}"))
        if not all(map(math.isfinite, [text_sum, saturation, loss, *sums])):
            problems.append(("finite", f"text sum {text_sum}, codebook sums {sums}, loss {loss}"))
            return problems
        honest = text_sum == 0 and text_count > 0 and saturation <= HONEST_ZERO_UNITS
        self.honest_zeros += honest
        if text_count and not text_sum > 0 and not honest:
            exact = f"the logits give a cross-entropy of {saturation:.3g} times what float32 can hold"
            problems.append(("text_loss", f"sum {text_sum} over {text_count:.0f} labels, while {exact}"))
        if any(counts) and not all(total > 0 for total, count in zip(sums, counts, strict=True) if count):
            problems.append(("audio_loss", f"sums by codebook {sums} over {counts} labels"))
        # A total of 0 is right only if no head with a weight has labels, or if the text's zero is honest.
        text_counts = text_count > 0 and self.weights.text > 0 and not honest
        audio_counts = self.weights.audio > 0 and any(
            count and share for count, share in zip(counts, self.weights.codebooks, strict=True)
        )
        if (text_counts or audio_counts) and not loss > 0 and not problems:
            problems.append(("total", f"total {loss} with {text_count:.0f} text labels and audio labels {counts}"))
        return problems

    def _failures(self, problems: list[tuple[str, str]], batch: Batch, step: int, micro_batch: int) -> list[Failure]:
        if not problems:
            return []
        saved = self._save(batch, problems, step, micro_batch)
        rows = tuple(batch.origins)
        failures = [Failure(check, self.rank, step, micro_batch, rows, found, saved) for check, found in problems]
        self.failed.update(failure.check for failure in failures)
        return failures

    def _save(self, batch: Batch, problems: list[tuple[str, str]], step: int, micro_batch: int) -> str:
        """Saves the batch and returns its path; a write error does not hide the failure."""
        folder = self.output_dir / "bad_batches"
        stem = folder / f"step-{step:06d}-rank-{self.rank}-micro-{micro_batch}"
        described = {"step": step, "rank": self.rank, "micro_batch": micro_batch, "rows": batch.origins}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(describe_bad_batch(batch), f"{stem}.safetensors")
            Path(f"{stem}.json").write_text(
                json.dumps(described | {"failed": problems}, indent=2) + "\n", encoding="utf-8"
            )
        except (OSError, SafetensorError) as error:  # a full disk raises either
            return f"nowhere, {folder} could not be written: {error}"
        return f"{stem}.safetensors"


def batch_problems(batch: Batch, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Yields (check, finding) for each check that a batch fails before its forward."""
    missing = [name for name in ("label_ids", "label_audio_ids", "audio_out_ids") if getattr(batch, name, None) is None]
    if missing:
        yield "batch_keys", f"missing: {', '.join(missing)}"
        return
    codes, labels, starts = batch.audio_out_ids, batch.label_audio_ids, batch.audio_out_ids_start
    clips, frames = len(starts), codes.shape[-1]
    placeholders = int((batch.input_ids == spec.audio_out_token).sum())
    if placeholders != clips:
        yield "audio_out_count", f"{placeholders} <|AUDIO_OUT|> tokens for {clips} clips"
    if clips and not (int(starts[0]) == 0 and bool((torch.diff(starts) > 0).all()) and int(starts[-1]) < frames):
        yield "audio_out_count", f"clips start at {starts.tolist()} in {frames} frames"
    if frames and (int(codes.min()) < 0 or int(codes.max()) > spec.max_code):
        yield "code_range", f"codes from {int(codes.min())} to {int(codes.max())}, expected 0 to {spec.max_code}"
    if labels.shape != codes.shape:
        yield "label_count", f"label_audio_ids {tuple(labels.shape)} beside audio_out_ids {tuple(codes.shape)}"
    elif clips and frames and bool((labels[:, starts.clamp(0, frames - 1)] != IGNORE).any()):
        yield "label_count", "the first frame of a clip is labelled, so that the shift would cross clips"
    if not batch.filler and not batch.text_count and not any(batch.codebook_counts):
        yield "label_count", "no label in any row of the batch"


def checklist(
    rank: int, batch: Batch, report: ForwardReport, losses: dict[str, float], failures: list[Failure]
) -> list[tuple[bool, str]]:
    """A rank's checklist for its first batch: (passed, line)."""
    failed = {failure.check for failure in failures}
    keys = [name for name, value in batch.upstream_fields().items() if value is not None]
    books = "  ".join(
        f"{k}: {loss_text(losses[f'codebook_loss/{k}'])}" for k in range(64) if f"codebook_loss/{k}" in losses
    )

    def loss(name: str) -> str:
        return loss_text(losses[name]) if name in losses else "no labels"

    lines = [
        ("batch_keys", f"keys received: {', '.join(keys)}"),
        ("batch_keys", f"label_ids present: {tuple(batch.label_ids.shape)}"),
        ("audio_out_count", f"audio_out_ids present: {tuple(batch.audio_out_ids.shape)}, "
                            f"{len(batch.audio_out_ids_start)} clips"),
        ("code_range", "audio codes within the codebooks"),
        ("expanded_labels", f"expanded labels: {report.expanded_labels_shape}, path: {report.path}"),
        ("audio_logits", f"audio logits: {report.audio_logits_shape}"),
        ("label_count", f"valid tokens: {batch.text_count} text, {batch.codebook_counts} audio by codebook"),
        ("text_loss", f"text loss: {loss('text_loss')}"),
        ("audio_loss", f"audio loss: {loss('audio_loss')}"),
        ("audio_loss", f"codebook losses: {books or 'no labels'}"),
        ("finite", "losses are finite"),
        ("total", f"total loss: {loss_text(losses.get('loss', float('nan')))}"),
    ]  # fmt: skip
    return [(name not in failed, f"[rank {rank}] {text}") for name, text in lines]
