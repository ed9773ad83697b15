"""Files of one JSON object a line that stay strict JSON and survive a killed writer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, reading


@dataclass
class Kept:
    """The part of a file that `rows_until` found."""

    rows: int = 0  # that are kept
    end: int = 0  # bytes of the file up to the last of them


def strict(value: Any) -> Any:
    """A value that JSON has: NaN and infinities become the strings that `float` reads back, in lists too."""
    if isinstance(value, list):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def append_rows(path: Path, rows: list[dict]) -> None:
    """Adds rows to a file, which is made if it is not there."""
    lines = [json.dumps({name: strict(value) for name, value in row.items()}, allow_nan=False) + "\n" for row in rows]
    # Opened for each write: a reader sees every step, and a killed run loses at most the line being written.
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file, one at a time. A last line without its newline is a write cut short, and is left out.

    Raises:
        ConfigError: a line is no JSON object; what came before it has been given.
    """
    for row, _ in _rows_with_ends(path):
        yield row


def rows_until(path: Path, last_step: int, kept: Kept) -> Iterator[dict]:
    """The rows up to the first one after `last_step`, one at a time; `kept` is told where they end.

    The whole file is read, so that a damaged line after them is found too; of a missing file there are none.

    Raises:
        ConfigError: a row that is no JSON object, or has no `global_step`.
    """
    if last_step == 0 or not path.exists():
        return
    within = True
    for number, (row, end) in enumerate(_rows_with_ends(path), start=1):
        step = row.get("global_step")
        if type(step) is not int:
            raise ConfigError([f"{path}, line {number}, to be mended or deleted: it has no global_step"])
        within = within and step <= last_step
        if within:
            kept.rows += 1
            kept.end = end
            yield row


def cut(path: Path, end: int) -> None:
    """Ends a JSONL file after its first `end` bytes; with none of them it is deleted."""
    if not end:
        path.unlink(missing_ok=True)
    elif path.stat().st_size > end:
        os.truncate(path, end)


def _rows_with_ends(path: Path) -> Iterator[tuple[dict, int]]:
    """Each row, and the offset of the byte after its newline."""
    end = 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            with reading(f"{path}, line {line_number}, to be mended or deleted"):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("it is no JSON object")
            yield row, end
