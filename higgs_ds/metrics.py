"""From every rank's sums and counts to the names that JSONL and W&B carry."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field

import torch

from .loss import LossWeights, mean_losses


@dataclass
class StepSums:
    """One rank's share of an optimizer step; all of it adds up over micro-batches and ranks."""

    num_codebooks: int
    text_sum: float = 0.0
    text_count: float = 0.0
    codebook_sums: list[float] = field(default_factory=list)
    codebook_counts: list[float] = field(default_factory=list)
    tokens: float = 0.0  # positions computed that are not padding
    re_expanded: float = 0.0  # micro-batches whose labels had to be re-expanded

    def __post_init__(self):
        self.codebook_sums = self.codebook_sums or [0.0] * self.num_codebooks
        self.codebook_counts = self.codebook_counts or [0.0] * self.num_codebooks

    def add(self, stats: list[float], *, tokens: int, re_expanded: bool) -> None:
        """Adds one micro-batch: `stats` as `TrainingForward` returns them."""
        self.text_sum += stats[0]
        self.text_count += stats[1]
        books = stats[len(stats) - 2 * self.num_codebooks :]
        for k in range(self.num_codebooks):
            self.codebook_sums[k] += books[k]
            self.codebook_counts[k] += books[self.num_codebooks + k]
        self.tokens += tokens
        self.re_expanded += re_expanded

    def values(self) -> list[float]:
        """Flat, for one collective."""
        return [
            self.text_sum,
            self.text_count,
            self.tokens,
            self.re_expanded,
            *self.codebook_sums,
            *self.codebook_counts,
        ]

    @classmethod
    def of(cls, values: list[float], num_codebooks: int) -> StepSums:
        """The inverse of `values`."""
        return cls(
            num_codebooks,
            text_sum=values[0],
            text_count=values[1],
            tokens=values[2],
            re_expanded=values[3],
            codebook_sums=values[4 : 4 + num_codebooks],
            codebook_counts=values[4 + num_codebooks : 4 + 2 * num_codebooks],
        )

    @classmethod
    def total(cls, parts: list[StepSums]) -> StepSums:
        """Over ranks."""
        rows = [part.values() for part in parts]
        return cls.of([sum(column) for column in zip(*rows, strict=True)], parts[0].num_codebooks)

    def losses(self, weights: LossWeights) -> dict[str, float]:
        """Mean losses over what is summed here."""
        return mean_losses(weights, self.text_sum, self.text_count, self.codebook_sums, self.codebook_counts)

    @property
    def audio_frames(self) -> float:
        """Audio frames that are learned: labels of the codebook that has most."""
        return max(self.codebook_counts)


def step_metrics(
    ranks: list[StepSums],
    weights: LossWeights,
    *,
    learning_rate: float,
    grad_norm: float,
    epoch: float,
    step_sec: float,
    data_sec: float,
    peak_gib: float,
) -> dict[str, float]:
    """The metrics of one optimizer step. Times are the slowest rank's, seconds; memory is the fullest rank's, GiB."""
    total = StepSums.total(ranks)
    metrics = {f"train/{name}": value for name, value in total.losses(weights).items()}
    metrics |= {
        "train/learning_rate": learning_rate,
        "train/grad_norm": grad_norm,
        "train/epoch": epoch,
        "train/text_tokens": total.text_count,
        "train/audio_frames": total.audio_frames,
        "train/re_expanded_labels": total.re_expanded,
        "perf/tokens_per_sec": total.tokens / step_sec,
        "perf/step_sec": step_sec,
        "perf/data_sec": data_sec,
        "memory/peak_gib": peak_gib,
    }
    for rank, part in enumerate(ranks):
        losses = part.losses(weights)
        for name in ("loss", "text_loss", "audio_loss"):
            if name in losses:
                metrics[f"rank/{rank}/{name}"] = losses[name]
    return metrics


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**20 if sys.platform != "darwin" else kilobytes / 2**30
