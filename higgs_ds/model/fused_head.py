"""A head fused with its cross-entropy: labelled rows in, loss out, without materialising all logits.

The backward needs the gradient of the hidden rows and, for a trained head, of its weight. The forward computes both
chunk by chunk, while the chunk's logits exist; the backward only scales them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..loss import IGNORE, HeadSums

CHUNK_BYTES = 96 * 2**20  # logits of a chunk, as float32
BLOCK_BYTES = 4 * 2**20  # float32 logits that a CPU processes at a time


@dataclass
class LabelledRows:
    """Input of a head: R rows with one target in each of G groups of classes (1 for text; the codebooks)."""

    hidden: torch.Tensor  # [R, hidden]
    targets: torch.Tensor  # [R, G], -100 for no label
    scales: torch.Tensor  # [G] float32, factors of the groups' sums in the loss


@dataclass
class HeadLoss:
    """Output of a head. Only `loss` is in the graph."""

    loss: torch.Tensor  # [] float32, Σ scales · sums
    sums: torch.Tensor  # [G] float32, cross-entropy in nats
    counts: torch.Tensor  # [G] int64, number of labels
    saturation: torch.Tensor  # [] float32, see `HeadSums`
    shape: tuple[int, int, int]  # (R, G, classes) of the computed logits


def head_sums_of(text: HeadLoss, audio: HeadLoss) -> HeadSums:
    """Combines both heads' outputs, like `loss.head_sums` from logits."""
    return HeadSums(
        text_sum=text.sums[0],
        text_count=text.counts[0],
        codebook_sums=audio.sums,
        codebook_counts=audio.counts,
        text_saturation=text.saturation,
    )


class FusedHead(nn.Linear):
    """A linear head that can also compute the loss of `LabelledRows`; called with a tensor it is `nn.Linear`."""

    trained = False  # set by `training_forward` if its weight trains

    @staticmethod
    def adopt(head: nn.Linear) -> None:
        """Changes a linear layer's class in place, keeping weight and name."""
        head.__class__ = FusedHead

    def loss_of(self, rows: LabelledRows) -> HeadLoss:
        """Computes loss and sums of labelled rows.

        A frozen head hides its tensors in containers that DeepSpeed's hooks do not inspect, so that ZeRO-3 gathers the
        weight for the forward but not for the backward, which does not need it. A trained head passes plain tensors, as
        its weight must be whole when its gradient arrives.
        """
        if not self.trained:
            (answer,) = self(rows)
            return answer
        loss, answer = self(rows.hidden, rows)
        return replace(answer, loss=loss)

    def forward(self, hidden: torch.Tensor | LabelledRows, rows: LabelledRows | None = None):
        """[R, hidden] -> logits, or with rows `(HeadLoss,)`, or with both `(loss, HeadLoss)`: see `loss_of`."""
        seen = rows is not None
        if isinstance(hidden, LabelledRows):
            rows, hidden = hidden, hidden.hidden
        elif rows is None:
            return super().forward(hidden)
        if self.weight.requires_grad and not seen:
            raise RuntimeError("a trained head treated as frozen would get no gradient")
        if self.bias is not None:
            raise RuntimeError("the fused loss covers heads without a bias; use --loss_impl reference")
        wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, self.weight)]
        loss, sums, counts, saturation = _FusedCrossEntropy.apply(
            hidden, self.weight, rows.targets, rows.scales, *wanted
        )
        groups = rows.targets.shape[1]
        shape = (hidden.shape[0], groups, self.weight.shape[0] // groups)
        answer = HeadLoss(loss, sums, counts, saturation, shape)
        return (loss, answer) if seen else (answer,)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scales, wants_gradient, wants_weight):
        rows, groups = targets.shape
        sums = scales.new_zeros(groups)
        saturation = scales.new_zeros(())
        # Stored gradients are relative to the largest scale, so that fp16 can hold them for any label count.
        largest = scales.max().clamp(min=torch.finfo(torch.float32).tiny)
        shares = scales / largest
        gradient = torch.empty_like(hidden) if wants_gradient else None
        of_weight = None
        wanted = shares if wants_gradient or wants_weight else None
        row_bytes = 4 * weight.shape[0]
        chunks = _chunks(rows, CHUNK_BYTES // row_bytes)
        for start, stop in chunks:
            raw = F.linear(hidden[start:stop], weight).view(stop - start, groups, -1)  # [r, G, classes]
            # A GPU takes the chunk at once; a CPU in blocks that stay in its cache between passes.
            for first, last in _chunks(stop - start, (CHUNK_BYTES if raw.is_cuda else BLOCK_BYTES) // row_bytes):
                block, target = raw[first:last], targets[start + first : start + last]
                losses, resolution = _cross_entropy_and_gradient(block, target, wanted)
                sums += losses.sum(0)
                saturation = torch.maximum(saturation, (losses / resolution).max())
            raw = raw.view(stop - start, -1)
            if wants_gradient:
                torch.mm(raw, weight, out=gradient[start:stop])
            if wants_weight:
                of_weight = _add_product(of_weight, raw, hidden[start:stop], more=len(chunks) > 1)
        if wants_weight and of_weight is None:
            of_weight = torch.zeros_like(weight)  # without rows, this rank still takes part in the collectives
        counts = (targets != IGNORE).sum(0)
        ctx.save_for_backward(gradient, of_weight, largest)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(sums, counts, saturation)
        return (scales * sums).sum(), sums, counts, saturation

    @staticmethod
    def backward(ctx, loss_gradient, *_):
        gradient, of_weight, largest = ctx.saved_tensors
        factor = loss_gradient * largest
        if gradient is not None:
            gradient = (gradient.float() * factor).to(gradient.dtype)
        if of_weight is not None:
            of_weight = of_weight.mul_(factor).to(ctx.weight_dtype)  # in place, as it may be as large as the text head
        return gradient, of_weight, None, None, None, None


def _add_product(total: torch.Tensor | None, raw: torch.Tensor, hidden: torch.Tensor, *, more: bool) -> torch.Tensor:
    """total + rawᵀ · hidden, [classes, hidden]; several chunks (`more`) are summed in float32.

    fp16 is always multiplied in float32, since a sum over rows may exceed its range.
    """
    if hidden.dtype == torch.float16:
        raw, hidden = raw.float(), hidden.float()
    product = torch.mm(raw.t(), hidden)
    if total is None:
        return product.float() if more else product
    return total.add_(product)


def _cross_entropy_and_gradient(
    logits: torch.Tensor, target: torch.Tensor, shares: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in float32 (0 without a label) and float32's resolution at the label's logit: [r, G] each.

    With `shares` [G], the groups' factors, `logits` [r, G, classes] are overwritten with the gradient of the weighted
    sum.
    """
    labelled = target != IGNORE
    index = target.clamp(min=0).unsqueeze(-1)
    odds = logits.float()  # shares memory if it is float32 already
    label = odds.gather(-1, index).squeeze(-1)
    top = odds.amax(-1)
    odds.sub_(top.unsqueeze(-1)).exp_().scatter_(-1, index, 0.0)
    others = odds.sum(-1)  # [r, G], over all classes but the label's
    margin = label - top
    # log(1 + others / own), exact even if the label's probability rounds to 1.
    losses = F.softplus(others.log() - margin).masked_fill(~labelled, 0.0)
    if shares is not None:
        odds.scatter_(-1, index, -others.unsqueeze(-1))  # softmax minus one-hot, times its denominator
        odds.mul_((shares * labelled / (others + margin.exp())).unsqueeze(-1))
        if odds.dtype != logits.dtype:
            logits.copy_(odds)
    return losses, torch.finfo(torch.float32).eps * label.abs().clamp(min=1.0)


def _chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of about equal size and at most `most` rows."""
    if rows == 0:
        return []
    number = -(-rows // max(1, most))
    size = -(-rows // number)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
