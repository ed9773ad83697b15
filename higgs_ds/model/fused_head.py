"""A head and its cross-entropy in one: labelled rows in, loss out, logits never in memory as a whole.

All that backward needs of a frozen head is the gradient of the hidden rows, of a trained one that of its weight too.
Both are made in the forward, chunk by chunk of rows, while the chunk's logits are at hand; backward scales them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..loss import IGNORE, HeadSums

CHUNK_BYTES = 96 * 2**20  # of the logits that one product makes, were they float32
BLOCK_BYTES = 4 * 2**20  # of the float32 logits that a CPU turns into a gradient at a time


@dataclass
class LabelledRows:
    """A question to a head: R rows, each with one target in each of G groups of classes (1 for text, codebooks)."""

    hidden: torch.Tensor  # [R, hidden]
    targets: torch.Tensor  # [R, G], -100 where a group has no label
    scales: torch.Tensor  # [G] float32, factors of the groups' sums in the loss


@dataclass
class HeadLoss:
    """A head's answer. Only `loss` is in the graph."""

    loss: torch.Tensor  # [] float32, Σ scales · sums
    sums: torch.Tensor  # [G] float32, cross-entropy in nats
    counts: torch.Tensor  # [G] int64, labels that the sums are over
    saturation: torch.Tensor  # [] float32, see `HeadSums`
    shape: tuple[int, int, int]  # (R, G, classes) that were computed


def head_sums_of(text: HeadLoss, audio: HeadLoss) -> HeadSums:
    """Both heads' answers, as `loss.head_sums` says it of their logits."""
    return HeadSums(
        text_sum=text.sums[0],
        text_count=text.counts[0],
        codebook_sums=audio.sums,
        codebook_counts=audio.counts,
        text_saturation=text.saturation,
    )


class FusedHead(nn.Linear):
    """A linear head that also gives the loss of `LabelledRows`, see `loss_of`; on a tensor alone it is `nn.Linear`."""

    trained = False  # whether its weight is, as `training_forward` found it

    @staticmethod
    def adopt(head: nn.Linear) -> None:
        """Turns a linear layer into this, in place: weight and name stay."""
        head.__class__ = FusedHead

    def loss_of(self, rows: LabelledRows) -> HeadLoss:
        """The head's answer.

        A frozen head's rows and loss come and go inside containers that DeepSpeed does not look into: under ZeRO-3 the
        weight is gathered for the forward by the module's own hook, and not again for a backward that does not need
        it. A trained one's do not: there it has to be whole when its gradient arrives.
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
            raise RuntimeError("a trained head that is taken for a frozen one would get no gradient")
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
        # The stored gradients are relative to the largest scale, so that fp16 can hold it whatever the counts are.
        largest = scales.max().clamp(min=torch.finfo(torch.float32).tiny)
        shares = scales / largest
        gradient = torch.empty_like(hidden) if wants_gradient else None
        of_weight = None
        wanted = shares if wants_gradient or wants_weight else None
        row_bytes = 4 * weight.shape[0]
        chunks = _chunks(rows, CHUNK_BYTES // row_bytes)
        for start, stop in chunks:
            raw = F.linear(hidden[start:stop], weight).view(stop - start, groups, -1)  # [r, G, classes]
            # A GPU takes the chunk at once; a CPU in blocks that its cache keeps from one pass to the next.
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
            of_weight = torch.zeros_like(weight)  # no row, and a rank's part in every collective all the same
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
            of_weight = of_weight.mul_(factor).to(ctx.weight_dtype)  # in place: it may be as large as the text head
        return gradient, of_weight, None, None, None, None


def _add_product(total: torch.Tensor | None, raw: torch.Tensor, hidden: torch.Tensor, *, more: bool) -> torch.Tensor:
    """total + rawᵀ · hidden, [classes, hidden]: the chunks' products (`more` of them than one) add up in float32.

    So does fp16's one product: relative to the largest scale, a sum over rows may be more than fp16 holds.
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
    """Cross-entropy in float32, 0 without a label, and float32's resolution at the label's logit: [r, G] each.

    With `shares` [G], the factors of the groups, `logits` [r, G, classes] become the gradient of the shared sum.
    """
    labelled = target != IGNORE
    index = target.clamp(min=0).unsqueeze(-1)
    odds = logits.float()  # the same memory where it is float32 already
    label = odds.gather(-1, index).squeeze(-1)
    top = odds.amax(-1)
    odds.sub_(top.unsqueeze(-1)).exp_().scatter_(-1, index, 0.0)
    others = odds.sum(-1)  # [r, G], all classes but the label's
    margin = label - top
    # log(1 + others / own): exact also where the probability of the label rounds to 1.
    losses = F.softplus(others.log() - margin).masked_fill(~labelled, 0.0)
    if shares is not None:
        odds.scatter_(-1, index, -others.unsqueeze(-1))  # softmax minus one-hot, times its denominator
        odds.mul_((shares * labelled / (others + margin.exp())).unsqueeze(-1))
        if odds.dtype != logits.dtype:
            logits.copy_(odds)
    return losses, torch.finfo(torch.float32).eps * label.abs().clamp(min=1.0)


def _chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(start, stop) of chunks of about equal size, none above `most` rows."""
    if rows == 0:
        return []
    number = -(-rows // max(1, most))
    size = -(-rows // number)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
