"""Faults of a manifest: grouped by kind on the console, complete in a file."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..files import replacing

FAULTS_FILE = "faults.jsonl"
SHOWN_OF_A_KIND = 20
SHOWN_KINDS = 20

_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_NUMBER = re.compile(r"(?<![\w#])[-+]?\d[\d.,]*(?:e[-+]?\d+)?(?![\w#])")
_INDEX = re.compile(r"\[\d+\]")


@dataclass(frozen=True, order=True)
class Fault:
    """One problem in a manifest. A row with only a `warning` is still trained on."""

    file: str
    line: int
    # Index in a JSON array, from 0, if several elements share the line; otherwise -1.
    element: int = dataclasses.field(default=-1, kw_only=True)
    field: str
    problem: str
    warning: bool = False

    def __str__(self) -> str:
        return f"{origin(self.file, self.line, self.element)}: {self.field}: {self.problem}"

    @property
    def row(self) -> tuple[str, int, int]:
        """Identity of the row."""
        return self.file, self.line, self.element

    @functools.cached_property
    def kind(self) -> str:
        """Field and problem without names and numbers, equal for all faults of one kind."""
        problem = _NUMBER.sub("N", _QUOTED.sub("…", self.problem))
        field = _INDEX.sub("[]", _QUOTED.sub("…", self.field))
        return f"{field}: {problem}"


def origin(file: str, line: int, element: int = -1) -> str:
    """Returns a row's location: `file:line`, or `file:line[element]` if elements of an array share the line."""
    return f"{file}:{line}" + (f"[{element}]" if element >= 0 else "")


def grouped(faults: Iterable[Fault]) -> list[str]:
    """Returns lines for the console: all faults up to 20, otherwise 20 of each kind, most frequent kinds first.

    Lists at most 20 kinds; a last line counts the rest.
    """
    faults = sorted(faults)
    if len(faults) <= SHOWN_OF_A_KIND:
        return [str(fault) for fault in faults]
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    lines = []
    for kind, members in ordered[:SHOWN_KINDS]:
        lines.append(f"{len(members):,} × {kind}")
        lines += [str(fault) for fault in members[:SHOWN_OF_A_KIND]]
        if (more := len(members) - SHOWN_OF_A_KIND) > 0:
            lines.append(f"… and {more:,} more of this kind")
    if rest := ordered[SHOWN_KINDS:]:
        lines.append(f"… and {sum(len(members) for _, members in rest):,} more, of {len(rest):,} other kinds")
    return lines


def write_faults(folder: Path, faults: Iterable[Fault]) -> Path | None:
    """Writes all faults and warnings to `folder/faults.jsonl`, sorted, one per line, replacing an earlier file.

    Each line has `file`, `line`, `field`, `problem`, `kind`, `level` (fault or warning), and `element`, from 0, if
    several elements of a JSON array share the line. Without faults and warnings an earlier file is removed.
    Returns the file's path, or None if there is none or the folder is not writable.
    """
    path = folder / FAULTS_FILE
    faults = sorted(faults)
    try:
        if not faults:
            path.unlink(missing_ok=True)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, faults))
    except OSError:
        return None
    return path


def _line(fault: Fault) -> str:
    values = {name: getattr(fault, name) for name in ("file", "line", "field", "problem", "kind")}
    if fault.element >= 0:
        values["element"] = fault.element
    values["level"] = "warning" if fault.warning else "fault"
    return json.dumps(values, ensure_ascii=True) + "\n"


def plural(count: int, word: str) -> str:
    """Returns a count with its noun: `1 row`, `2,000 rows`."""
    return f"{count:,} {word}{'s' * (count != 1)}"
