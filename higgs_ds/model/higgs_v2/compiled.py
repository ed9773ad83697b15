"""Decoder layers under torch.compile: one program for the part before attention, one for the part after it.

Attention runs between them, uncompiled, as the only part that depends on the number of sequences. So a micro-batch of
one row needs no program of its own, nor does the last layer, which continues with fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo
import torch.fx.experimental._config

from ..fused_mlp import adopt
from .layers import DecoderLayer

# Two sizes that happen to be equal in the first micro-batch may differ in the next.
torch.fx.experimental._config.use_duck_shape = False
# One program for each combination of projections with LoRA; torch raises above this limit.
torch._dynamo.config.recompile_limit = 64
# LoRA's scaling is the same in all layers; treated as dynamic, it would compile every layer twice.
torch._dynamo.config.specialize_float = True


def programs(backend: str | Callable = "inductor") -> dict[str, Callable]:
    """Compiled methods by name; nothing is compiled before the first call."""
    methods = (DecoderLayer.before_attention, DecoderLayer.after_attention)
    return {m.__name__: torch.compile(m, backend=backend, dynamic=True, fullgraph=True) for m in methods}


class CompiledDecoderLayer(DecoderLayer):
    """A decoder layer that uses the compiled programs when it trains on text and audio; validation runs eagerly."""

    programs = programs()

    def before_attention(self, hidden, num_text, *rest):
        compute = self.programs["before_attention"] if _pays(hidden, num_text) else DecoderLayer.before_attention
        return compute(self, hidden, num_text, *rest)

    def after_attention(self, hidden, attended, num_text):
        compute = self.programs["after_attention"] if _pays(hidden, num_text) else DecoderLayer.after_attention
        return compute(self, hidden, attended, num_text)


def _pays(hidden: torch.Tensor, num_text: int) -> bool:
    """False for slices of 0 or 1 row and for a forward without backward, each of which would be recompiled."""
    return torch.is_grad_enabled() and min(num_text, hidden.shape[0] - num_text) >= 2


def compile_layers(forward) -> None:
    """Switches a `TrainingForward`'s layers to the compiled programs, compiled on first use."""
    adopt(forward.model, CompiledDecoderLayer)
    # Gives the first layer's input a gradient like the others', so that it shares their program.
    forward.input_gradient = True
