"""A run's progress on the console."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

from ..process import loss_text, say

PLAIN_LINE_INTERVAL_SEC = 5.0


def format_figures(figures: dict[str, float | str]) -> str:
    """Formats {"loss": 5.1, "lr": 1e-4, "tok_per_sec": 812.3} as "loss 5.1000  lr 1.00e-04  812 tok/s"."""
    parts = []
    for name, value in figures.items():
        name = name.replace("_per_sec", "/s")
        if name.endswith("/s"):
            parts.append(f"{value:.0f} {name}")
        elif name == "lr":
            parts.append(f"lr {value:.2e}")
        elif isinstance(value, float):
            parts.append(f"{name} {loss_text(value)}")
        else:
            parts.append(f"{name} {value}")
    return "  ".join(parts)


class Console:
    """A progress bar on a terminal; a plain line every few seconds in log files and CI. Writes to stderr."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total_steps = total_steps
        self._first_step = first_step
        self._start_time = time.monotonic()
        self._last_line_time = -math.inf
        self._figures = ""
        self._pending_line: str | None = None
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def progress(self, step: int, figures: dict[str, float | str]) -> None:
        self._figures = format_figures(figures) or self._figures
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        seconds_per_step = (now - self._start_time) / max(1, step - self._first_step)
        eta = tqdm.format_interval(seconds_per_step * (self._total_steps - step))
        fields = [f"step {step}/{self._total_steps}", self._figures, f"ETA {eta}"]
        self._pending_line = "  ".join(field for field in fields if field)
        if now - self._last_line_time >= PLAIN_LINE_INTERVAL_SEC:
            self._last_line_time = now
            self._print_pending_line()

    def message(self, text: str) -> None:
        if self._bar is not None:
            tqdm.write(text, file=sys.stderr)
        else:
            say(text, error=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._print_pending_line()

    def _print_pending_line(self) -> None:
        if self._pending_line is not None:
            self.message(self._pending_line)
        self._pending_line = None
