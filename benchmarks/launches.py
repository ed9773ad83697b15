"""How many kernels a step launches at each ZeRO stage, and how many operations its host goes through.

28 small layers with LoRA on all projections: as many weights, gradients and collectives as the real model has. Every
operation is counted as it is dispatched, backward, hooks and update included; a kernel is launched by each that is
neither a view nor an empty tensor. Beside the counts: how far LoRA's float32 weights are, after three steps, from
ZeRO-1's under ZeRO-2, and from ZeRO-3's where it scatters its gradients.

usage: python benchmarks/launches.py [--layers 28] [--json FILE], or under torchrun --nproc_per_node N
       exits with 1 where the weights differ: at all under ZeRO-3, by more than 1e-4 under ZeRO-2
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.gpu import Case, engine_of  # noqa: E402
from benchmarks.report import measuring_device, report  # noqa: E402
from benchmarks.syncs import make_batch  # noqa: E402
from higgs_ds.distributed.engine import leave_ranks, start_ranks  # noqa: E402
from higgs_ds.model.higgs_v2.tiny import base_config, byte_tokenizer, small_sizes  # noqa: E402
from higgs_ds.process import end_process  # noqa: E402

NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh", "aten::_unsafe_view")
CASES = {
    "zero1": (1, {}),
    "zero2": (2, {}),
    "zero3": (3, {}),
    "zero3, gradients scattered": (3, {"reduce_scatter": True}),
}
# Each against another, and by how much at most. Stages 1 and 2 sum the norm that clips in another order; its last bit
# decides how a weight is rounded to bf16.
PAIRS = [("zero2", "zero1", 1e-4), ("zero3, gradients scattered", "zero3", 0.0)]
STEPS, MICRO_BATCHES = 3, 2  # the last micro-batch and the last update are counted


class Counting(TorchDispatchMode):
    """Counts operations, and those of them that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found["operations"] += 1
        self.found["kernels"] += not (func.is_view or func.name().startswith(NO_KERNEL))
        return func(*args, **(kwargs or {}))


def measure(stage: int, zero: dict, config, tokenizer, ranks) -> tuple[dict, dict[str, torch.Tensor] | None]:
    """The counts of this rank's last micro-batch and update as columns; on rank 0 LoRA's float32 weights, whole."""
    engine, _ = engine_of(Case(stage), config, ranks, zero)
    engine.train()
    ranks.seed(0)
    batch = make_batch(config, tokenizer, with_index=True).model_inputs(ranks.device)
    scales = torch.full((config.audio_num_codebooks,), 0.01, device=ranks.device)

    def micro_batch() -> None:
        loss, _, report = engine.forward(batch, 0.1, scales)
        assert not report.problems
        engine.backward(loss)

    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES - 1):
            micro_batch()
        with Counting() as forth_and_back:
            micro_batch()
        with Counting() as update:
            engine.step(1e-4)
    parts = {"micro-batch": forth_and_back.found, "update": update.found}
    columns = {f"{kind}, {part}": found[kind] for kind in ("kernels", "operations") for part, found in parts.items()}
    state = engine.gather_state()
    return columns, state.full_weights() if ranks.is_main else None


def distance(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance over all weights."""
    differences = sum(float((ours[name] - wanted[name]).square().sum()) for name in wanted)
    return (differences / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    measuring_device()
    ranks = start_ranks()
    sizes = small_sizes(64, args.layers, ffn_size=128)
    config, tokenizer = base_config(sizes), byte_tokenizer(sizes.vocab_size)
    found = {name: measure(*case, config, tokenizer, ranks) for name, case in CASES.items()}
    if not ranks.is_main:
        return leave_ranks(0)
    rows = [{"": name, **columns} for name, (columns, _) in found.items()]
    figure = {f"{name}: weights off by": distance(found[name][1], found[other][1]) for name, other, _ in PAIRS}
    bar = dict(zip(figure, (limit for *_, limit in PAIRS), strict=True))
    holds = all(figure[name] <= bar[name] for name in figure)
    title = f"launches of one rank of {ranks.world_size}, {args.layers} layers, {len(found['zero1'][1])} LoRA weights"
    report(title, rows, figure=figure, bar=bar, holds=holds, json_file=args.json)
    return leave_ranks(0 if holds else 1)


if __name__ == "__main__":
    end_process(main())
