"""Frozen 4-bit linear layers. The only file that imports bitsandbytes, and only on demand."""

from __future__ import annotations

import logging
import sys

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 64  # weights that share a scale
ROWS_AT_ONCE = 1024  # of a weight while it is quantized: on a CPU that takes 40 bytes a value; a multiple of BLOCK


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with its weight in NF4 and a float32 scale for every 64 values: 4.5 bits a value.

    `weight` dequantizes on each access; nothing keeps the dense matrix, not even for the backward.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    bias: nn.Parameter | None  # type: ignore[assignment]  # torch's stubs know no layer without one

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype, device: torch.device):
        """
        Args:
            weight: [out, in] floating point, on any device; no reference is kept.
            dtype: dtype of the dense matrix.
            device: where the weight is quantized and stored.
        """
        nn.Module.__init__(self)  # nn.Linear's own would make a dense weight
        self.out_features, self.in_features = weight.shape
        self.bias, self.dtype = bias, dtype
        import_bitsandbytes()
        quantize = torch.ops.bitsandbytes.quantize_4bit
        pieces = [quantize(rows.to(device), BLOCK, "nf4", torch.uint8) for rows in weight.split(ROWS_AT_ONCE)]
        # Not in state_dict: checkpoints hold the dense weight. Scales are bytes, which module.to() never rounds.
        self.register_buffer("packed", torch.cat([packed for packed, _ in pieces]), persistent=False)
        scales = torch.cat([scales for _, scales in pieces])
        self.register_buffer("scales", scales.view(torch.uint8), persistent=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # nobody may set it
        """The dense matrix, [out, in]."""
        # As one row: the CPU kernel mishandles rows whose length is not a multiple of the block size.
        flat, scales = [self.quantized_values], self.scales.view(torch.float32)
        dense = torch.ops.bitsandbytes.dequantize_4bit(self.packed, scales, BLOCK, "nf4", flat, self.dtype)
        return dense.view(self.out_features, self.in_features)

    @property
    def quantized_values(self) -> int:
        """The number of weights; they are not parameters."""
        return self.out_features * self.in_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        return _Product.apply(hidden, self)


class _Product(torch.autograd.Function):
    """A linear layer that dequantizes its weight again in the backward."""

    @staticmethod
    def forward(ctx, hidden, layer):
        ctx.layer = layer
        return F.linear(hidden, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output @ ctx.layer.weight, None


def import_bitsandbytes() -> None:
    """Registers `torch.ops.bitsandbytes`, without the kernel that its import downloads from the hub on some CPUs."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # its warning that the kernel is missing
    fetcher = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules["kernels"]
        if fetcher is not None:
            sys.modules["kernels"] = fetcher
