"""Readers of JSON, JSONL and delimited tables, with or without a header; ambiguous rows are counted and left out."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...data.columns import plain
from ...data.foreign import AUDIO_SUFFIXES, DELIMITERS, FILE_COLUMNS, TEXT_COLUMNS, JsonDict, lines_in, table_delimiter
from .found import Found
from .guessed_columns import MEANINGS, guess_columns

MOST_LINES = 100  # of one row, since texts may contain line breaks
MOST_DIGITS = 100  # of a number that stays an integer, such as a speaker's
MOST_ROWS = 10_000  # examined to guess the meaning of columns
ID_COLUMNS = ("id", "name", "file_id", "wav_id", "utt_id", "utterance_id")  # used if no column has the clips' files
_Records = Iterable[tuple[int, list[str] | None]]  # line and cells; None for an unreadable line
# Its objects record duplicate keys.
DECODER = json.JSONDecoder(
    object_pairs_hook=JsonDict,
    parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else float(digits),
)


def json_rows(path: Path, found: Found) -> Iterator[tuple[str, dict]]:
    """Yields (`file:line`, object) of JSONL or a JSON array; counts and leaves out other values.

    Raises:
        ValueError: an invalid JSON array, or a file without any line of JSON.
    """
    text = path.read_text(encoding="utf-8-sig")
    is_array = text.lstrip().startswith("[")
    values = enumerate(DECODER.decode(text)) if is_array else _json_lines(path, text, found)
    for number, value in values:
        origin = f"{path}: [{number}]" if is_array else f"{path}:{number}"
        if isinstance(value, dict):
            yield origin, value
        else:
            found.leave_out("rows that are not JSON objects", origin)


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
        raise ValueError(f"no line is JSON ({problems[0]})")


def table_rows(path: Path, found: Found) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (`file:line`, cells by normalised column name) of a table with commas, tabs, semicolons or `|`.

    Columns are named by the header, or guessed from their values. Rows with an unclosed quote, with a quote that spans
    other rows, or with a wrong number of cells are counted and left out. With commas and semicolons, quotes enclose
    cells. With tabs and `|`, quotes that cannot enclose a cell, and all quotes in a table without a header, are part
    of the text, unless the table doubles quotes inside quotes, which shows that its writer encloses cells.

    Raises:
        ValueError: a duplicate column in the header, or ambiguous columns.
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
            found.leave_out("rows with an unclosed quote, or one that spans other rows", origin)
            continue
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        if len(cells) != len(names):
            reason = "rows with more or fewer cells than columns"
            found.leave_out(reason, f"{origin}: {len(cells)} instead of {len(names)}")
        else:
            yield origin, {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _without_header(path: Path, rows: _Records, found: Found) -> tuple[list[str], _Records]:
    """Returns (guessed column names, rows); an empty normalised text is replaced by the raw text."""
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
    """Returns the normalised column names of a header; [] for a line that does not name a clip and a text."""
    names = [plain(name) for name in next(csv.reader([line], delimiter=delimiter))]
    while names and not names[-1]:
        names.pop()
    clip = next((name for name in (*FILE_COLUMNS, *ID_COLUMNS) if name in names), None)
    if clip is None or not {*names} & {*TEXT_COLUMNS}:
        return []
    if doubled := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"{origin} has a duplicate column `{doubled}`; rename or remove one")
    return ["audio" if name == clip and clip in ID_COLUMNS else name for name in names]


def _records(lines: list[str], at: int, delimiter: str, width: int) -> Iterator[tuple[int, list[str] | None]]:
    """Yields (line, cells) of every row; cells are None for a line with bad quotes, and reading continues after it."""
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
        if cells is None or (reader.line_num > 1 and _contain_row(cells, delimiter, width)):
            yield at, None
        else:
            yield at, cells
            at += reader.line_num - 1


def _contain_row(cells: list[str], delimiter: str, width: int) -> bool:
    """Returns True if a text over several lines contains another row of the table, as after an unclosed quote.

    A row is recognised by its clip's file name, or by its number of cells alone if clips have no suffix or the
    delimiter is a tab or `|`, which are rare in texts.
    """
    by_width = delimiter in "\t|" or not any(map(_is_clip, cells))
    for line in (line for cell in cells if "\n" in cell for line in cell.split("\n")):
        parts = line.split(delimiter)
        if len(parts) > 1 and ((by_width and len(parts) >= width) or any(map(_is_clip, parts))):
            return True
    return False


def _is_clip(cell: str) -> bool:
    return os.path.splitext(cell.strip(' "'))[1].lower() in AUDIO_SUFFIXES
