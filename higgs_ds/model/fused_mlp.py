"""Norms and gated feed-forward networks with fewer saved tensors and fewer passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .fused_lora import ProjectionGroup, SavedLora


class FusedRmsNorm(LlamaRMSNorm):
    """RMS norm by torch's fused kernel; upstream's saves two float32 copies of its input and rounds twice in bf16."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def adopt(model: nn.Module, ours: type[nn.Module]) -> int:
    """Changes modules of exactly upstream's class, the base of `ours`, to `ours` in place; returns their number.

    Weights, names and ZeRO-3's gathering stay as they are.
    """
    for module in model.modules():
        if type(module) is ours.__base__:
            module.__class__ = ours
    return sum(isinstance(module, ours) for module in model.modules())


class GatedMlp(NamedTuple):
    """down(silu(gate(x)) × up(x)), computed without autograd; saves the outputs of gate and up, not their product."""

    gate_up: ProjectionGroup
    down: ProjectionGroup

    @classmethod
    def from_module(cls, mlp: Any) -> GatedMlp | None:
        """None if the module is not exactly upstream's, or if a projection trains other than by LoRA."""
        if type(mlp) is not LlamaMLP or not isinstance(mlp.act_fn, nn.SiLU):
            return None
        gate_up = ProjectionGroup.from_layers([mlp.gate_proj, mlp.up_proj])
        down = ProjectionGroup.from_layers([mlp.down_proj])
        return None if gate_up is None or down is None else cls(gate_up, down)

    @property
    def lora_weights(self) -> list[torch.Tensor]:
        """In the order of the gradients from `backward`."""
        return [*self.gate_up.lora_weights, *self.down.lora_weights]

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """`residual` plus the network's output, see `add_product`, and the tensors for `backward`. [rows, hidden]"""
        (gate, up), saved_gate_up = self.gate_up.forward(hidden)
        (output,), saved_down = self.down.forward(F.silu(gate).mul_(up), residuals=[residual])
        return output, (gate, up, *saved_gate_up, *saved_down)

    def backward(
        self, grad_output: torch.Tensor, hidden: torch.Tensor, saved: tuple, out: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Gradients of `lora_weights`; that of the hidden states is written to `out`, if given."""
        gate, up, *saved_lora = saved
        saved_gate_up, saved_down = SavedLora(*saved_lora[:2]), SavedLora(*saved_lora[2:])
        activated = F.silu(gate)
        grad_product, grad_down = self.down.backward([grad_output], activated * up, saved_down)
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        grad_up = activated.mul_(grad_product)
        _, grad_gate_up = self.gate_up.backward(
            [grad_gate, grad_up], hidden, saved_gate_up, needs_grad_hidden=out is not None, out=out
        )
        return [*grad_gate_up, *grad_down]


def add_mlps(
    mlps: Sequence[nn.Module], hidden: torch.Tensor, residual: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """`residual` plus each network's output on its slice of the hidden states. [rows, hidden]

    Args:
        mlps: upstream's `LlamaMLP`, with or without LoRA; if one is anything else, all run their own forward.
        sizes: number of rows of each network, in order.
    """
    gated: list[Any] = [GatedMlp.from_module(mlp) for mlp in mlps]
    if None in gated:
        return residual + torch.cat([mlp(part) for mlp, part in zip(mlps, hidden.split(sizes), strict=True)])
    return _AddMlps.apply(hidden, residual, gated, sizes, *(weight for mlp in gated for weight in mlp.lora_weights))


class _AddMlps(torch.autograd.Function):
    """Gated networks, each on its slice of rows, added to the residual."""

    @staticmethod
    def forward(ctx, hidden, residual, mlps, sizes, *lora_weights):
        sums, outputs, saved = residual.clone(), [], []
        for mlp, part, target in zip(mlps, hidden.split(sizes), sums.split(sizes), strict=True):
            output, needed = mlp.forward(part, target)
            outputs.append(output)
            saved.append(needed)
        ctx.save_for_backward(hidden, *(tensor for needed in saved for tensor in needed))
        ctx.mlps, ctx.sizes = mlps, sizes
        return torch.cat(outputs) if torch.compiler.is_compiling() else sums

    @staticmethod
    def backward(ctx, grad_output):
        hidden, *saved = ctx.saved_tensors
        grad_hidden, grad_lora_weights = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None, []
        targets = [None] * len(ctx.sizes) if grad_hidden is None else grad_hidden.split(ctx.sizes)
        each = len(saved) // len(ctx.mlps)
        needed = [saved[first : first + each] for first in range(0, len(saved), each)]
        slices = grad_output.split(ctx.sizes), hidden.split(ctx.sizes), needed, targets
        for mlp, *given in zip(ctx.mlps, *slices, strict=True):
            grad_lora_weights += mlp.backward(*given)
        return grad_hidden, grad_output, None, None, *grad_lora_weights
