"""JSONL files that stay strict JSON and survive a killed writer."""

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
    """The part of a file kept by `rows_until`."""

    rows: int = 0
    end: int = 0  # byte offset after the last row


def strict(value: Any) -> Any:
    """Converts a value to strict JSON: NaN and infinities, also in lists, become strings that `float` can read."""
    if isinstance(value, list):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def append_rows(path: Path, rows: list[dict]) -> None:
    """Appends rows to a file, creating it if needed."""
    lines = [json.dumps({name: strict(value) for name, value in row.items()}, allow_nan=False) + "\n" for row in rows]
    # Reopened for each write: readers see every step, and a killed run loses at most one line.
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))


def read_rows(path: Path) -> Iterator[dict]:
    """Yields the rows of a JSONL file. A last line without newline is an interrupted write and is skipped.

    Raises:
        ConfigError: a line is not a JSON object; earlier rows have been yielded.
    """
    for row, _ in _rows_with_ends(path):
        yield row


def rows_until(path: Path, last_step: int, kept: Kept) -> Iterator[dict]:
    """Yields the rows before the first one after `last_step`, and counts them in `kept`.

    Reads the whole file, to find damaged later lines as well; a missing file has no rows.

    Raises:
        ConfigError: a row is not a JSON object, or has no `global_step`.
    """
    if last_step == 0 or not path.exists():
        return
    within = True
    for number, (row, end) in enumerate(_rows_with_ends(path), start=1):
        step = row.get("global_step")
        if type(step) is not int:
            raise ConfigError([f"{path}, line {number}: has no global_step; repair or delete the line"])
        within = within and step <= last_step
        if within:
            kept.rows += 1
            kept.end = end
            yield row


def cut(path: Path, end: int) -> None:
    """Truncates a JSONL file to `end` bytes; deletes it if that is 0."""
    if not end:
        path.unlink(missing_ok=True)
    elif path.stat().st_size > end:
        os.truncate(path, end)


def _rows_with_ends(path: Path) -> Iterator[tuple[dict, int]]:
    """Yields each row and the offset after its newline."""
    end = 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            with reading(f"{path}, line {line_number} (repair or delete it)"):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
            yield row, end
