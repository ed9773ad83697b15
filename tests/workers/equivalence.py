"""Trains the same 16 rows for 3 optimizer steps at each ZeRO stage; rank 0 writes the LoRA weights.

usage: equivalence.py BASE_DIR CODEC_DIR CACHE_DIR OUTPUT_DIR BATCH_SIZE GRAD_ACCUM
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.workers.common import build


def main() -> None:
    base_dir, codec_dir, cache_dir, output_dir = map(Path, sys.argv[1:5])
    batch_size, grad_accum = map(int, sys.argv[5:7])
    from higgs_ds.distributed.engine import leave_ranks, start_ranks
    from higgs_ds.process import end_process

    ranks = start_ranks()
    rows = 16
    for stage in (0, 1, 2, 3):
        run = build(
            ranks, base_dir, codec_dir, cache_dir, rows, stage=stage, batch_size=batch_size, grad_accum=grad_accum
        )
        start = run.engine.gather_trainable()
        if ranks.is_main and stage == 3:
            save_file(start, output_dir / "start.safetensors")
        run.trainer.train(run.batches(last_step=3))
        weights = run.engine.gather_trainable()
        if ranks.is_main:
            save_file(weights, output_dir / f"stage{stage}.safetensors")
    # The mean of means, as most trainers have it: each micro-batch divided by its own counts.
    run = build(ranks, base_dir, codec_dir, cache_dir, rows, stage=0, batch_size=batch_size, grad_accum=grad_accum)
    from higgs_ds.loss import loss_scales

    for plan, batches in run.batches(last_step=3):
        for batch in batches:
            text, books = loss_scales(run.weights, batch.text_count, batch.codebook_counts, 1)
            text, books = text / len(batches), torch.tensor(books) / len(batches)
            loss, *_ = run.engine.forward(batch.model_inputs(), text, books)
            run.engine.backward(loss)
        run.engine.step(run.trainer.learning_rate(plan.step))
    weights = run.engine.gather_trainable()
    if ranks.is_main:
        save_file(weights, output_dir / "mean_of_means.safetensors")
    end_process(leave_ranks(0))


if __name__ == "__main__":
    main()
