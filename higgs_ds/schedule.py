"""Learning rate as a function of the step alone, so that resuming needs no state."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_ratio: float, shape: str) -> float:
    """Learning rate of optimizer step `step` (1-based): linear warm-up to `peak`, then `shape` down towards 0.

    `shape` is "cosine", "linear" or "constant".
    """
    warmup = math.ceil(total_steps * warmup_ratio)
    if step <= warmup:
        return peak * step / warmup
    if shape == "constant":
        return peak
    progress = (step - warmup - 1) / max(1, total_steps - warmup)
    if shape == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
