"""Breaks one check after the other on rank 1 of 2, in step 2 of 3; writes what each rank saw.

usage: broken_losses.py BASE_DIR CODEC_DIR OUTPUT_DIR CHECK…
"""

import json
import sys
import time
from pathlib import Path

import torch

from higgs_ds.distributed.engine import leave_ranks, start_ranks
from higgs_ds.guard import BadLossError
from higgs_ds.model.training_forward import PaddingFreeOutput
from higgs_ds.process import end_process
from higgs_ds.step_stats import MicroBatchStats
from tests.support.workers.common import build

BROKEN_STEP = 2
SETUPS = {
    "ZeRO-2": {"stage": 2, "dtype": "bf16"},
    "ZeRO-3": {"stage": 3, "dtype": "fp32", "activation_checkpointing": 2},
    "upstream": {"stage": 2, "dtype": "fp32", "forward_impl": "upstream", "loss_impl": "reference"},
}


def break_batch(check: str, batch, audio_out_token: int) -> None:
    if check == "batch_keys":
        batch.label_audio_ids = None
    elif check == "audio_out_count":
        batch.input_ids[0, 0] = audio_out_token
    elif check == "code_range":
        batch.audio_out_ids[0, 1] = 5000
    elif check == "label_count":
        batch.label_audio_ids[:, 0] = 3


class Breaker(torch.nn.Module):
    """Stands between the training forward and the model, and spoils the outputs while `check` is set."""

    def __init__(self, model):
        super().__init__()
        self.model, self.check = model, None

    def forward(self, **inputs):
        if self.check == "audio_logits" and "index" in inputs:
            inputs["audio_out_ids"] = None
        outputs = self.model(**inputs)
        if isinstance(outputs, PaddingFreeOutput):
            return self.spoil(outputs)
        if self.check == "expanded_labels":
            outputs.expanded_labels = outputs.expanded_labels[:, :-3]
        elif self.check == "audio_logits":
            outputs.audio_logits = outputs.audio_logits[:0] + outputs.audio_logits.sum() * 0
        elif self.check == "finite":
            outputs.logits = outputs.logits * float("nan")
        elif self.check == "gradient":
            outputs.logits.register_hook(lambda grad: grad * float("nan"))
        return outputs

    def spoil(self, outputs: PaddingFreeOutput) -> PaddingFreeOutput:
        if self.check == "expanded_labels":
            return outputs._replace(num_rows=outputs.num_rows + 3)
        if self.check == "finite":
            outputs.sums.text_sum = outputs.sums.text_sum * float("nan")
            return outputs._replace(loss=outputs.loss * float("nan"))
        if self.check == "gradient":
            outputs.loss.register_hook(lambda grad: grad * float("nan"))
        return outputs


def spoil_stats(run) -> None:
    """Zeroes a sum on its way to the guard, as a trainer that loses its labels would."""
    forward = run.engine.forward
    books = len(run.weights.codebooks)

    def spoiled(*args):
        loss, flat, report = forward(*args)
        stats = MicroBatchStats.empty(books).unpack(flat.tolist())
        if run.broken == "text_loss":
            stats.text_sum = 0.0
        elif run.broken == "audio_loss":
            stats.codebook_sums = [0.0] * books
        elif run.broken == "total":
            stats.loss = 0.0
        return loss, torch.tensor(stats.pack()), report

    run.engine.forward = spoiled
    order = run.engine.gradient_order
    run.engine.gradient_order = lambda: [value + (run.broken == "gradient_order") for value in order()]


def main() -> None:
    base_dir, codec_dir, out = map(Path, sys.argv[1:4])
    checks = sys.argv[4:]
    ranks = start_ranks()
    rows = 12
    seen = {}
    for setup, settings in SETUPS.items():

        def fresh(mode, settings=settings):
            settings = {**settings, "batch_size": 2, "on_bad_loss": mode}
            run = build(ranks, base_dir, codec_dir, out, rows, **settings, wrap_model=Breaker)
            spoil_stats(run)
            return run

        for mode in ("skip", "raise"):
            run = fresh(mode)
            for check in checks:
                seen[f"{setup}:{check}:{mode}"] = one_case(run, check, ranks)
        with_dropped, without = fresh("skip"), fresh("skip")
        one_case(with_dropped, "finite", ranks)
        without.trainer.train((w, b) for w, b in without.batches(last_step=3) if w.step != BROKEN_STEP)
        ours, wanted = with_dropped.engine.gather_trainable(), without.engine.gather_trainable()
        seen[f"{setup}:as if the step had not been"] = all(torch.equal(ours[name], wanted[name]) for name in wanted)
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    end_process(leave_ranks(0))


def one_case(run, check, ranks) -> dict:
    """Steps 1 to 3 of the run, with `check` broken on rank 1 in step 2."""
    breaker = run.engine.module.model
    run.trainer.dropped_steps, updates_before = 0, run.engine._adam_steps()
    moved, raised, failures, rows_of_rank_1 = [], False, [], None
    started = time.monotonic()
    for plan, batches in run.batches(last_step=3):
        before = run.engine.gather_trainable()
        broken = plan.step == BROKEN_STEP
        if broken:
            rows_of_rank_1 = ranks.gather(batches[0].origins)[1]
        if broken and ranks.rank == 1:
            for batch in batches:
                break_batch(check, batch, run.guard.spec.audio_out_token)
            run.broken = breaker.check = check
        try:
            run.trainer.train([(plan, batches)])
        except BadLossError as error:
            raised = True
            failures = [f.as_row() | {"rows": list(f.rows)} for f in error.failures]
        run.broken = breaker.check = None
        after = run.engine.gather_trainable()
        moved.append(any(not torch.equal(before[name], after[name]) for name in before))
        if raised:
            break
    return {
        "raised": raised,
        "seconds": time.monotonic() - started,
        "failures": failures,
        "rows_of_rank_1": rows_of_rank_1,
        "moved_in_step": moved,
        "dropped_steps": run.trainer.dropped_steps,
        "updates": run.engine._adam_steps() - updates_before,
    }


if __name__ == "__main__":
    main()
