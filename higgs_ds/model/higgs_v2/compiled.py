"""Decoder layers by torch.compile: one program for all layers up to attention, and one from there on.

Attention's own kernel stays between them, and with it everything that counts sequences. So a micro-batch of one row
needs no program of its own, and neither does the last layer, which goes on with fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._dynamo
import torch.fx.experimental._config

from ..fused_mlp import adopt
from .layers import DecoderLayer

# Two sizes that are equal in the first micro-batch need not be so in the next.
torch.fx.experimental._config.use_duck_shape = False
# A program for each set of projections with LoRA that some layer has; above the limit torch raises.
torch._dynamo.config.recompile_limit = 64
# LoRA's scaling and the like are the same in all layers. Taken for sizes at first, they would have all compiled twice.
torch._dynamo.config.specialize_float = True


def programs(backend: str | Callable = "inductor") -> dict[str, Callable]:
    """By the name of the method that each computes; nothing is compiled before the first call."""
    methods = (DecoderLayer.before_attention, DecoderLayer.after_attention)
    return {m.__name__: torch.compile(m, backend=backend, dynamic=True, fullgraph=True) for m in methods}


class CompiledDecoderLayer(DecoderLayer):
    """The layer through these programs where it trains on text and audio; validation computes as without them."""

    programs = programs()

    def before_attention(self, hidden, num_text, *rest):
        compute = self.programs["before_attention"] if _pays(hidden, num_text) else DecoderLayer.before_attention
        return compute(self, hidden, num_text, *rest)

    def after_attention(self, hidden, attended, num_text):
        compute = self.programs["after_attention"] if _pays(hidden, num_text) else DecoderLayer.after_attention
        return compute(self, hidden, attended, num_text)


def _pays(hidden: torch.Tensor, num_text: int) -> bool:
    """Slices of 0 or 1 row would each be compiled anew, and so would a forward that has no backward."""
    return torch.is_grad_enabled() and min(num_text, hidden.shape[0] - num_text) >= 2


def compile_layers(forward) -> None:
    """Has a `TrainingForward`'s layers compute through the programs, which are made when they are first needed."""
    adopt(forward.model, CompiledDecoderLayer)
    # The first layer's input has a gradient then as the others' has, and so their program.
    forward.input_gradient = True
