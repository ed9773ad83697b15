"""Named numbers of a micro-batch and of an optimizer step, flattened to one list for a collective.

To add a number from the model: add a field to `loss.HeadSums`, set it in `head_sums` there and in
`model/fused_head.py`, add a field of the same name to `HeadTotals` here, and name it in `report/metrics.py`. It must be
a sum or a count, never a mean. Each class is a dataclass of floats, lists of floats and such classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch

from .loss import HeadSums, LossWeights, mean_losses

P = TypeVar("P", bound="Packed")


@dataclass
class Packed:
    """A dataclass that can be flattened for a collective and restored."""

    def pack(self) -> list[float]:
        """All values, in field order."""
        flat: list[float] = []
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Packed):
                flat += value.pack()
            elif isinstance(value, list):
                flat += map(float, value)
            else:
                flat.append(float(value))
        return flat

    def unpack(self: P, flat: list[float]) -> P:
        """Inverse of `pack`, with lists as long as this object's.

        Raises:
            ValueError: another number of values.
        """
        if len(flat) != len(self.pack()):
            raise ValueError(f"{len(flat)} values for a {type(self).__name__} of {len(self.pack())}")
        return self._filled(iter(flat))

    def _filled(self: P, values: Iterator[float]) -> P:
        def like(own: Any) -> Any:
            if isinstance(own, Packed):
                return own._filled(values)
            return [next(values) for _ in own] if isinstance(own, list) else next(values)

        return type(self)(**{f.name: like(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def total(cls, parts: list[P]) -> P:
        """Elementwise sum over `parts`, of which there is at least one."""
        return parts[0].unpack([sum(column) for column in zip(*(part.pack() for part in parts), strict=True)])


H = TypeVar("H", bound="HeadTotals")


@dataclass(kw_only=True)
class HeadTotals(Packed):
    """The additive part of `HeadSums`, over micro-batches and ranks."""

    text_sum: float
    text_count: float
    codebook_sums: list[float]
    codebook_counts: list[float]

    @classmethod
    def empty(cls: type[H], num_codebooks: int) -> H:
        """All zeros; lists have one value per codebook."""
        zeros: dict[str, Any] = {f.name: [0.0] * num_codebooks if f.type == "list[float]" else 0.0 for f in fields(cls)}
        return cls(**zeros)

    def losses(self, weights: LossWeights) -> dict[str, float]:
        """Mean losses of these sums."""
        return mean_losses(weights, self.text_sum, self.text_count, self.codebook_sums, self.codebook_counts)


@dataclass(kw_only=True)
class MicroBatchStats(HeadTotals):
    """Numbers of one micro-batch's forward, on the host; see `HeadSums`. `empty` unpacks `on_device`."""

    text_saturation: float
    loss: float  # scaled, for backward

    @staticmethod
    def on_device(sums: HeadSums, loss: torch.Tensor) -> torch.Tensor:
        """The flat values on the device, without synchronisation: float32, detached."""
        values = [loss if f.name == "loss" else getattr(sums, f.name) for f in fields(MicroBatchStats)]
        return torch.cat([value.detach().float().reshape(-1) for value in values])

    @staticmethod
    def unknown(loss: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        """NaN for every value, on the loss's device; for a forward with invalid outputs."""
        return loss.new_full((len(MicroBatchStats.empty(num_codebooks).pack()),), float("nan")).detach()


@dataclass
class ForwardReport:
    """Shapes of one micro-batch's forward, known on the host without a device sync."""

    expanded_labels_shape: tuple[int, ...] | None = None
    audio_logits_shape: tuple[int, ...] | None = None
    path: str = "expanded_labels"  # or "re-expanded", or "collator" with the padding-free forward
    problems: list[tuple[str, str]] = field(default_factory=list)  # (check, what was found)


@dataclass
class LabelCounts(Packed):
    """Counts to be summed over the ranks before the first forward of an optimizer step."""

    failures: float  # checks that a batch did not pass
    text: float
    codebooks: list[float]

    @classmethod
    def from_batches(cls, batches: list, failures: int, num_codebooks: int) -> LabelCounts:
        """Counts of this rank's batches; zero labels if a check failed, since the step will be dropped."""
        counts = cls(failures, 0.0, [0.0] * num_codebooks)
        for batch in batches if not failures else []:
            counts.text += batch.text_count
            for k, count in enumerate(batch.codebook_counts):
                counts.codebooks[k] += count
        return counts


@dataclass(kw_only=True)
class StepSums(HeadTotals):
    """One rank's share of an optimizer step; additive over micro-batches and ranks."""

    tokens: float  # non-padding positions
    re_expanded: float  # micro-batches whose labels had to be re-expanded

    def add(self, stats: MicroBatchStats, *, tokens: int, re_expanded: bool) -> None:
        """Adds one micro-batch."""
        self.tokens += tokens
        self.re_expanded += re_expanded
        for f in fields(HeadTotals):
            so_far, more = getattr(self, f.name), getattr(stats, f.name)
            if isinstance(so_far, list):
                setattr(self, f.name, [a + b for a, b in zip(so_far, more, strict=True)])
            else:
                setattr(self, f.name, so_far + more)

    @property
    def audio_frames(self) -> float:
        """Trained audio frames: the labels of the codebook with most labels."""
        return max(self.codebook_counts)


@dataclass
class RankStep(Packed):
    """A rank's report on an optimizer step, exchanged once after the backward."""

    failures: float  # checks that failed in this step
    gradients: list[float]  # count and order checksum, see `Engine.gradient_order`
    stop: float  # 1 if this rank was asked to stop
    save_due: float  # 1 if rank 0's timer wants a checkpoint
    step_sec: float  # see `metrics.StepClock`
    data_sec: float
    peak_gib: float
    reserved_gib: float
    honest_zeros: float  # since the run began
    failed: list[float]  # since the run began, by check, in the order of `guard.CHECKS`
    sums: StepSums
