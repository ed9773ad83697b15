"""Rows of JSON, JSONL and delimited tables, with or without a header; ambiguous rows are left out and counted."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...data.columns import plain
from ...data.foreign import AUDIO_SUFFIXES, DELIMITERS, FILE_COLUMNS, TEXT_COLUMNS, KeyedOnce, lines_in, table_delimiter
from .found import Found
from .guessed_columns import MEANINGS, guess_columns

MOST_LINES = 100  # of one row, whose text may hold line breaks
MOST_DIGITS = 100  # of a number that stays whole, as that of a speaker must
MOST_ROWS = 10_000  # that are looked at, to tell columns apart
ID_COLUMNS = ("id", "name", "file_id", "wav_id", "utt_id", "utterance_id")  # of clips where no column has their files
_Records = Iterable[tuple[int, list[str] | None]]  # lines and their cells
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
    is_array = text.lstrip().startswith("[")
    values = enumerate(DECODER.decode(text)) if is_array else _json_lines(path, text, found)
    for number, value in values:
        origin = f"{path}: [{number}]" if is_array else f"{path}:{number}"
        if isinstance(value, dict):
            yield origin, value
        else:
            found.leave_out("rows that are no JSON objects", origin)


def _json_lines(path: Path, text: str, found: Found) -> Iterator[tuple[int, Any]]:
    problems, is_any = [], False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = DECODER.decode(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: {error.msg}, column {error.colno}")
            found.leave_out("lines that are not JSON", problems[-1])
        else:
            is_any = True
            yield number, value
    if problems and not is_any:
        raise ValueError(f"no line of it is JSON ({problems[0]})")


def table_rows(path: Path, found: Found) -> Iterator[tuple[str, dict[str, str]]]:
    """(`file:line`, cells by the plain names of their columns) of a table with commas, tabs, semicolons or `|`.

    The columns are those of its header, else told by what they hold. Left out: rows whose quotes do not close or
    swallow further rows, and those with more or fewer cells than columns. With commas and semicolons quotes enclose a
    cell. With tabs and `|` they do so where they can; where they cannot, and where the table has no header, they are
    part of the text, unless the table doubles quotes within others, as a writer does that encloses cells.

    Raises:
        ValueError: a header that has a column twice, or columns that cannot be told apart.
    """
    text = path.read_text(encoding="utf-8-sig")
    lines = [f"{line}\n" for line in lines_in(text)]
    at = next((i for i, line in enumerate(lines) if line.strip()), None)
    if at is None:
        return
    head = lines[at]
    delimiter = table_delimiter(head) or next((sign for sign in ("|", "\t", *DELIMITERS) if sign in head), ",")
    rows: _Records
    names = _header(head, delimiter, f"{path}:{at + 1}")
    encloses = delimiter in ",;" or re.search(rf'(?:^|{re.escape(delimiter)})"[^\n]*""', text, re.MULTILINE) is not None
    if names:
        rows = _records(lines, at + 1, delimiter, len(names))
    elif encloses:
        names, rows = _without_header(path, [*_records(lines, at, delimiter, head.count(delimiter) + 1)], found)
    else:
        cut = [(number, line.split(delimiter)) for number, line in enumerate(lines, 1) if line.strip()]
        names, rows = _without_header(path, cut, found)
    for number, cells in rows:
        if cells is None and not encloses:
            cells = lines[number - 1].removesuffix("\n").split(delimiter)
        origin = f"{path}:{number}"
        if cells is None:
            found.leave_out("rows whose quotes do not close, or close in another row", origin)
            continue
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(names):
            reason = "rows with another number of cells than the table has columns"
            found.leave_out(reason, f"{origin}: {len(cells)} instead of {len(names)}")
        else:
            yield origin, {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _without_header(path: Path, rows: _Records, found: Found) -> tuple[list[str], _Records]:
    """(names of the columns by what they hold, rows in which an empty text is the one before it was normalised)."""
    held = [(number, cells and [cell.strip() for cell in cells]) for number, cells in rows]
    names = guess_columns([cells for _, cells in held[:MOST_ROWS] if cells and len(cells) > 1])
    if len(names) > 2:
        columns = ", ".join(f"{i} {MEANINGS[name]}" for i, name in enumerate(names, 1))
        hint = "if that is wrong, add a header line, such as `id|text|speaker`"
        found.notes.append(f"{path}: columns: {columns}; {hint}")
    if "raw_text" in names:
        text, raw = names.index("text"), names.index("raw_text")
        names[raw] = ""
        for _, cells in held:
            if cells and len(cells) == len(names):
                cells[text] = cells[text] or cells[raw]
    return names, held


def _header(line: str, delimiter: str, origin: str) -> list[str]:
    """Plain names of the columns; none for a line that does not name a clip and a text."""
    names = [plain(name) for name in next(csv.reader([line], delimiter=delimiter))]
    while names and not names[-1]:
        names.pop()
    clip = next((name for name in (*FILE_COLUMNS, *ID_COLUMNS) if name in names), None)
    if clip is None or not {*names} & {*TEXT_COLUMNS}:
        return []
    if doubled := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{origin} has the column `{doubled}` twice; rename or remove one")
    return ["audio" if name == clip and clip in ID_COLUMNS else name for name in names]


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
