"""Norms and feed-forward networks that keep less for the backward and pass over memory less often.

Upstream's own modules change their class in place: weights, names and ZeRO-3's gathering by module stay what they were.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm


class FusedRmsNorm(LlamaRMSNorm):
    """The norm by torch's one kernel. Upstream's keeps two float32 copies of its input, and rounds twice in bf16."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class FusedMlp(LlamaMLP):
    """The gated network whose activation is computed again in the backward instead of kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))


class _SwiGlu(torch.autograd.Function):
    """silu(gate) × up, operation for operation as autograd has it, so that the gradients are the same to the bit."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        # Not in place: torch 2.11's compiler loses the gradient of a Function that gives back what it has changed.
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def adopt_layers(model: nn.Module) -> int:
    """Turns upstream's norms and gated networks into these, in place; returns how many.

    Only those of exactly these classes and activation: another transformers' others are left as they are.
    """
    adopted = 0
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = FusedRmsNorm
        elif type(module) is LlamaMLP and isinstance(module.act_fn, nn.SiLU):
            module.__class__ = FusedMlp
        adopted += isinstance(module, FusedRmsNorm | FusedMlp)
    return adopted
