"""The real model on one GPU: 5.771 B parameters with random weights, bf16, LoRA rank 16 on all projections.

Learned tokens a second (here: real tokens of the rows that are trained on, text and audio, as the arithmetic of peak
FLOP counts them), share of the GPU's peak, peak memory, what ZeRO-3 costs over ZeRO-2, what activation checkpointing
costs and saves. Where there is no GPU the same runs on the CPU at a small size, and says so.

usage: python benchmarks/gpu.py [--tokens 8192] [--steps 8] [--cases zero2,zero3,…] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

BAR = 37_000
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16
# name: (ZeRO stage, activation checkpointing every N-th layer, forward; "compiled" is padding_free by torch.compile)
CASES = {
    "zero2": (2, 0, "padding_free"),
    "zero2, compiled": (2, 0, "compiled"),
    "zero2, every 2nd layer checkpointed": (2, 2, "padding_free"),
    "zero2, all layers checkpointed": (2, 1, "padding_free"),
    "zero3": (3, 0, "padding_free"),
    "zero3, all layers checkpointed": (3, 1, "padding_free"),
    "zero2, upstream's forward": (2, 0, "upstream"),
}
DEFAULT_CASES = "zero2;zero2, compiled;zero2, all layers checkpointed;zero3"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="a micro-batch (default: 8192 on a GPU, 512 on a CPU)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", default=DEFAULT_CASES, help="names, or all; by ;")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case, in a process of its own
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    import torch

    from benchmarks.report import device_name, report

    on_gpu = torch.cuda.is_available()
    names = list(CASES) if args.cases == "all" else args.cases.split(";")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"--cases: {unknown}; there are {list(CASES)}")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            out = Path(work) / f"{len(rows)}.json"
            # A process each: what one case leaves on the GPU must not count for the next.
            command = [
                sys.executable,
                str(Path(__file__)),
                "--one",
                name,
                "--out",
                str(out),
                "--steps",
                str(args.steps),
            ]
            done = subprocess.run(command + (["--tokens", str(args.tokens)] if args.tokens else []), cwd=ROOT)
            rows.append(json.loads(out.read_text()) if done.returncode == 0 else {"case": name, "tokens/s": 0.0})
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name()), None)
    for row in rows:
        if peak and row["tokens/s"]:
            row["of peak"] = row["tokens/s"] * row["FLOP a token"] / peak
    by_name = {row["case"]: row["tokens/s"] for row in rows}
    figure = {"learned tokens/s": by_name.get("zero2", 0.0)}
    if by_name.get("zero2") and by_name.get("zero3"):
        figure["ZeRO-3's cost over ZeRO-2"] = by_name["zero2"] / by_name["zero3"] - 1
    report(
        "one optimizer step on one device, LoRA rank 16 on all projections, bf16"
        + ("" if on_gpu else " (no GPU here: a small model on the CPU; the bar is for the real one)"),
        rows,
        figure=figure,
        bar={"learned tokens/s": BAR},
        holds=on_gpu and figure["learned tokens/s"] >= BAR,  # a small model on a CPU shows nothing of it
        json_file=args.json,
    )


def config_of(on_gpu: bool):
    """Boson's sizes, or small ones with the same proportions."""
    from higgs_ds.tiny import REAL_SIZES, base_config, byte_tokenizer, small_sizes

    sizes = REAL_SIZES if on_gpu else small_sizes(256, 4, ffn_size=640)
    return base_config(sizes), byte_tokenizer(sizes.vocab_size)


def run_one(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.step import Peak, learned_tokens, make_samples, wait_for
    from higgs_ds import model
    from higgs_ds.collate import Collator
    from higgs_ds.config import DEFAULT_LORA_TARGETS, parse_args
    from higgs_ds.ds_config import resolve
    from higgs_ds.engine import Engine, leave_ranks, loading, start_ranks
    from higgs_ds.forward import HiggsAudioForTraining, training_forward
    from higgs_ds.loss import LossWeights, loss_scales
    from higgs_ds.padding_free import DecoderLayer
    from higgs_ds.process import end_process
    from higgs_ds.sampler import TokenPlan

    stage, every, forward_impl = CASES[args.one]
    if forward_impl == "compiled":
        DecoderLayer.on_rows, forward_impl = torch.compile(DecoderLayer.on_rows, dynamic=True), "padding_free"
    ranks = start_ranks()
    on_gpu = ranks.device.type == "cuda"
    most = args.tokens or (8192 if on_gpu else 512)
    config, tokenizer = config_of(on_gpu)
    flags = parse_args(["--train_manifest", "x", "--output_dir", "x", "--dtype", "bf16"])
    raw = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    layer = model.layer_sizes(config)
    ds_config = resolve(raw, flags, world_size=1, on_cpu=not on_gpu, layer=layer)
    torch.manual_seed(0)
    with Peak(ranks.device) as whole:
        with loading(ds_config), ranks.device:
            base = HiggsAudioForTraining._from_config(config, torch_dtype=torch.bfloat16)
        base.requires_grad_(False)
        lora = model.attach_lora(
            base,
            rank=16,
            alpha=32,
            dropout=0.05,
            target_modules=list(DEFAULT_LORA_TARGETS),
            seed=0,
            base_name="random",
        )
        loss_impl = "reference" if forward_impl == "upstream" else "fused"
        module = training_forward(lora, config, forward_impl=forward_impl, loss_impl=loss_impl, checkpoint_every=every)
        engine = Engine(module, ds_config, weight_decay=0.0, max_grad_norm=1.0)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in base.parameters() if not p.requires_grad)

        collator = Collator.of(config, with_layout=forward_impl != "upstream")
        samples = make_samples(max(64, args.steps * most // 100), config, tokenizer, None)
        tokens = torch.tensor([collator([sample]).num_tokens for sample in samples]).numpy()
        plan = TokenPlan(tokens, max_tokens=max(most, int(tokens.max())), grad_accum=1, world_size=1, seed=0)
        batches = []
        for window in plan.windows(0, 1, min(plan.steps_per_epoch - 1, args.steps + 2) or 1):
            batches += [collator([samples[i] for i in micro.rows]) for micro in window.micro_batches]
        if on_gpu:
            batches = [batch.pin_memory() for batch in batches]
        weights = LossWeights.of(1.0, 1.0, None, config.audio_num_codebooks)
        engine.train()
        seconds, real, learned = [], [], []
        for number, batch in enumerate(batches):
            started = time.perf_counter()
            text_scale, scales = loss_scales(weights, batch.text_count, batch.codebook_counts, 1)
            inputs = batch.model_inputs(ranks.device)
            loss, stats, _ = engine.forward(inputs, text_scale, torch.tensor(scales, device=ranks.device))
            engine.backward(loss)
            assert torch.isfinite(stats).all()
            engine.step(1e-4)
            wait_for(ranks.device)
            if number >= 2:  # the first ones choose kernels and draw up memory
                seconds.append(time.perf_counter() - started)
                real.append(batch.num_tokens)
                learned.append(learned_tokens(batch))
    rates = [tokens / took for tokens, took in zip(real, seconds, strict=True)]
    used = (
        parameters - config.text_config.vocab_size * config.text_config.hidden_size
    )  # the embedding multiplies nothing
    ffn = sum(
        p.ds_numel if hasattr(p, "ds_numel") else p.numel() for n, p in base.named_parameters() if ".audio_mlp." in n
    )
    head = config.text_config.vocab_size * config.text_config.hidden_size
    touched = used - ffn - head  # a token goes through one of both networks, and few through the text head
    row = {
        "case": args.one,
        "parameters": f"{parameters / 1e9:.3f} B",
        "tokens a batch": round(statistics.mean(real)),
        "steps": len(seconds),
        "seconds a step": statistics.median(seconds),
        "tokens/s": statistics.median(rates),
        "with a label/s": statistics.median(rates) * sum(learned) / sum(real),
        "FLOP a token": 4.0 * touched,
        "peak memory, GB": whole.added,
    }
    args.out.write_text(json.dumps(row))
    end_process(leave_ranks(0))


if __name__ == "__main__":
    options = parse()
    if options.one:
        run_one(options)
    else:
        main()
