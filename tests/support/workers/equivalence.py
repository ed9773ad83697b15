"""Trains the same 16 rows for 3 optimizer steps at each ZeRO stage; rank 0 writes the LoRA weights.

In float32 at every split; in bf16 on two ranks with accumulation 2, and on one with nothing to sum, which also trains
the same in float64 without an engine.

usage: equivalence.py BASE_DIR CODEC_DIR CACHE_DIR OUTPUT_DIR BATCH_SIZE GRAD_ACCUM
"""

import copy
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from higgs_ds.distributed.engine import leave_ranks, start_ranks
from higgs_ds.loss import loss_scales
from higgs_ds.model.higgs_v2.config import read_checkpoint_config
from higgs_ds.model.higgs_v2.forward import training_forward
from higgs_ds.process import end_process
from tests.support.workers.common import build, with_lora_b

UPSTREAM = {"forward_impl": "upstream", "loss_impl": "reference"}
BF16 = {  # by world size
    1: {"stage0": {"stage": 0}, "stage1": {"stage": 1}},
    2: {**{f"stage{n}": {"stage": n} for n in (1, 2, 3)}, "upstream": {"stage": 2, **UPSTREAM}},
}


def main() -> None:
    base_dir, codec_dir, cache_dir, output_dir = map(Path, sys.argv[1:5])
    batch_size, grad_accum = map(int, sys.argv[5:7])
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
    for name, settings in BF16.get(ranks.world_size, {}).items():
        settings = {"dtype": "bf16", "batch_size": 8, "total_steps": 4} | settings
        if ranks.world_size == 2:
            settings |= {"batch_size": 2, "grad_accum": 2}
        kept = {}
        run = build(ranks, base_dir, codec_dir, cache_dir, rows, wrap_model=partial(with_copy, kept=kept), **settings)
        for step in (1, 4):
            run.trainer.train(run.batches(first_step=min(step, 2), last_step=step))
            state = run.engine.gather_state()
            if ranks.is_main:
                save_file(state().exp_avg, output_dir / f"bf16_{name}_step{step}.safetensors")
        if ranks.world_size == 1 and name == "stage0":
            exact = train_exactly(training_forward(kept["model"], read_checkpoint_config(base_dir)), run)
            for step in (1, 4):
                save_file(exact[step - 1], output_dir / f"float64_step{step}.safetensors")
    end_process(leave_ranks(0))


def with_copy(model, kept: dict):
    """LoRA drawn at random; and what it was before the engine, its bf16 values as float64."""
    kept["model"] = copy.deepcopy(with_lora_b(model)).double()
    return model


def train_exactly(module, run) -> list[dict[str, torch.Tensor]]:
    """Adam's first moments after each of the same steps in the module's dtype, without an engine."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.01)
    moments = []
    for _, (batch,) in run.batches(last_step=4):
        text, books = loss_scales(run.weights, batch.text_count, batch.codebook_counts, 1)
        loss, *_ = module(batch.model_inputs(), text, torch.tensor(books))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        moments.append({name: optimizer.state[p]["exp_avg"].clone() for name, p in trained.items()})
    return moments


if __name__ == "__main__":
    main()
