"""Rows of JSON, JSONL and delimited tables; ambiguous rows are left out and counted."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...data.columns import plain
from ...data.foreign import AUDIO_SUFFIXES, DELIMITERS, KeyedOnce, lines_in, table_delimiter
from .found import Found

MOST_LINES = 100  # of one row, whose text may hold line breaks
MOST_DIGITS = 100  # of a number that stays whole, as that of a speaker must
# Its objects know which of their keys were given twice.
DECODER = json.JSONDecoder(
    object_pairs_hook=KeyedOnce,
    parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else float(digits),
)


def json_rows(path: Path, found: Found) -> Iterator[tuple[str, dict]]:
    """(`file:line`, object) of JSONL or a JSON array; lines and elements that are no objects are left out.

    Raises:
        ValueError: an array that is not JSON, or not a single line that is.
    """
    text = path.read_text(encoding="utf-8-sig")
    values: Iterator[tuple[str, Any]]
    if text.lstrip().startswith("["):
        values = ((f"{path}: [{i}]", value) for i, value in enumerate(DECODER.decode(text)))
    else:
        values = _json_lines(path, text, found)
    for origin, value in values:
        if isinstance(value, dict):
            yield origin, value
        else:
            found.leave_out("rows that are no JSON objects", origin)


def _json_lines(path: Path, text: str, found: Found) -> Iterator[tuple[str, Any]]:
    first_problem, is_any = None, False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = DECODER.decode(line)
        except json.JSONDecodeError as error:
            problem = f"{path}:{number}: {error.msg}, column {error.colno}"
        else:
            is_any = True
            yield f"{path}:{number}", value
            continue
        first_problem = first_problem or problem
        found.leave_out("lines that are not JSON", problem)
    if first_problem and not is_any:
        raise ValueError(f"no line of it is JSON ({first_problem})")


def table_rows(path: Path, found: Found) -> Iterator[tuple[str, dict[str, str]]]:
    """(`file:line`, cells by the plain names of the header) of a table with commas, tabs, semicolons or `|`.

    Left out: rows whose quotes do not close or swallow further rows, and those with more or fewer cells than names.
    With commas and semicolons quotes enclose a cell. With tabs and `|` they do so where they can; where they cannot,
    they are part of the text, unless the table doubles quotes within others, as a writer does that encloses cells.

    Raises:
        ValueError: a header that has a column twice, or quotes that do not close.
    """
    text = path.read_text(encoding="utf-8-sig")
    lines = [f"{line}\n" for line in lines_in(text)]
    at = next((i for i, line in enumerate(lines) if line.strip()), None)
    if at is None:
        return
    delimiter = table_delimiter(lines[at]) or max(DELIMITERS, key=lines[at].count)
    names = [plain(name) for name in next(csv.reader([lines[at]], delimiter=delimiter, strict=True))]
    while names and not names[-1]:
        names.pop()
    if doubled := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{path}:{at + 1} has the column `{doubled}` twice; rename or remove one")
    encloses = delimiter in ",;" or re.search(rf'(?:^|{re.escape(delimiter)})"[^\n]*""', text, re.MULTILINE) is not None
    for number, cells in _records(lines, at + 1, delimiter, len(names)):
        if cells is None and not encloses:
            cells = lines[number - 1].removesuffix("\n").split(delimiter)
        origin = f"{path}:{number}"
        if cells is None:
            found.leave_out("rows whose quotes do not close, or close in another row", origin)
            continue
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(names):
            reason = "rows with another number of cells than the header has names"
            found.leave_out(reason, f"{origin}: {len(cells)} instead of {len(names)}")
        else:
            yield origin, {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _records(lines: list[str], at: int, delimiter: str, width: int) -> Iterator[tuple[int, list[str] | None]]:
    """(line, cells) of every row; None for a line that cannot be read for its quotes, behind which reading goes on."""
    limit = csv.field_size_limit()
    while at < len(lines):
        line, at = lines[at], at + 1
        if not line.strip():
            continue
        if '"' not in line and len(line) < limit:
            yield at, line[:-1].split(delimiter)
            continue
        reader = csv.reader(lines[at - 1 : at - 1 + MOST_LINES], delimiter=delimiter, strict=True)
        try:
            cells = next(reader)
        except csv.Error:  # also a field of more than 131,072 characters
            cells = None
        if cells is None or (reader.line_num > 1 and _hold_row(cells, delimiter, width)):
            yield at, None
        else:
            yield at, cells
            at += reader.line_num - 1


def _hold_row(cells: list[str], delimiter: str, width: int) -> bool:
    """True if a text over several lines holds another row of the table, as after an unclosed quote.

    A row is known by the name of its clip; where clips have no endings, and with tabs and `|`, which are rare in texts,
    by its number of cells alone.
    """
    by_width = delimiter in "\t|" or not any(map(_is_clip, cells))
    for line in (line for cell in cells if "\n" in cell for line in cell.split("\n")):
        parts = line.split(delimiter)
        if len(parts) > 1 and ((by_width and len(parts) >= width) or any(map(_is_clip, parts))):
            return True
    return False


def _is_clip(cell: str) -> bool:
    return os.path.splitext(cell.strip(' "'))[1].lower() in AUDIO_SUFFIXES
