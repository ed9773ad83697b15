"""Frozen linear layers of 4 bits a weight, by bitsandbytes: the only file that imports it, and only when asked for."""

from __future__ import annotations

import functools
import logging
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 64  # weights that share a scale
ROWS_AT_ONCE = 1024  # of a weight while it is quantized: on a CPU that takes 40 bytes a value; a multiple of BLOCK


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in NF4, with a float32 scale for every 64 values: 4.5 bits a value.

    `weight` is the dense matrix, made anew wherever it is asked for and kept by nobody: not for the backward either.
    """

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device):
        """
        Args:
            weight: [out, in] floating point, on any device; a reference to it is not kept.
            dtype: of the dense matrix.
            device: where it is quantized and stays.
        """
        nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.out_features, self.in_features = weight.shape
        self.bias, self.dtype = bias, dtype
        pieces = [
            _functional().quantize_4bit(rows.to(device), blocksize=BLOCK, quant_type="nf4")
            for rows in weight.split(ROWS_AT_ONCE)
        ]
        # In no state_dict: a checkpoint has the dense weight. Scales as bytes, which no cast of the module rounds.
        self.register_buffer("packed", torch.cat([packed for packed, _ in pieces]), persistent=False)
        scales = torch.cat([state.absmax for _, state in pieces])
        self.register_buffer("scales", scales.view(torch.uint8), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix, [out, in]."""
        functional, scales = _functional(), self.scales.view(torch.float32)
        # As one row: the kernel for CPUs takes rows that are no multiple of a block for ones that are.
        flat = {"shape": (self.quantized_values,), "blocksize": BLOCK, "quant_type": "nf4"}
        dense = functional.dequantize_4bit(self.packed, functional.QuantState(scales, dtype=self.dtype, **flat))
        return dense.view(self.out_features, self.in_features)

    @property
    def quantized_values(self) -> int:
        """How many weights there are, which are no parameters."""
        return self.out_features * self.in_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        return _Product.apply(hidden, self)


class _Product(torch.autograd.Function):
    """A linear layer's, whose dense weight is made again in the backward."""

    @staticmethod
    def forward(ctx, hidden, layer):
        ctx.layer = layer
        return F.linear(hidden, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ ctx.layer.weight, None


@functools.cache
def _functional() -> ModuleType:
    """bitsandbytes.functional. On some CPUs its import fetches a kernel from the hub, which nothing here uses."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # where that cannot be had
    held = sys.modules.get("kernels")
    sys.modules["kernels"] = None
    try:
        import bitsandbytes.functional as functional
    finally:
        if held is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = held
    return functional
