"""The full trained state: float32 weights and Adam's moments by name, from every rank's share on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class OptimizerState:
    """Float32 weights and Adam's moments by name, and how many updates Adam has counted."""

    weights: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    adam_steps: int


@dataclass(frozen=True)
class GatheredState:
    """Every rank's flat shares on the host, in memory of their own: a thread may work on them while training goes on.

    It holds no module, engine or GPU tensor, and calling it touches none.
    """

    weights: list[torch.Tensor]  # one share a rank, float32 [values], all equally long
    exp_avg: list[torch.Tensor]
    exp_avg_sq: list[torch.Tensor]
    adam_steps: int
    shapes: dict[str, torch.Size]  # of the trained parameters, in the module's order
    by_parameter: bool  # stage 3 cuts each parameter into equal parts, padded; the others cut all of them as one

    def __call__(self) -> OptimizerState:
        """The full tensors, each in memory of its own."""
        weights, exp_avg, exp_avg_sq = map(self._full, (self.weights, self.exp_avg, self.exp_avg_sq))
        return OptimizerState(weights, exp_avg, exp_avg_sq, self.adam_steps)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The weights only."""
        return self._full(self.weights)

    def _full(self, shares: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        full, at = {}, 0
        for name, shape in self.shapes.items():
            size = shape.numel()
            if self.by_parameter:
                part = -(-size // len(shares))
                value = torch.cat([share[at : at + part] for share in shares])[:size]
                at += part
            else:
                value = _span(shares, at, size)
                at += size
            full[name] = value.view(shape)
        return full


def _span(shares: list[torch.Tensor], start: int, length: int) -> torch.Tensor:
    """`length` values from `start` of the concatenation of equally long shares, in memory of its own."""
    size = len(shares[0])
    ends = [(max(0, start - i * size), max(0, start + length - i * size)) for i in range(len(shares))]
    return torch.cat([share[first:last] for share, (first, last) in zip(shares, ends, strict=True)])
