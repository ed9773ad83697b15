"""Files of one JSON object a line that stay strict JSON and survive a killed writer."""

import json
import math
from pathlib import Path
from typing import Any

from ..files import write_text


def strict(value: Any) -> Any:
    """A value that JSON has: NaN and infinities become the strings that `float` reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def json_line(row: dict) -> str:
    """One row with its newline."""
    return json.dumps({name: strict(value) for name, value in row.items()}, allow_nan=False) + "\n"


def append_rows(path: Path, rows: list[dict]) -> None:
    """Adds rows to a file, which is made if it is not there."""
    # Opened for each write: a reader sees every step, and a killed run loses at most the line being written.
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(map(json_line, rows)))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {path} cannot be written") from error


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file. A last line without its newline is a write cut short, and is left out."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {line_number} is not JSON ({error}); mend or delete it") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line_number} is no JSON object; mend or delete it")
            rows.append(row)
    return rows


def rows_until(path: Path, last_step: int) -> list[dict]:
    """The rows up to `last_step`; none of a file that is not there, and none up to 0.

    Raises:
        ValueError: a row that is no JSON object, or has no `global_step`.
    """
    if last_step == 0 or not path.exists():
        return []
    kept = []
    for number, row in enumerate(read_rows(path), start=1):
        if type(row.get("global_step")) is not int:
            raise ValueError(f"{path}, line {number} has no global_step; mend or delete it")
        if row["global_step"] <= last_step:
            kept.append(row)
    return kept


def keep_only(path: Path, rows: list[dict]) -> None:
    """Cuts a JSONL file back to these rows; without any it is deleted."""
    if rows:
        write_text(path, "".join(map(json_line, rows)))
    else:
        path.unlink(missing_ok=True)
