"""Where the time of a micro-batch goes on a GPU, by arithmetic: what to look at before there is a GPU, and beside it.

The 5.8 B model in bf16, LoRA rank 16 on all projections, forward and backward on tensors that have sizes but no data.
Every operation takes as long as its products or its bytes, whichever takes longer, at speeds that large kernels reach
on an H100. Nothing here is measured: launches, caches and small kernels are left out, so that a GPU will be slower.

usage: python benchmarks/roofline.py [--tokens 8192] [--dropout 0.05] [--base_dtype nf4] [--tflops 650]
                                     [--tb_per_sec 2.8] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.gpu import BAR, config_of  # noqa: E402
from benchmarks.memory import BOOKS, batch_of, lora_model, meta_has_no_autocast  # noqa: E402
from benchmarks.report import report  # noqa: E402
from higgs_ds.model.higgs_v2.forward import training_forward  # noqa: E402

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")
GATHERS = ("aten::index_select", "aten::embedding", "aten::index_copy", "aten::index_copy_")
FUSIBLE = ("silu, there and back", "norms, there and back", "factors, masks, rotary", "sums")  # by --compile
NO_WORK = ("aten::empty", "aten::new_empty", "aten::detach", "aten::empty_like", "aten::empty_strided")
KINDS = {  # by how the operation's name begins, the first that fits; products are told apart by their sizes
    "products of frozen weights": (),
    "products of LoRA": (),
    "attention": ("aten::_scaled_dot_product",),
    "dropout's draw": ("aten::native_dropout",),
    "silu, there and back": ("aten::silu",),
    "norms, there and back": ("aten::sigmoid",),  # see OneKernelNorm
    "factors, masks, rotary": ("aten::mul", "aten::addcmul"),
    "sums": ("aten::add", "aten::sum"),
    "weights out of 4 bits": ("bitsandbytes::",),
    "rows picked, repeated, joined": (*GATHERS, "aten::cat", "aten::clone", "aten::copy_", "aten::new_zeros"),
    "the rest": ("aten::",),
}


def size(tensor: torch.Tensor) -> int:
    """Bytes of its values, those that an expanded tensor repeats counted once."""
    seen = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        seen *= length if stride else 1
    return seen * tensor.element_size()


class Roofline(TorchDispatchMode):
    """Seconds by kind of operation."""

    def __init__(self, flops: float, bytes_per_sec: float):
        super().__init__()
        self.flops, self.bytes_per_sec = flops, bytes_per_sec
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        out = func(*args, **(kwargs or {}))
        if func.is_view or name in NO_WORK:
            return out
        given = args, {key: value for key, value in (kwargs or {}).items() if key != "out"}
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        moved, computed, kind = sum(map(size, tensors + results)), 0, None
        if name in PRODUCTS:
            first, second = args[-2:]
            rows, inner, columns = first.shape[-2], first.shape[-1], second.shape[-1]
            computed = 2 * rows * inner * columns * (first.shape[0] if first.ndim == 3 else 1)
            thin = min(rows, inner, columns) <= 64
            kind = "products of LoRA" if thin else "products of frozen weights"
        elif name in GATHERS:
            moved = 2 * sum(map(size, results))
        elif name.startswith("aten::_scaled_dot_product"):
            # Causal attention computes half of 2 products; its backward 5 of them. Half of the products' speed.
            backward = "backward" in name
            query, key = args[backward : backward + 2]  # the gradient comes before them
            one = 2 * query.numel() * key.shape[2] / 2
            computed = 2 * one * (5 if backward else 2)
        if kind is None:
            kind = next(k for k, starts in KINDS.items() if name.startswith(starts))
        self.calls[kind] += 1
        self.seconds[kind] += max(computed / self.flops, moved / self.bytes_per_sec)
        return out


class OneKernelNorm(torch.autograd.Function):
    """What `rms_norm` moves on a GPU, where it is one kernel; on a device without memory it comes in pieces."""

    @staticmethod
    def forward(ctx, rows):
        ctx.save_for_backward(rows)
        return torch.sigmoid(rows)

    @staticmethod
    def backward(ctx, gradient):
        return torch.ops.aten.sigmoid_backward(gradient, *ctx.saved_tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="of the micro-batch")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--base_dtype", choices=("nf4",))
    parser.add_argument("--tflops", type=float, default=650.0, help="that large products reach")
    parser.add_argument("--tb_per_sec", type=float, default=2.8, help="that large copies reach")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config, tokenizer = config_of(True)
    batch = batch_of(config, tokenizer, args.tokens)
    module = training_forward(lora_model(config, args.dropout, quantized=args.base_dtype == "nf4"), config)
    flash = torch.ops.aten._scaled_dot_product_flash_attention

    def attention(query, key, value, dropout_p=0.0, is_causal=False, **_):
        return flash(query, key, value, dropout_p, is_causal)[0]

    inputs, scales = batch.model_inputs("meta"), torch.full((BOOKS,), 0.1, device="meta")
    attends = mock.patch("higgs_ds.model.flat_rows.F.scaled_dot_product_attention", attention)
    norms = mock.patch("higgs_ds.model.fused_mlp.F.rms_norm", lambda rows, *_: OneKernelNorm.apply(rows))
    with meta_has_no_autocast(), attends, norms, Roofline(args.tflops * 1e12, args.tb_per_sec * 1e12) as roof:
        loss, *_ = module(inputs, 0.1, scales)
        loss.backward()
    total = sum(roof.seconds.values())
    rows = [
        {"": kind, "calls": roof.calls[kind], "ms": 1e3 * roof.seconds[kind], "share": roof.seconds[kind] / total}
        for kind in KINDS
    ]
    calls, fusible = (sum(of[kind] for kind in FUSIBLE) for of in (roof.calls, roof.seconds))
    rows.append({"": "--compile fuses at most", "calls": calls, "ms": 1e3 * fusible, "share": fusible / total})
    rows.append({"": "all", "calls": sum(roof.calls.values()), "ms": 1e3 * total, "share": 1.0})
    report(
        f"a micro-batch of {batch.num_tokens:,} tokens of the 5.8 B model by arithmetic, not measured: "
        f"{args.tflops:g} TFLOP/s, {args.tb_per_sec:g} TB/s",
        rows,
        figure={"tokens/s, at most": batch.num_tokens / total},
        bar={"tokens/s, at most": BAR},
        holds=batch.num_tokens / total >= BAR,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
