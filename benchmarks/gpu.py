"""The real model on GPUs: 5.771 B parameters with random weights, bf16, LoRA rank 16 on all projections.

Tokens a second (real tokens of the rows that are trained on, text and audio alike), share of the card's peak, peak
memory, what ZeRO-3 costs over ZeRO-2, what activation checkpointing costs and saves, and what a micro-batch of twice
the tokens gains. On one GPU, or on all ranks of torchrun, with real collectives. Where there is no GPU the same runs
on the CPU at a small size, and says so.

usage: python benchmarks/gpu.py [--tokens 8192] [--steps 8] [--cases "zero2;zero3;…"] [--json FILE]
       torchrun --nproc_per_node 8 benchmarks/gpu.py …
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from higgs_ds.distributed.launch_env import grow_segments  # noqa: E402

grow_segments()

BAR = 37_000  # tokens a second and H100


@dataclass(frozen=True)
class Case:
    """What is run; "compiled" is the padding_free forward with --compile."""

    stage: int
    checkpoint_every: int = 0
    forward: str = "padding_free"
    times: int = 1  # of --tokens in a micro-batch


CASES = {
    "zero1": Case(1),
    "zero1, twice the tokens": Case(1, times=2),
    "zero2": Case(2),
    "zero2, twice the tokens": Case(2, times=2),
    "zero2, compiled": Case(2, forward="compiled"),
    "zero2, every 2nd layer checkpointed": Case(2, 2),
    "zero2, all layers checkpointed": Case(2, 1),
    "zero3": Case(3),
    "zero3, twice the tokens": Case(3, times=2),
    "zero3, all layers checkpointed": Case(3, 1),
    "zero2, upstream's forward": Case(2, forward="upstream"),
}
DEFAULT_CASES = "zero1;zero2;zero2, twice the tokens;zero2, compiled;zero2, all layers checkpointed;zero3"
TOKENS_ON_GPU, TOKENS_ON_CPU = 8192, 512


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, help=f"a micro-batch (default: {TOKENS_ON_GPU} on a GPU, {TOKENS_ON_CPU} on a CPU)"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", default=DEFAULT_CASES, help="names, or all; by ;")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case, in a process of its own
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    import torch

    from benchmarks.report import device_name, measuring_device, report
    from higgs_ds.model.flops import peak_flops

    on_gpu = measuring_device().type == "cuda"
    names = list(CASES) if args.cases == "all" else args.cases.split(";")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"--cases: {unknown}; there are {list(CASES)}")
    tokens = args.tokens or (TOKENS_ON_GPU if on_gpu else TOKENS_ON_CPU)
    launch = Launch()
    if launch.is_main:
        card = torch.cuda.get_device_properties(0) if on_gpu else None
        print(needs(names, tokens, launch.world_size, card), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(names):
            out = Path(work) / f"{number}.json"
            words = ["--one", name, "--out", str(out), "--steps", str(args.steps), "--tokens", str(tokens)]
            done = launch.run([sys.executable, str(Path(__file__)), *words])
            if launch.is_main:
                rows.append(json.loads(out.read_text()) if done else {"case": name, "tokens/s a GPU": 0.0})
    if not launch.is_main:
        return
    peak = peak_flops(device_name(), "bf16")
    for row in rows:
        if peak and row["tokens/s a GPU"]:
            row["of peak"] = row["tokens/s a GPU"] * row["GFLOP a token"] * 1e9 / peak
    by_name = {row["case"]: row["tokens/s a GPU"] for row in rows}
    figure = {"tokens/s a GPU": by_name.get("zero2", 0.0)}
    if by_name.get("zero2") and by_name.get("zero3"):
        figure["ZeRO-3's cost over ZeRO-2"] = by_name["zero2"] / by_name["zero3"] - 1
    if by_name.get("zero2") and by_name.get("zero2, twice the tokens"):
        figure["twice the tokens, times as fast"] = by_name["zero2, twice the tokens"] / by_name["zero2"]
    report(
        f"one optimizer step on {launch.world_size} {'GPU' if on_gpu else 'CPU rank'}"
        f"{'s' * (launch.world_size > 1)}, LoRA rank 16 on all projections, bf16"
        + ("" if on_gpu else " (no GPU here: a small model on the CPU; the bar is for the real one)"),
        rows,
        figure=figure,
        bar={"tokens/s a GPU": BAR},
        holds=on_gpu and figure["tokens/s a GPU"] >= BAR,  # a small model on a CPU shows nothing of it
        json_file=args.json,
    )


def needs(names: list[str], tokens: int, world_size: int, card) -> str:
    """What the cases take, by arithmetic; `card` are torch's device properties, None for a CPU."""
    import torch

    if card is None:
        return (
            f"no GPU: a small model on the CPU, {world_size} rank{'s' * (world_size > 1)}, about half a minute and "
            "1.5 GB a rank for each case. (torch for "
            f"CUDA {torch.version.cuda} needs NVIDIA's driver 580 or newer, and sees no GPU with an older one.)"
        )
    from benchmarks.memory import planned
    from higgs_ds.model.memory import Load

    has, (config, _) = card.total_memory / 1e9, config_of(True)
    lines = [
        f"{world_size} × {card.name}, {has:.0f} GB each; NVIDIA's driver 580 or newer for CUDA {torch.version.cuda}",
        "host: 8 GB of memory a rank; disk: nothing but what is installed; network: between the ranks alone",
        "time: by estimate one to two minutes a case (weights are drawn at random on the GPU), minutes more compiled",
        "memory of a GPU, by estimate:",
    ]
    for name in names:
        case = CASES[name]
        if case.forward == "upstream":
            lines.append(f"  {name}: more than the others, by the logits of every position")
            continue
        plan = planned(config, case.checkpoint_every, stage=case.stage, world_size=world_size)
        took = plan.total(Load(case.times * tokens)) / 1e9
        fits = "" if took < has else f", which this card does not have: lower --tokens ({tokens})"
        lines.append(f"  {name}: {took:.0f} GB for {case.times * tokens:,} tokens{fits}")
    return "\n".join(lines)


class Launch:
    """Starts a case's process on every rank: what one case leaves on a GPU must not count for the next."""

    def __init__(self):
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=datetime.timedelta(hours=1))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run(self, command: list[str]) -> bool:
        """Whether it ended well on every rank; where it fails on one, the others are ended."""
        if self.world_size == 1:
            return subprocess.run(command, cwd=ROOT).returncode == 0
        from higgs_ds.distributed.ports import free_port

        # The cases' ranks meet at a store of their own: in torchrun's there are the keys of the case before.
        port = self._gather(free_port() if self.is_main else None)[0]
        env = {**os.environ, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        process = subprocess.Popen(command, cwd=ROOT, env=env)
        while True:
            codes = self._gather(process.poll())
            if all(code is not None for code in codes):
                return not any(codes)
            if any(codes) and process.poll() is None:
                process.kill()
            time.sleep(0.5)

    def _gather(self, value) -> list:
        import torch.distributed as dist

        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def config_of(on_gpu: bool):
    """Boson's sizes, or small ones with the same proportions."""
    from higgs_ds.model.higgs_v2.tiny import REAL_SIZES, base_config, byte_tokenizer, small_sizes

    sizes = REAL_SIZES if on_gpu else small_sizes(256, 4, ffn_size=640)
    return base_config(sizes), byte_tokenizer(sizes.vocab_size)


def engine_of(case: Case, config, ranks, zero: dict | None = None):
    """The model with random weights on this rank's device, LoRA on it, under DeepSpeed; and its frozen parameters.

    `zero`: what stands otherwise in the ZeRO section of the stage's file.
    """
    import torch

    from higgs_ds import run
    from higgs_ds.distributed.engine import loading
    from higgs_ds.model.base import BaseCheckpoint
    from higgs_ds.model.higgs_v2.layouts import BOSON
    from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
    from higgs_ds.model.higgs_v2.upstream import HiggsAudioForTraining
    from higgs_ds.options.parse import parse_args
    from higgs_ds.setup import settle

    words = ["--train_manifest", "x", "--output_dir", "x", "--dtype", "bf16", "--base_ckpt", "random"]
    words += ["--activation_checkpointing", str(case.checkpoint_every or "none")]
    words += ["--compile", str(case.forward == "compiled")]
    if case.forward == "upstream":
        words += ["--forward_impl", "upstream", "--loss_impl", "reference"]
    raw = json.loads((ROOT / f"ds_configs/zero{case.stage}.json").read_text())
    raw["zero_optimization"] |= zero or {}
    # Of no file: its weights are drawn on the device.
    base = BaseCheckpoint("random", None, ROOT, BOSON, config, None, HiggsV2Spec.from_config(config), ())
    setup = settle(parse_args(words), raw, base, ranks)
    torch.manual_seed(0)
    with loading(setup.ds_config), ranks.device:
        model = HiggsAudioForTraining._from_config(config, torch_dtype=torch.bfloat16)
    model.requires_grad_(False)
    engine = run.adapt(setup, model, ranks)
    return engine, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if not p.requires_grad)


def batches_of(case: Case, config, tokenizer, ranks, most: int, steps: int):
    """This rank's micro-batches, one a step, of up to `most` tokens; and the tokens of all rows, numpy [rows]."""
    import numpy as np

    from benchmarks.step import make_samples
    from higgs_ds.batching.batch_plan import TokenPlan
    from higgs_ds.batching.collate import Collator
    from higgs_ds.model.higgs_v2.spec import HiggsV2Spec

    samples = make_samples(max(64, steps * most // 100) * ranks.world_size, config, tokenizer, None)
    count = Collator(HiggsV2Spec.from_config(config))
    tokens = np.array([count([sample]).num_tokens for sample in samples])
    plan = TokenPlan(tokens, max_tokens=max(most, int(tokens.max())), grad_accum=1, world_size=ranks.world_size, seed=0)
    collator = Collator(HiggsV2Spec.from_config(config), with_index=case.forward != "upstream")
    plans = plan.steps(ranks.rank, 1, min(plan.steps_per_epoch - 1, steps + 2) or 1)
    micro_batches = [micro for plan in plans for micro in plan.micro_batches]
    return [collator([samples[i] for i in micro.rows], filler=micro.filler) for micro in micro_batches], tokens


def run_one(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.step import Peak, learned_tokens, wait_for
    from higgs_ds.distributed.engine import leave_ranks, start_ranks
    from higgs_ds.loss import LossWeights, loss_scales
    from higgs_ds.model.flops import flop_per_token, mean_row_tokens, touched_parameters
    from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
    from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
    from higgs_ds.options.sections import LossOptions
    from higgs_ds.process import end_process

    case = CASES[args.one]
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    config, tokenizer = config_of(on_gpu)
    spec = HiggsV2Spec.from_config(config)
    with Peak(ranks.device) as whole:
        engine, parameters = engine_of(case, config, ranks)
        batches, lengths = batches_of(case, config, tokenizer, ranks, case.times * args.tokens, args.steps)
        if on_gpu:
            batches = [batch.pin_memory() for batch in batches]
        weights = LossWeights.from_options(LossOptions(), spec.num_codebooks)
        engine.train()
        seconds, real, learned = [], [], []
        for number, batch in enumerate(batches):
            ranks.barrier()
            started = time.perf_counter()
            text, *books = ranks.sum([batch.text_count, *batch.codebook_counts])
            text_scale, scales = loss_scales(weights, text, books, ranks.world_size)
            inputs = batch.model_inputs(ranks.device)
            loss, stats, _ = engine.forward(inputs, text_scale, torch.tensor(scales, device=ranks.device))
            engine.backward(loss)
            assert torch.isfinite(stats).all()
            engine.step(1e-4)
            wait_for(ranks.device)
            if number >= 2:  # the first ones choose kernels and draw up memory
                seconds.append(time.perf_counter() - started)
                real.append(0 if batch.filler else batch.num_tokens)
                learned.append(0 if batch.filler else learned_tokens(batch))
    slowest = [max(step) for step in zip(*ranks.table(seconds), strict=True)]
    real, learned = ranks.sum(real), ranks.sum(learned)
    memory = max(row[0] for row in ranks.table([whole.added]))
    rates = [tokens / took / ranks.world_size for tokens, took in zip(real, slowest, strict=True)]
    cost = flop_per_token(
        spec,
        lora_rank=16,
        lora_targets=list(DEFAULT_LORA_TARGETS),
        checkpoint_every=case.checkpoint_every,
        row_tokens=mean_row_tokens(lengths),
    )
    row = {
        "case": args.one,
        "parameters": f"{parameters / 1e9:.3f} B",
        "touched by a token": f"{touched_parameters(spec) / 1e9:.3f} B",
        "tokens a batch": round(statistics.mean(real) / ranks.world_size),
        "steps": len(slowest),
        "seconds a step": statistics.median(slowest),
        "tokens/s a GPU": statistics.median(rates),
        "tokens/s": statistics.median(rates) * ranks.world_size,
        "with a label/s": statistics.median(rates) * ranks.world_size * sum(learned) / sum(real),
        "GFLOP a token": cost / 1e9,
        "peak memory, GB": memory,
    }
    if ranks.is_main:
        args.out.write_text(json.dumps(row))
    end_process(leave_ranks(0))


if __name__ == "__main__":
    options = parse()
    if options.one:
        run_one(options)
    else:
        main()
