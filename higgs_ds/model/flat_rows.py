"""Rotary embedding and attention on flat rows, for any family; indices come from `BatchIndex`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..batching.batch_index import BatchIndex


def causal_attention(heads: tuple[torch.Tensor, ...], index: BatchIndex, *, dropout: float = 0.0) -> torch.Tensor:
    """Causal self-attention within each sequence: query, key, value [places, heads, head_dim] -> [places, hidden]

    Padding is on the right, so that the causal mask alone hides it.
    """
    shape = (index.num_sequences, index.longest, -1, heads[0].shape[-1])
    query, key, value = (part.view(shape).transpose(1, 2) for part in heads)  # [batch, heads, longest, head_dim]
    # Half-precision kernels support grouped key heads; in float32 only the slow kernel does.
    shares = query.is_cuda and query.dtype != torch.float32
    if not shares:
        key, value = (_repeat_heads(part, query.shape[1] // key.shape[1]) for part in (key, value))
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        enable_gqa=shares,
    )
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


class Rotate(torch.autograd.Function):
    """Rotary position embedding on the two halves of a head. [N, heads, head_dim]

    Writes in place, where autograd would allocate five tensors each way; the backward rotates the gradient back.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        sin_first, sin_second = sin.chunk(2, dim=-1)
        first, second = rows.chunk(2, dim=-1)
        rotated = rows * cos
        to_first, to_second = rotated.chunk(2, dim=-1)
        to_first.addcmul_(second, sin_first, value=-1)
        to_second.addcmul_(first, sin_second)
        return rotated

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        sin_first, sin_second = sin.chunk(2, dim=-1)
        first, second = grad.chunk(2, dim=-1)
        rotated = grad * cos
        to_first, to_second = rotated.chunk(2, dim=-1)
        to_first.addcmul_(second, sin_second)
        to_second.addcmul_(first, sin_first, value=-1)
        return rotated, None, None


def _repeat_heads(states: torch.Tensor, times: int) -> torch.Tensor:
    """[batch, key heads, length, head_dim] -> [batch, key heads × times, length, head_dim]"""
    return states if times == 1 else states.repeat_interleave(times, dim=1)


class RowsToSequences(torch.autograd.Function):
    """Flat rows to padded places. Padding has no gradient, so that the backward is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, pack_index: torch.Tensor, unpack_index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(unpack_index)
        return rows.index_select(0, pack_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (unpack_index,) = ctx.saved_tensors
        return grad.index_select(0, unpack_index), None, None


class SequencesToRows(torch.autograd.Function):
    """Padded places to flat rows, dropping padding, whose gradient is zero."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, unpack_index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(unpack_index)
        ctx.num_places = places.shape[0]
        return places.index_select(0, unpack_index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (unpack_index,) = ctx.saved_tensors
        places = grad.new_zeros((ctx.num_places, *grad.shape[1:]))
        return places.index_copy_(0, unpack_index, grad), None
