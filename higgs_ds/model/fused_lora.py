"""Linear layers with LoRA, all that share an input at once: few passes over memory, and little kept for the backward.

PEFT computes `base(x) + lora_B(lora_A(dropout(x))) * scaling` layer by layer: a mask, a dropped input and a gradient
of the input for each. Here layers on one input (q, k, v; gate, up) share the mask, one product makes the rank columns
of all of them, every product adds into its output or into the input's one gradient, and what dropout left is made
again in the backward. Modules, weights and names stay PEFT's.

Weights are read from several modules at once, which under ZeRO-3 must all be gathered: see `padding_free.DecoderLayer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn


class Projection(NamedTuple):
    """A frozen linear layer without a bias, and LoRA's update of it, where it has one."""

    weight: torch.Tensor  # [out, in]
    down: torch.Tensor | None  # lora_A, [rank, in]
    up: torch.Tensor | None  # lora_B, [out, rank]
    scaling: float
    dropout: float  # probability, of the input of `down`

    @classmethod
    def of(cls, layer: nn.Module) -> Projection | None:
        """None for whatever is not such a layer, alone or with one plain LoRA adapter."""
        base, names = layer, []
        if type(layer) is PeftLinear and not (layer.disable_adapters or layer.merged):
            base, names = layer.base_layer, layer.active_adapters
        if type(base) is not nn.Linear or base.bias is not None or base.weight.requires_grad:
            return None
        if not names:
            return cls(base.weight, None, None, 0.0, 0.0)
        name, *others = names
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        plain = all(type(part) is nn.Linear and part.bias is None for part in (down, up))
        if others or name in layer.lora_variant or not plain:
            return None
        probability = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
        return cls(base.weight, down.weight, up.weight, layer.scaling[name], probability)


class Update(NamedTuple):
    """What a group's forward leaves for its backward, beside the input."""

    columns: torch.Tensor | None  # [rows, ranks of all], the dropped input times every `down`; None without LoRA
    kept: torch.Tensor | None  # [rows, in] bool, what dropout kept; None without dropout


@dataclass(frozen=True)
class Group:
    """Projections of one input. Its products are computed without autograd, for the Functions that use it."""

    parts: tuple[Projection, ...]

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> Group | None:
        """None where one of them is no `Projection`, or drops out with another probability."""
        parts = tuple(Projection.of(layer) for layer in layers)
        if None in parts or len({part.dropout for part in parts if part.down is not None}) > 1:
            return None
        return cls(parts)

    @property
    def trained(self) -> list[torch.Tensor]:
        """The weights of LoRA, in the order of the gradients that `backward` gives: `down` and `up` of each part."""
        return [weight for part in self._adapted for weight in (part.down, part.up)]

    @property
    def _adapted(self) -> list[Projection]:
        return [part for part in self.parts if part.down is not None]

    def _downs(self) -> torch.Tensor:
        """Every `down`, one below the other. [ranks of all, in]"""
        downs = [part.down for part in self._adapted]
        return downs[0] if len(downs) == 1 else torch.cat(downs)

    def _shares(self, columns: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Each part's own of the columns, None where it has no LoRA."""
        shares = iter(() if columns is None else columns.split([part.down.shape[0] for part in self._adapted], dim=1))
        return [None if part.down is None else next(shares) for part in self.parts]

    def forward(
        self, rows: torch.Tensor, onto: Sequence[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], Update]:
        """Every projection of the rows, or its sum with one of `onto`, see `add_product`. [rows, out] each"""
        update = self._dropped_columns(rows)
        if onto is None:
            outs = [F.linear(rows, part.weight) for part in self.parts]
        else:
            outs = [add_product(out, rows, part.weight) for part, out in zip(self.parts, onto, strict=True)]
        for number, (part, columns) in enumerate(zip(self.parts, self._shares(update.columns), strict=True)):
            if columns is not None:
                outs[number] = add_product(outs[number], columns, part.up, part.scaling)
        return outs, update

    def _dropped_columns(self, rows: torch.Tensor) -> Update:
        if not self._adapted:
            return Update(None, None)
        kept, probability = None, self._adapted[0].dropout
        if probability:
            drop = dropped_by_bits if rows.device.type == "cpu" else dropped_by_kernel
            rows, kept = drop(rows, probability)
        return Update(F.linear(rows, self._downs()), kept)

    def backward(
        self,
        gradients: Sequence[torch.Tensor],
        rows: torch.Tensor,
        update: Update,
        *,
        of_rows: bool = True,
        into: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of the rows (None without `of_rows`; written to `into` where it is given), and of `trained`."""
        of_columns, of_ups, of_trained = [], [], []
        for part, gradient, columns in zip(self.parts, gradients, self._shares(update.columns), strict=True):
            if columns is not None:
                # Dropout's factor goes here: nowhere else is it a smaller product.
                factor = 1.0 if update.kept is None else dropout_factor(part.dropout, rows.device.type)
                of_columns.append((gradient @ part.up).mul_(part.scaling * factor))
                of_ups.append((gradient.t() @ columns).mul_(part.scaling))
        if of_ups:
            of_columns = torch.cat(of_columns, dim=1)
            of_downs = of_columns.t() @ (rows if update.kept is None else rows * update.kept)
            of_downs = of_downs.split([of_up.shape[1] for of_up in of_ups])
            of_trained = [each for pair in zip(of_downs, of_ups, strict=True) for each in pair]
        if not of_rows:
            return None, of_trained
        products = [(gradient, part.weight) for part, gradient in zip(self.parts, gradients, strict=True)]
        if of_ups:
            found = torch.mm(of_columns, self._downs(), out=into)
            if update.kept is not None:
                found.mul_(update.kept)
        else:
            found = torch.mm(*products.pop(0), out=into)
        for gradient, weight in products:
            found.addmm_(gradient, weight)
        return found, of_trained


def add_product(onto: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """onto + factor · rows · weightᵀ, in the place of `onto`. [rows, out] + [rows, in] · [in, out]

    Elsewhere where a compiler traces: torch 2.11's loses the gradient of a Function that gives back what it changed.
    """
    if torch.compiler.is_compiling():
        return torch.addmm(onto, rows, weight.t(), alpha=factor)
    return onto.addmm_(rows, weight.t(), alpha=factor)


def project(layers: Sequence[nn.Module], rows: torch.Tensor) -> list[torch.Tensor]:
    """What the linear layers, with LoRA or without, make of the rows. [rows, in] -> [rows, out] each

    Layers that are something else compute themselves.
    """
    group = Group.of(layers)
    if group is None:
        return [layer(rows) for layer in layers]
    return list(_Projected.apply(rows, group, *group.trained))


class _Projected(torch.autograd.Function):
    """The projections of one group."""

    @staticmethod
    def forward(ctx, rows, group, *trained):
        outs, update = group.forward(rows)
        ctx.save_for_backward(rows, *update)
        ctx.group = group
        return tuple(outs)

    @staticmethod
    def backward(ctx, *gradients):
        rows, *update = ctx.saved_tensors
        of_rows, of_trained = ctx.group.backward(gradients, rows, Update(*update), of_rows=ctx.needs_input_grad[0])
        return of_rows, None, *of_trained


def dropped_by_kernel(rows: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What dropout leaves of the rows, and which values it kept (bool)."""
    return torch.native_dropout(rows, probability, True)


def dropped_by_bits(rows: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a CPU, where torch's kernel spends most of its time on random numbers: 16 bits a value suffice.

    The probability is the nearest of 65,536ths.
    """
    drawn = torch.empty(-(-rows.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[: rows.numel()].view(rows.shape) >= _dropped_of_65536(probability) - 2**15
    return (rows * kept).mul_(dropout_factor(probability, "cpu")), kept


def dropout_factor(probability: float, device_type: str) -> float:
    """What those values are multiplied by that dropout keeps on such a device."""
    return 2**16 / (2**16 - _dropped_of_65536(probability)) if device_type == "cpu" else 1.0 / (1.0 - probability)


def _dropped_of_65536(probability: float) -> int:
    return min(round(probability * 2**16), 2**16 - 1)
