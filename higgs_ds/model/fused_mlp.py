"""Norms and gated networks that keep less for the backward and pass over memory less often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .fused_lora import Group, Update


class FusedRmsNorm(LlamaRMSNorm):
    """The norm by torch's one kernel. Upstream's keeps two float32 copies of its input, and rounds twice in bf16."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def adopt(model: nn.Module, ours: type[nn.Module]) -> int:
    """Turns modules of upstream's class, which `ours` extends, into `ours`, in place; returns how many there are.

    Weights, names and ZeRO-3's gathering stay. Other classes that extend upstream's are left as they are.
    """
    for module in model.modules():
        if type(module) is ours.__base__:
            module.__class__ = ours
    return sum(isinstance(module, ours) for module in model.modules())


class GatedNetwork(NamedTuple):
    """down(silu(gate(x)) × up(x)), computed without autograd. What gate and up give is kept, their product is not."""

    opening: Group  # gate and up
    closing: Group  # down

    @classmethod
    def of(cls, network: nn.Module) -> GatedNetwork | None:
        """None for whatever is not exactly upstream's, with its projections frozen but for LoRA."""
        if type(network) is not LlamaMLP or not isinstance(network.act_fn, nn.SiLU):
            return None
        groups = Group.of([network.gate_proj, network.up_proj]), Group.of([network.down_proj])
        return None if None in groups else cls(*groups)

    @property
    def trained(self) -> list[torch.Tensor]:
        """The weights of LoRA, in the order of the gradients that `backward` gives."""
        return [*self.opening.trained, *self.closing.trained]

    def forward(self, rows: torch.Tensor, onto: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """`onto` plus what it makes of the rows, see `add_product`, and what `backward` needs. [rows, hidden]"""
        (gate, up), opened = self.opening.forward(rows)
        (out,), closed = self.closing.forward(F.silu(gate).mul_(up), onto=[onto])
        return out, (gate, up, *opened, *closed)

    def backward(
        self, gradient: torch.Tensor, rows: torch.Tensor, kept: tuple, into: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Gradients of `trained`; the one of the rows is written to `into`, if given."""
        gate, up, *updates = kept
        opened, closed = Update(*updates[:2]), Update(*updates[2:])
        activated = F.silu(gate)
        of_product, of_closing = self.closing.backward([gradient], activated * up, closed)
        of_gate = torch.ops.aten.silu_backward(of_product * up, gate)
        of_up = activated.mul_(of_product)
        _, of_opening = self.opening.backward([of_gate, of_up], rows, opened, of_rows=into is not None, into=into)
        return [*of_opening, *of_closing]


def add_networks(
    networks: Sequence[nn.Module], rows: torch.Tensor, onto: torch.Tensor, sizes: Sequence[int]
) -> torch.Tensor:
    """`onto` plus what each gated network makes of its slice of the rows. [rows, hidden]

    Args:
        networks: upstream's `LlamaMLP`, with LoRA or without; where one is something else, they compute themselves.
        sizes: how many rows are each network's, in order.
    """
    gated = [GatedNetwork.of(network) for network in networks]
    if None in gated:
        return onto + torch.cat([network(part) for network, part in zip(networks, rows.split(sizes), strict=True)])
    return _AddedNetworks.apply(rows, onto, gated, sizes, *(weight for network in gated for weight in network.trained))


class _AddedNetworks(torch.autograd.Function):
    """Gated networks, each on its slice of the rows, and the sum with `onto`."""

    @staticmethod
    def forward(ctx, rows, onto, networks, sizes, *trained):
        sums, outs, kept = onto.clone(), [], []
        for network, part, target in zip(networks, rows.split(sizes), sums.split(sizes), strict=True):
            out, needed = network.forward(part, target)
            outs.append(out)
            kept.append(needed)
        ctx.save_for_backward(rows, *(tensor for needed in kept for tensor in needed))
        ctx.networks, ctx.sizes = networks, sizes
        return torch.cat(outs) if torch.compiler.is_compiling() else sums

    @staticmethod
    def backward(ctx, gradient):
        rows, *kept = ctx.saved_tensors
        of_rows, of_trained = torch.empty_like(rows) if ctx.needs_input_grad[0] else None, []
        targets = [None] * len(ctx.sizes) if of_rows is None else of_rows.split(ctx.sizes)
        each = len(kept) // len(ctx.networks)
        needed = [kept[first : first + each] for first in range(0, len(kept), each)]
        slices = gradient.split(ctx.sizes), rows.split(ctx.sizes), needed, targets
        for network, *given in zip(ctx.networks, *slices, strict=True):
            of_trained += network.backward(*given)
        return of_rows, gradient, None, None, *of_trained
