"""Manifests: the text of a file and the positions of its rows. Rows are checked before anything is decoded.

A manifest is JSONL or a JSON array, detected by its content. Two kinds of rows may be mixed:

- ChatML, in the format of upstream's `ChatMLSample`: `messages`, and optionally `start_index`, `speaker`, `misc`;
- speech: `audio`, `text`, and optionally `speaker`, `ref_audio` + `ref_text`, `scene`, `offset`, `duration`.

Clips are searched for in `audio_root`, the manifest's folder and the working directory. Unread columns are counted and
reported. `columns` defines the known names, `schema` the format of a row.
"""

from __future__ import annotations

import codecs
import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from ..errors import reason_of
from .chatml import SERVED, AudioRef, Row, Turn, speech_messages
from .clip_paths import ClipPaths
from .columns import unread_lines
from .controls import DEFAULT_CONTROLS
from .faults import Fault
from .foreign import import_command, keys_given_twice, problem_of_format
from .schema import Rules, read_row
from .text_findings import TextFindings

__all__ = ["AudioRef", "Fault", "Manifest", "Row", "Turn", "read_manifest", "speech_messages"]

_INSTEAD = "give a JSONL file or a JSON array, in UTF-8"
_BLANKS = b" \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")
_SCANNER = json.JSONDecoder(parse_int=float)  # finds where a value ends
_COLUMN = re.compile(r" at line \d+ column (\d+)$")


class Manifest:
    """A manifest's text and the positions of its rows; each row is parsed on demand.

    Takes the size of the file plus 24 bytes per row, shared with forked processes. Later changes to the file have no
    effect.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        audio_root: str | Path | None = None,
        controls: re.Pattern[str] = DEFAULT_CONTROLS,
        prompt_style: str = SERVED,
        channel: int | None = None,
        audio_track: int | None = None,
        trains: bool | None = None,
    ):
        """Reads the file. A file that is unreadable or malformed does not raise; see `faults`.

        `controls` matches tokens that are not allowed in texts; see `controls.control_tokens`. `prompt_style` is the
        style of prompts built from speech rows.
        """
        self.file = str(path)
        self.faults: list[Fault] = []  # of the file as a whole; `check` returns those of rows
        self._rules = Rules(
            self.file, ClipPaths(path, audio_root), controls, prompt_style, channel, audio_track, trains
        )
        self._checked_rules = dataclasses.replace(self._rules, checked=True)  # for rows that passed `check`
        self._content = b""
        self._spans: np.ndarray = np.zeros((0, 2), np.int64)  # start and end of each row in `_content`, in bytes
        self._lines: np.ndarray = np.zeros(0, np.int64)  # 1-based
        self._shared = False  # True if several elements of an array share a line
        try:
            content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
            if problem := problem_of_format(self.file, content):
                self._fault(1, "manifest", problem)
                return
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            reason = f"byte 0x{error.object[error.start]:02x}: {error.reason}"
            self._fault(line, "manifest", f"is not UTF-8 ({reason}); {_INSTEAD}")
            return
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            advice = f"; to convert a corpus: `{import_command(None, path)}`" if Path(path).is_dir() else ""
            self._fault(1, "manifest", f"cannot be read ({reason_of(error)}); {_INSTEAD}{advice}")
            return
        self._content = content
        if text.startswith("[", _after_space(text, 0)):
            self._find_array_elements(text)
        else:
            self._find_lines()
        if not len(self) and not self.faults:
            self._fault(1, "manifest", "contains no rows; write one JSON object per line")

    def __len__(self) -> int:
        """Number of rows, including bad ones."""
        return len(self._lines)

    def lines_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the lines where these rows start, 1-based, int64 [rows]."""
        return self._lines[numbers]

    def elements_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the rows' indices in a JSON array if rows share lines, otherwise -1; int64 [rows]."""
        return np.asarray(numbers, np.int64) if self._shared else np.broadcast_to(np.int64(-1), len(numbers))

    def digest(self) -> bytes:
        """Returns the SHA-256 of the file's content."""
        return hashlib.sha256(self._content).digest()

    def check(self, number: int) -> tuple[Row | None, list[Fault]]:
        """Returns a row or all of its faults. Its clips must exist, but are not decoded."""
        row, faults = self._read(number, self._rules)
        self._rules.scenes += row is not None and row.has_scene
        return row, faults

    def row(self, number: int) -> Row:
        """Returns a row that passed `check`, without searching for its clips again."""
        row, faults = self._read(number, self._checked_rules)
        assert row is not None, faults
        return row

    def column(self, number: int, name: str) -> Any:
        """Returns the value of any column, also an unread one, of a row that passed `check`; None if it is missing."""
        start, end = self._spans[number]
        return from_json(self._content[start:end]).get(name)

    def clips_here(self, number: int) -> str:
        """Describes a row's clips as this process sees them: their sizes, or their faults. Counts nothing."""
        row, faults = self._read(number, copy.deepcopy(self._rules))
        try:
            sizes = [ref.path.stat().st_size for _, ref in row.audio_refs if ref.path] if row is not None else []
        except OSError as error:
            return f"{error.filename} cannot be read ({reason_of(error)})"
        return "; ".join([*(f"{size:,} bytes" for size in sizes), *(fault.problem for fault in faults)])

    def _read(self, number: int, rules: Rules) -> tuple[Row | None, list[Fault]]:
        line, element = int(self._lines[number]), number if self._shared else -1
        start, end = self._spans[number]
        content = self._content[start:end]
        try:
            value = from_json(content, cache_strings="keys")
        except ValueError as error:
            reason = _COLUMN.sub(r", column \1", str(error))
            problem = f"not JSON ({reason}); write one complete object per line"
            return None, [Fault(self.file, line, "row", problem, element=element)]
        if repeated := keys_given_twice(content, value):
            problem = "is a duplicate key; keep one"
            return None, [Fault(self.file, line, key, problem, element=element) for key in repeated]
        return read_row(value, rules, line, element)

    def seen(self) -> tuple:
        """Returns the counts that `check` made in this process, to be passed to `set_seen` on all ranks."""
        rules = self._rules
        return rules.texts, dict(rules.unread), dict(rules.paths.elsewhere), rules.scenes

    def set_seen(self, of_ranks: list[tuple]) -> None:
        """Replaces this process's counts by those of all ranks."""
        self._rules.unread.clear()
        self._rules.paths.elsewhere.clear()
        self._rules.scenes = sum(seen[-1] for seen in of_ranks)
        self._rules.texts = TextFindings.merged([seen[0] for seen in of_ranks])
        for _, unread, elsewhere, _ in of_ranks:
            self._rules.unread.update(unread)
            self._rules.paths.elsewhere.update(elsewhere)

    def notes(self) -> list[str]:
        """Returns notes that are no faults: unread columns, clips found in other folders, composed texts, scenes."""
        rules = self._rules
        notes = [*rules.paths.notes(self.file), *unread_lines(rules.unread, self.file), *rules.texts.notes(self.file)]
        if count := rules.scenes:
            rows = f"{count:,} row{' has' if count == 1 else 's have'}"
            notes.append(f"{self.file}: {rows} a scene; vllm-omni serves no scene, the other stacks do")
        return notes

    def of_texts(self) -> tuple[list[Fault], list[Fault]]:
        """Returns (faults, warnings) found over all texts together."""
        return self._rules.texts.faults(self.file), self._rules.texts.warnings(self.file)

    def _fault(self, line: int, field: str, problem: str) -> None:
        self.faults.append(Fault(self.file, line, field, problem))

    def _find_lines(self) -> None:
        # Not splitlines(): it also splits at U+2028 and similar characters, which JSON strings may contain.
        content = np.frombuffer(self._content, np.uint8)
        breaks = np.flatnonzero(content == ord("\n"))
        spans = np.stack([np.r_[0, breaks + 1], np.r_[breaks, len(content)]], axis=1)
        filled = spans[:, 0] < spans[:, 1]
        starts_blank = np.flatnonzero(filled)[np.isin(content[spans[filled, 0]], list(_BLANKS))]
        for i in starts_blank.tolist():
            start, end = spans[i]
            filled[i] = bool(self._content[start:end].strip(_BLANKS))
        self._lines = np.flatnonzero(filled) + 1
        self._spans = spans[filled]

    def _find_array_elements(self, text: str) -> None:
        """Finds the elements up to the first that is not JSON, which becomes a fault."""
        spans: list[tuple[int, int]] = []
        lines: list[int] = []
        line, counted = 1, 0
        at = _after_space(text, text.index("[") + 1)
        more = not text.startswith("]", at)
        try:
            while more:
                line += text.count("\n", counted, at)
                counted = at
                _, end = _SCANNER.raw_decode(text, at)
                spans.append((at, end))
                lines.append(line)
                at = _after_space(text, end)
                more = text.startswith(",", at)
                if more:
                    at = _after_space(text, at + 1)
            if not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _after_space(text, at + 1)
            if at < len(text):
                raise json.JSONDecodeError("Extra data after the array", text, at)
        except json.JSONDecodeError as error:
            self._fault(error.lineno, "row", f"not JSON ({error.msg}, column {error.colno}); nothing after it was read")
        except RecursionError:
            self._fault(line, "row", "nested too deeply to be read; nothing after it was read")
        self._spans = _in_bytes(text, np.array(spans, np.int64).reshape(-1, 2))
        self._lines = np.array(lines, np.int64)
        self._shared = len(set(lines)) < len(lines)


def _in_bytes(text: str, spans: np.ndarray) -> np.ndarray:
    """Converts sorted spans of characters to spans of UTF-8 bytes."""
    if text.isascii():
        return spans
    places, at, counted = np.zeros(spans.size, np.int64), 0, 0
    for i, place in enumerate(spans.flatten().tolist()):
        at += len(text[counted:place].encode("utf-8"))
        counted = place
        places[i] = at
    return places.reshape(spans.shape)


def _after_space(text: str, at: int) -> int:
    blanks = _SPACE.match(text, at)
    return blanks.end() if blanks else at


def read_manifest(
    path: str | Path,
    *,
    audio_root: str | Path | None = None,
    controls: re.Pattern[str] = DEFAULT_CONTROLS,
    prompt_style: str = SERVED,
) -> tuple[list[Row], list[Fault]]:
    """Reads a small manifest at once. Returns its valid rows in file order and all faults, sorted."""
    manifest = Manifest(path, audio_root=audio_root, controls=controls, prompt_style=prompt_style)
    rows: list[Row] = []
    faults = list(manifest.faults)
    for number in range(len(manifest)):
        row, found = manifest.check(number)
        faults += found
        if row is not None:
            rows.append(row)
    return rows, sorted(faults)
