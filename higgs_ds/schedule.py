"""Learning rate as a function of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def schedule(settings: Mapping[str, Any], run_steps: int) -> Callable[[int], float]:
    """The learning rate by optimizer step, from 1: linear warm-up to `lr`, then decay towards 0.

    Args:
        settings: options by flag name, of a checkpoint or of this run.
        run_steps: optimizer steps of the run, spanned by the schedule unless `lr_schedule_steps` is set; later steps
            keep its last rate.
    """
    peak, total_steps = settings["lr"], settings["lr_schedule_steps"] or run_steps
    warmup_steps = settings["warmup_steps"]
    if warmup_steps is None:
        warmup_steps = math.ceil(total_steps * settings["warmup_ratio"])

    def learning_rate(step: int) -> float:
        if step <= warmup_steps:
            return peak * step / warmup_steps
        if settings["lr_scheduler"] == "constant":
            return peak
        progress = max(0, min(step, total_steps) - warmup_steps - 1) / max(1, total_steps - warmup_steps)
        if settings["lr_scheduler"] == "linear":
            return peak * (1 - progress)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))

    return learning_rate


def jump(saved: Mapping[str, Any], saved_steps: int, now: Mapping[str, Any], steps: int, done: int) -> list[str]:
    """A warning if a resumed run continues with another learning rate than the original run would have.

    Args:
        saved: the checkpoint's options by flag name; `saved_steps`: the optimizer steps of its run.
        now: this run's options; `steps`: its optimizer steps.
        done: optimizer steps done so far.
    """
    before, after = schedule(saved, saved_steps), schedule(now, steps)
    if math.isclose(before(done + 1), after(done + 1), rel_tol=0.01):
        return []
    line = f"WARNING: the learning rate goes from {before(done):.2g} in step {done} to {after(done + 1):.2g}"
    spanned, spans = saved["lr_schedule_steps"] or saved_steps, now["lr_schedule_steps"] or steps
    if spanned == spans:
        return [line]
    return [
        f"{line}, since its schedule spans {spans} steps and spanned {spanned}; "
        f"--lr_schedule_steps {spanned} keeps the old one ({before(done + 1):.2g})"
    ]
