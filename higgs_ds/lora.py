"""PEFT's LoRA layer with fewer passes over memory, and less of it kept for the backward.

PEFT computes `base(x) + lora_B(lora_A(dropout(x))) * scaling`: three tensors as large as the output, and one as large
as the input that every layer keeps for itself. Here the update is added by the product that makes it, and what dropout
left of the input is made again from the input, which several layers share, and the mask. Modules, weights and names
stay PEFT's, so that saving, merging and ZeRO-3's gathering know them as before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn


class _Adding(nn.Linear):
    """`lora_B`, which adds to what it is given."""

    def forward(self, rows: torch.Tensor, onto: torch.Tensor | None = None, scaling: float = 1.0) -> torch.Tensor:
        if onto is None:
            return super().forward(rows)
        return torch.addmm(onto, rows, self.weight.t(), alpha=scaling)


class _Dropping(nn.Linear):
    """`lora_A`, which drops out what it is given."""

    def forward(self, rows: torch.Tensor, probability: float = 0.0) -> torch.Tensor:
        if not probability:
            return super().forward(rows)
        return _DroppedProduct.apply(rows, self.weight, probability)


class _DroppedProduct(torch.autograd.Function):
    """dropout(rows) · weightᵀ, which keeps rows and mask instead of mask and dropped rows."""

    @staticmethod
    def forward(ctx, rows, weight, probability):
        drop = dropped_by_bits if rows.device.type == "cpu" else dropped_by_kernel
        dropped, kept, ctx.scale = drop(rows, probability)
        ctx.save_for_backward(rows, weight, kept)
        return F.linear(dropped, weight)

    @staticmethod
    def backward(ctx, gradient):
        rows, weight, kept = ctx.saved_tensors
        of_rows = of_weight = None
        gradient = gradient * ctx.scale  # [rows, rank]: nowhere else is it a smaller product
        if ctx.needs_input_grad[1]:
            of_weight = gradient.t() @ (rows * kept)
        if ctx.needs_input_grad[0]:
            of_rows = (gradient @ weight).mul_(kept)
        return of_rows, of_weight, None


def dropped_by_kernel(rows: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What dropout leaves of the rows, which values it kept (bool), and what those were multiplied by."""
    dropped, kept = torch.native_dropout(rows, probability, True)
    return dropped, kept, 1.0 / (1.0 - probability)


def dropped_by_bits(rows: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The same for a CPU, where torch's kernel spends most of its time on random numbers: 16 bits a value suffice.

    The probability is the nearest of 65,536ths, and the factor is that one's.
    """
    drawn = torch.empty(-(-rows.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(probability * 2**16), 2**16 - 1)
    kept = drawn.view(torch.int16)[: rows.numel()].view(rows.shape) >= dropped - 2**15
    scale = 2**16 / (2**16 - dropped)
    return (rows * kept).mul_(scale), kept, scale


class OnePassLora(PeftLinear):
    """LoRA on [rows, features]; whatever is not plain LoRA in training is left to PEFT."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapters = self.active_adapters
        plain = len(adapters) == 1 and x.ndim == 2 and not (self.disable_adapters or self.merged or args or kwargs)
        if not plain or adapters[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        (name,) = adapters
        dropout = self.lora_dropout[name]
        probability = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        return self.lora_B[name](self.lora_A[name](x, probability), self.base_layer(x), self.scaling[name])


def adopt_lora(model: nn.Module) -> int:
    """Turns PEFT's linear LoRA layers into these, in place; returns how many."""
    layers = [module for module in model.modules() if type(module) is PeftLinear]
    for layer in layers:
        downs, ups = list(layer.lora_A.values()), list(layer.lora_B.values())
        if all(type(part) is nn.Linear and part.bias is None for part in downs + ups):
            layer.__class__ = OnePassLora
            for down, up in zip(downs, ups, strict=True):
                down.__class__, up.__class__ = _Dropping, _Adding
    return sum(isinstance(layer, OnePassLora) for layer in layers)
