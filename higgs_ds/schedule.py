"""Learning rate as a function of the step alone, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_ratio: float | None, shape: str, warmup_steps: int | None = None
) -> float:
    """Learning rate of optimizer step `step` (1-based): linear warm-up to `peak`, then `shape` down towards 0.

    Args:
        total_steps: of the schedule; steps after it have the rate of its last one.
        warmup_ratio: share of the schedule that warms up, where `warmup_steps` does not say it.
        shape: "cosine", "linear" or "constant".
    """
    if warmup_steps is None:
        assert warmup_ratio is not None, "one of the two is given"
        warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if shape == "constant":
        return peak
    progress = max(0, min(step, total_steps) - warmup_steps - 1) / max(1, total_steps - warmup_steps)
    if shape == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def schedule(settings: Mapping[str, Any], run_steps: int) -> partial[float]:
    """The learning rate of a run by its step.

    Args:
        settings: options by their flags' names, a checkpoint's or this run's.
        run_steps: optimizer steps of the run, which the schedule spans where no option says otherwise.
    """
    return partial(
        learning_rate,
        peak=settings["lr"],
        total_steps=settings.get("lr_schedule_steps") or run_steps,
        warmup_ratio=settings["warmup_ratio"],
        warmup_steps=settings.get("warmup_steps"),  # older checkpoints had no such options
        shape=settings["lr_scheduler"],
    )


def jump(saved: Mapping[str, Any], saved_steps: int, now: Mapping[str, Any], steps: int, done: int) -> list[str]:
    """A line if a resumed run goes on with another learning rate than the run before would have: from where to where.

    Args:
        saved: the checkpoint's options by their flags' names; `saved_steps`: the optimizer steps of its run.
        now: this run's options; `steps`: its optimizer steps.
        done: optimizer steps that are done.
    """
    before, after = schedule(saved, saved_steps), schedule(now, steps)
    if math.isclose(before(done + 1), after(done + 1), rel_tol=0.01):
        return []
    spanned = before.keywords["total_steps"]
    line = f"WARNING: the learning rate goes from {before(done):.2g} in step {done} to {after(done + 1):.2g}"
    if spanned == after.keywords["total_steps"]:
        return [line]
    return [
        f"{line}, since its schedule spans {after.keywords['total_steps']} steps and spanned {spanned}; "
        f"--lr_schedule_steps {spanned} keeps the old one ({before(done + 1):.2g})"
    ]
