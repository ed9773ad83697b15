"""What every benchmark ends with: a table on the console, and JSON of figure, bar, holds, rows and device."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from higgs_ds.distributed.device import pick_device


def report(
    title: str,
    rows: list[dict],
    *,
    figure: float | dict[str, float],
    bar: float | dict[str, float],
    holds: bool,
    json_file: Path | None,
) -> None:
    """Prints the rows as a table and the figures beside their bars; writes the same to `json_file` where given.

    Args:
        rows: what was measured, a line each; the columns are the keys of all rows in order of appearance.
        figure, bar: one number, or numbers by name.
    """
    device = device_name()
    print(f"\n{title}\n{device}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *([_shown(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))
    figures = figure if isinstance(figure, dict) else {title: figure}
    print()
    for name, value in figures.items():
        limit = bar.get(name) if isinstance(bar, dict) else bar
        print(f"{name}: {_shown(value)}" + ("" if limit is None else f" (bar {_shown(limit)})"))
    print("holds" if holds else "DOES NOT HOLD", flush=True)
    if json_file is not None:
        result = {"title": title, "figure": figure, "bar": bar, "holds": holds, "rows": rows, "device": device}
        Path(json_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def measuring_device() -> torch.device:
    """The GPU where one can be used, else the CPU: a benchmark measures what is there, and its table says what it was.

    This process and those that it starts decide alike from here on, by `higgs_ds.distributed.device.pick_device`.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return pick_device()


def device_name() -> str:
    """The GPU's name, or the CPU's and how many threads compute."""
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"


def interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each case, all of them run in turn `repeats` times after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats + 1):
        for name, run in cases.items():
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
