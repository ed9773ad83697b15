"""The optimizer of a run."""

from __future__ import annotations

import math

import torch


class DroppableAdamW(torch.optim.AdamW):
    """AdamW whose next step can be dropped: moments and weights stay, the engine clears the gradients as always.

    The same at every ZeRO stage, without reaching into how each of them keeps gradients. With `clip_norm` it clips
    and reports the norm itself, for stage 0 in float32, where DeepSpeed does not report one.
    """

    drop_next = False
    clip_norm: float | None = None
    norm: float | None = None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The tensors that it steps, in order; at stages 1 and 2 this rank's partition of everything, as one."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        if self.drop_next:
            return None
        if self.clip_norm is not None:
            limit = self.clip_norm or float("inf")
            self.norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
            if not math.isfinite(self.norm):
                return None
        return super().step(closure)
