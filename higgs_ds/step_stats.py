"""The numbers of a micro-batch and of an optimizer step, by name, and how they travel as one flat list.

A new number from the model: a field of `loss.HeadSums` with its values in `head_sums` there and in
`model/fused_head.py`, a field of the same name in `HeadTotals` here, its name in `report/metrics.py`. It has to be one
that adds up: a sum or a count, never a mean. Each class is a dataclass of floats, lists of floats and such
classes; flat, the fields follow each other in their order.
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
    """A dataclass that can be flattened for a collective and put together again."""

    def pack(self) -> list[float]:
        """All values in the order of the fields."""
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
        """The inverse of `pack`, for lists that are as long as this one's.

        Raises:
            ValueError: more or fewer values than this has.
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
        """Value by value the sum over `parts`, of which there is at least one."""
        return parts[0].unpack([sum(column) for column in zip(*(part.pack() for part in parts), strict=True)])


H = TypeVar("H", bound="HeadTotals")


@dataclass(kw_only=True)
class HeadTotals(Packed):
    """The part of `HeadSums` that adds up over micro-batches and ranks."""

    text_sum: float
    text_count: float
    codebook_sums: list[float]
    codebook_counts: list[float]

    @classmethod
    def empty(cls: type[H], num_codebooks: int) -> H:
        """Zeros; lists have a value a codebook."""
        zeros: dict[str, Any] = {f.name: [0.0] * num_codebooks if f.type == "list[float]" else 0.0 for f in fields(cls)}
        return cls(**zeros)

    def losses(self, weights: LossWeights) -> dict[str, float]:
        """Mean losses over what is summed here."""
        return mean_losses(weights, self.text_sum, self.text_count, self.codebook_sums, self.codebook_counts)


@dataclass(kw_only=True)
class MicroBatchStats(HeadTotals):
    """A training forward's numbers of one micro-batch, on the host; see `HeadSums`. `empty` unpacks `on_device`."""

    text_saturation: float
    loss: float  # the scaled one, for backward

    @staticmethod
    def on_device(sums: HeadSums, loss: torch.Tensor) -> torch.Tensor:
        """The flat values where they were computed, without waiting for them: float32, detached."""
        values = [loss if f.name == "loss" else getattr(sums, f.name) for f in fields(MicroBatchStats)]
        return torch.cat([value.detach().float().reshape(-1) for value in values])

    @staticmethod
    def unknown(loss: torch.Tensor, num_codebooks: int) -> torch.Tensor:
        """As many NaN, on the loss's device: of a forward whose outputs were not what they should be."""
        return loss.new_full((len(MicroBatchStats.empty(num_codebooks).pack()),), float("nan")).detach()


@dataclass
class ForwardReport:
    """Shapes that one micro-batch's forward saw, known on the host without reading a value from the device."""

    expanded_labels_shape: tuple[int, ...] | None = None
    audio_logits_shape: tuple[int, ...] | None = None
    path: str = "expanded_labels"  # or "re-expanded", or "collator" with the padding-free forward
    problems: list[tuple[str, str]] = field(default_factory=list)  # (check, what was found)


@dataclass
class LabelCounts(Packed):
    """Counts that are summed over the ranks before the first forward of an optimizer step."""

    failures: float  # checks that a batch did not pass
    text: float
    codebooks: list[float]

    @classmethod
    def from_batches(cls, batches: list, failures: int, num_codebooks: int) -> LabelCounts:
        """Of this rank's `Batch`es; where a check failed nothing is counted, since nothing will be trained."""
        counts = cls(failures, 0.0, [0.0] * num_codebooks)
        for batch in batches if not failures else []:
            counts.text += batch.text_count
            for k, count in enumerate(batch.codebook_counts):
                counts.codebooks[k] += count
        return counts


@dataclass(kw_only=True)
class StepSums(HeadTotals):
    """One rank's share of an optimizer step; all of it adds up over micro-batches and ranks."""

    tokens: float  # positions computed that are not padding
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
        """Audio frames that are learned: labels of the codebook that has most."""
        return max(self.codebook_counts)


@dataclass
class RankStep(Packed):
    """A rank's word to all others on an optimizer step, in the one exchange after its backward."""

    failures: float  # checks that failed in this step
    gradients: list[float]  # how many came, and a checksum of their order: see `Engine.gradient_order`
    stop: float  # 1 where this rank was asked to stop
    save_due: float  # 1 where rank 0's clock wants a checkpoint
    step_sec: float  # see `metrics.StepClock`
    data_sec: float
    peak_gib: float
    reserved_gib: float
    honest_zeros: float  # since the run began
    failed: list[float]  # since the run began, by check, in the order of `guard.CHECKS`
    sums: StepSums
