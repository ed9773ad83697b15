"""Fused LoRA for all linear layers that share an input: fewer passes over memory, less saved for the backward.

PEFT computes each layer separately, with its own dropout mask, dropped input and input gradient:

    y = x · Wᵀ + scaling · (dropout(x) · Aᵀ) · Bᵀ

Here layers with the same input (q, k, v; gate, up) share the mask, one product computes the rank columns
`c = dropout(x) · Aᵀ` of all of them, and each layer is one product over `[x ‖ c]`, with a residual added inside it:

    y = residual + [x ‖ c] · [W ‖ scaling · B]ᵀ

so that everything is summed in float32 and rounded once. In PEFT's order LoRA's term is added in bf16 to a sum already
rounded, and whatever is below half a unit in the last place is lost: half of a term of 0.1 %. The backward adds all
products into a single input gradient and recomputes the dropped input. Modules, weights and names stay PEFT's.

Weights of several modules are read at once, and under ZeRO-3 all of them must be gathered: see `higgs_v2.layers` and
`TrainingForward.leaf_modules`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from .fused_head import FusedHead
from .quantized import QuantizedLinear

ALIGNMENT = 8  # columns; rows of 16-bit values then begin at multiples of 16 bytes, as fast kernels require


class Projection(NamedTuple):
    """A frozen linear layer without bias, with or without LoRA."""

    layer: nn.Linear
    lora_A: torch.Tensor | None  # [rank, in]
    lora_B: Any  # [out, rank], a tensor if `lora_A` is
    scaling: float
    dropout: float  # dropout probability of the input of `lora_A`

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; a quantized layer dequantizes on each access, so do not keep it."""
        return self.layer.weight

    @classmethod
    def from_layer(cls, layer: Any) -> Projection | None:
        """None if the module is not such a layer, alone or with one plain LoRA adapter."""
        base, names = layer, ()
        if type(layer) in (PeftLinear, LoraHead) and not (layer.disable_adapters or layer.merged):
            base, names = layer.base_layer, layer.active_adapters
        # Frozen and without bias; any other layer runs its own forward.
        dense = type(base) in (nn.Linear, FusedHead) and not base.weight.requires_grad
        if not (dense or type(base) is QuantizedLinear) or base.bias is not None:
            return None
        if not names:
            return cls(base, None, None, 0.0, 0.0)
        # A single plain adapter: no DoRA or other variant, no bias.
        name, *others = names
        lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        plain = all(type(part) is nn.Linear and part.bias is None for part in (lora_A, lora_B))
        if others or name in layer.lora_variant or not plain:
            return None
        probability = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
        return cls(base, lora_A.weight, lora_B.weight, layer.scaling[name], probability)


class SavedLora(NamedTuple):
    """Tensors saved by a group's forward for its backward, beside the input."""

    rank_columns: torch.Tensor | None  # [rows, ranks of all], dropout(x) · Aᵀ; None without LoRA
    dropout_mask: torch.Tensor | None  # [rows, in] bool, True for kept values; None without dropout


@dataclass(frozen=True)
class ProjectionGroup:
    """Projections of one input, computed without autograd, for use in autograd Functions."""

    projections: tuple[Projection, ...]

    @classmethod
    def from_layers(cls, layers: Sequence[nn.Module]) -> ProjectionGroup | None:
        """None if one layer is not a `Projection`, or has another dropout probability."""
        projections: tuple[Any, ...] = tuple(Projection.from_layer(layer) for layer in layers)
        if None in projections or len({p.dropout for p in projections if p.lora_A is not None}) > 1:
            return None
        return cls(projections)

    @property
    def lora_weights(self) -> list[torch.Tensor]:
        """`lora_A` and `lora_B` of each projection, in the order of the gradients from `backward`."""
        return [weight for p in self._adapted for weight in (p.lora_A, p.lora_B)]

    @property
    def _adapted(self) -> list[Any]:
        # `Projection`s with LoRA.
        return [p for p in self.projections if p.lora_A is not None]

    def _stacked_lora_A(self) -> torch.Tensor:
        """All `lora_A`, stacked. [sum of ranks, in]"""
        stacked = [p.lora_A for p in self._adapted]
        return stacked[0] if len(stacked) == 1 else torch.cat(stacked)

    def _split_columns(self, rank_columns: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Each projection's rank columns; None without LoRA."""
        ranks = [p.lora_A.shape[0] for p in self._adapted]
        own = iter(() if rank_columns is None else rank_columns.split(ranks, dim=1))
        return [None if p.lora_A is None else next(own) for p in self.projections]

    def forward(
        self, hidden: torch.Tensor, residuals: Sequence[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], SavedLora]:
        """Computes every projection of the hidden states, plus its residual if given, see `add_product`.

        [rows, in] -> [rows, out] each
        """
        saved = self._rank_columns(hidden)
        products = self._products(hidden, saved.rank_columns)
        if residuals is None:
            return [F.linear(rows, weight) for rows, weight in products], saved
        return [add_product(r, *product) for r, product in zip(residuals, products, strict=True)], saved

    def _products(self, hidden: torch.Tensor, rank_columns: torch.Tensor | None) -> Iterator[tuple]:
        """Yields (rows, weight) of each projection; with LoRA, `[x ‖ c]` and `[W ‖ scaling · B]`.

        The columns of all projections follow x, so that each B is padded with zeros for those of the others.
        """
        if rank_columns is None:
            yield from ((hidden, p.weight) for p in self.projections)
            return
        # [x ‖ c], once for all projections, with c padded to the kernels' alignment.
        width = rank_columns.shape[1] + -rank_columns.shape[1] % ALIGNMENT
        joined = torch.cat([hidden, F.pad(rank_columns, (0, width - rank_columns.shape[1]))], dim=1)
        before = 0
        for p in self.projections:
            if p.lora_A is None:
                yield hidden, p.weight
                continue
            behind = width - before - p.lora_A.shape[0]
            columns = F.pad(p.lora_B * p.scaling, (before, behind))  # [out, width]
            yield joined, torch.cat([p.weight, columns], dim=1)
            before += p.lora_A.shape[0]

    def _rank_columns(self, hidden: torch.Tensor) -> SavedLora:
        if not self._adapted:
            return SavedLora(None, None)
        # One mask for all projections of this input; they share the probability.
        mask, probability = None, self._adapted[0].dropout
        if probability:
            drop = dropout_by_bits if drops_by_bits(hidden.device.type) else dropout_by_kernel
            hidden, mask = drop(hidden, probability)
        return SavedLora(F.linear(hidden, self._stacked_lora_A()), mask)

    def backward(
        self,
        grad_outputs: Sequence[torch.Tensor],
        hidden: torch.Tensor,
        saved: SavedLora,
        *,
        needs_grad_hidden: bool = True,
        out: torch.Tensor | None = None,
    ) -> tuple[Any, list[torch.Tensor]]:
        """Gradients of the hidden states and of `lora_weights`, with H = dropout(x) · Aᵀ:

            grad_H = scaling · grad_y · B        grad_B = scaling · grad_yᵀ · H
            grad_A = grad_Hᵀ · dropout(x)        grad_x = mask · (grad_H · A) + Σ grad_y · W

        The first is None without `needs_grad_hidden`, and written to `out` if given.
        """
        # For each projection: gradients of its rank columns and of B.
        grads_of_columns, grad_Bs, grad_lora_weights = [], [], []
        columns_of = self._split_columns(saved.rank_columns)
        for p, grad_output, columns in zip(self.projections, grad_outputs, columns_of, strict=True):
            if columns is not None:
                # Dropout's factor is applied here, to the smallest tensor.
                factor = 1.0 if saved.dropout_mask is None else dropout_factor(p.dropout, hidden.device.type)
                grads_of_columns.append((grad_output @ p.lora_B).mul_(p.scaling * factor))
                grad_Bs.append((grad_output.t() @ columns).mul_(p.scaling))
        if grad_Bs:
            # All A in one product.
            grad_columns = torch.cat(grads_of_columns, dim=1)
            grad_As = grad_columns.t() @ (hidden if saved.dropout_mask is None else kept(hidden, saved.dropout_mask))
            grad_As = grad_As.split([grad_B.shape[1] for grad_B in grad_Bs])
            grad_lora_weights = [grad for pair in zip(grad_As, grad_Bs, strict=True) for grad in pair]
        if not needs_grad_hidden:
            return None, grad_lora_weights
        # The input's gradient: start with LoRA's part or the first product, add the others in place.
        products = list(zip(grad_outputs, self.projections, strict=True))
        if grad_Bs:
            grad_hidden = torch.mm(grad_columns, self._stacked_lora_A())
            if saved.dropout_mask is not None:
                grad_hidden = kept(grad_hidden, saved.dropout_mask)
        else:
            grad_output, p = products.pop(0)
            grad_hidden = torch.mm(grad_output, p.weight)
        for grad_output, p in products:
            grad_hidden.addmm_(grad_output, p.weight)
        return (grad_hidden if out is None else out.copy_(grad_hidden)), grad_lora_weights


def kept(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values where a bool mask is True, else 0.

    On a GPU by dropout's own kernel: a product of bf16 and bool would take torch's slow mixed-type path.
    """
    if values.device.type == "cpu":
        return values * mask
    return torch.ops.aten.native_dropout_backward(values, mask, 1.0)


def add_product(residual: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """residual + hidden · weightᵀ, in place and rounded once. [rows, out] + [rows, in] · [in, out]

    Out of place under torch.compile: torch 2.11 loses the gradient of a Function that returns a modified input.
    """
    if torch.compiler.is_compiling():
        return torch.addmm(residual, hidden, weight.t())
    return residual.addmm_(hidden, weight.t())


def project(layers: Sequence[nn.Module], hidden: torch.Tensor) -> list[torch.Tensor]:
    """Applies linear layers, with or without LoRA, to the hidden states. [rows, in] -> [rows, out] each

    Unsupported layers run their own forward.
    """
    group = ProjectionGroup.from_layers(layers)
    if group is None:
        return [layer(hidden) for layer in layers]
    return list(_Project.apply(hidden, group, *group.lora_weights))


class LoraHead(PeftLinear):
    """A head with LoRA that computes its logits in one product; weights and names stay PEFT's."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, hidden] -> [R, classes]"""
        group = ProjectionGroup.from_layers([self])
        return super().forward(rows) if group is None else _Project.apply(rows, group, *group.lora_weights)[0]


class _Project(torch.autograd.Function):
    """The projections of one group."""

    @staticmethod
    def forward(ctx, hidden, group, *lora_weights):
        outputs, saved = group.forward(hidden)
        ctx.save_for_backward(hidden, *saved)
        ctx.group = group
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        hidden, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        grad_hidden, grad_lora_weights = ctx.group.backward(
            grad_outputs, hidden, SavedLora(*saved), needs_grad_hidden=needed
        )
        return grad_hidden, None, *grad_lora_weights


def dropout_by_kernel(hidden: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled values after dropout, and the mask (bool, True for kept values)."""
    return torch.native_dropout(hidden, probability, True)


def dropout_by_bits(hidden: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`dropout_by_kernel` for a CPU, with 16 random bits per value: torch's kernel spends most of its time on them.

    The probability is rounded to a multiple of 1/65,536.
    """
    drawn = torch.empty(-(-hidden.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = drawn.view(torch.int16)[: hidden.numel()].view(hidden.shape) >= _dropped_of_65536(probability) - 2**15
    return (hidden * mask).mul_(dropout_factor(probability, "cpu")), mask


def drops_by_bits(device_type: str) -> bool:
    """True if `dropout_by_bits` is faster and usable; torch.compile cannot trace in-place random draws."""
    return device_type == "cpu" and not torch.compiler.is_compiling()


def dropout_factor(probability: float, device_type: str) -> float:
    """The scale of kept values on such a device."""
    by_bits = drops_by_bits(device_type)
    return 2**16 / (2**16 - _dropped_of_65536(probability)) if by_bits else 1.0 / (1.0 - probability)


def _dropped_of_65536(probability: float) -> int:
    return min(round(probability * 2**16), 2**16 - 1)
