"""Formats of other tools: recognised by its content, and answered with the command that makes a manifest of it."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .columns import SYNONYMS, plain

AUDIO_SUFFIXES = frozenset(
    ".wav .flac .mp3 .ogg .opus .m4a .aac .webm .mp4 .mkv .mov .wma .aif .aiff .aifc .caf .au .w64".split()
)
FORMATS = {
    "ljspeech": "LJSpeech's `id|text` metadata",
    "train-higgs-audio": "train-higgs-audio's metadata.json",
    "ms-swift": "ms-swift's `messages` with `audios`",
    "audiofolder": "a table of an audiofolder (`file_name` and a text)",
    "folder": "a folder of clips with text files beside them",
}
TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.tsv")  # of an audiofolder
TEXT_SUFFIXES = (".normalized.txt", ".txt", ".lab", ".original.txt")  # in the order in which they are taken
AUDIO_TAG = "<audio>"  # stands for a clip in ms-swift's texts
HEAD_BYTES = 1 << 16
HEAD_LINES = 20
MOST_ENTRIES = 10_000  # of a folder that are looked at, to guess what it is
TEXT_COLUMNS = ("text", *SYNONYMS["text"].split())
DELIMITERS = (",", "\t", ";", "|")
FILE_COLUMNS = ("file_name", "audio", *SYNONYMS["audio"].split())


class KeyedOnce(dict):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


_KEY = re.compile(rb'"\s*:')


def keys_given_twice(content: bytes, value: object) -> list[str]:
    """Keys that stand twice in one object of `content`, of which a JSON reader keeps the last in silence.

    Args:
        value: what the reader made of it. Only where more keys may stand in the text than in `value` is it read again.
    """
    if len(_KEY.findall(content)) == _count_keys(value):
        return []
    repeated: list[str] = []

    def noted(pairs: list[tuple[str, Any]]) -> KeyedOnce:
        found = KeyedOnce(pairs)
        repeated.extend(found.repeated)
        return found

    json.loads(content, object_pairs_hook=noted)
    return repeated


def _count_keys(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_count_keys, value.values()))
    return sum(map(_count_keys, value)) if isinstance(value, list) else 0


def import_command(kind: str, path: str | Path) -> str:
    """Command that makes a manifest of it."""
    return f"python -m higgs_ds import --from {kind} {shlex.quote(str(path))} --output DIR"


def guess(path: Path) -> str | None:
    """The one of `FORMATS` that a file or a folder holds; None where it is none of them, or cannot be read."""
    try:
        if path.is_dir():
            return _guess_folder(path)
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        whole = path.read_bytes if _begins_with(head, b"{") else None
    except OSError:
        return None
    return guess_content(head, whole)


def guess_content(head: bytes, whole=None, rows: int = HEAD_LINES) -> str | None:
    """`guess` from a file's first bytes and rows; `whole` gives all of it where one JSON object might fill the file."""
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    start = text.lstrip()
    if start.startswith("{"):
        values = [_json(line) for line in lines_in(start)[:rows]]
        if not isinstance(values[0], dict) and whole is not None:
            values.insert(0, _json(whole().decode("utf-8-sig", "replace")))
        return _guess_rows(values)
    if start.startswith("["):
        return _guess_rows(_first_elements(start[1:], rows))
    return _guess_table(lines_in(text)[:HEAD_LINES])


def _first_elements(text: str, count: int) -> list[Any]:
    """So many elements of a JSON array, or those before its head is cut off."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    while len(values) < count:
        text = text.lstrip()
        try:
            value, behind = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            break
        values.append(value)
        rest = text[behind:].lstrip()
        if not rest.startswith(","):
            break
        text = rest[1:]
    return values


def swift_audios(row: dict, file: str) -> str | None:
    """Problem of a ChatML row whose clips stand in `audios`, as ms-swift has them: nothing would read them."""
    if not row.get("audios") or not isinstance(row["messages"], list):
        return None
    contents = [message.get("content") for message in row["messages"] if isinstance(message, dict)]
    pieces = [piece for content in contents for piece in (content if isinstance(content, list) else [content])]
    texts = [piece.get("text") if isinstance(piece, dict) else piece for piece in pieces]
    is_tagged = any(isinstance(text, str) and AUDIO_TAG in text for text in texts)
    if not is_tagged and any(isinstance(piece, dict) and piece.get("type") == "audio" for piece in pieces):
        return None
    return f"is ms-swift's and not read here; this makes a manifest of it: {import_command('ms-swift', file)}"


def lines_in(text: str) -> list[str]:
    """As an editor counts them; `splitlines` also splits at U+2028, form feeds and the like, within a transcript."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def no_manifest(path: str, content: bytes) -> str | None:
    """One sentence about a file that holds no rows at all, be it another tool's or nobody's; None for a manifest."""
    kind = guess_content(content[:HEAD_BYTES], lambda: content, rows=1)  # of mixed rows each has a fault of its own
    if kind is not None:
        return f"is {FORMATS[kind]}, not a manifest; this makes one of it: {import_command(kind, path)}"
    if _begins_with(content, b"["):
        return None
    lines = lines_in(content[:HEAD_BYTES].decode("utf-8", "replace"))
    if len(content) > HEAD_BYTES:
        del lines[-1]  # which may be cut off
    lines = [line for line in lines if line.strip()][:HEAD_LINES]
    if len(lines) < 2 or any(isinstance(_json(line), dict) for line in lines):
        return None
    if _begins_with(content, b"{") and isinstance(_json(content.decode("utf-8", "replace")), dict):
        return "is one JSON object over many lines, not a manifest; write one row a line, or an array of rows"
    return f"none of its first {len(lines)} lines is a JSON object, so it is no manifest; write one row a line"


def _begins_with(content: bytes, sign: bytes) -> bool:
    return content[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(sign)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _guess_rows(values: list[Any]) -> str | None:
    return next((kind for value in values if isinstance(value, dict) and (kind := _guess_row(value))), None)


def _guess_row(row: dict) -> str | None:
    if "messages" in row:
        return "ms-swift" if "audios" in row else None
    if isinstance(row.get("samples"), list) or ("transcript_file" in row and not any(n in row for n in TEXT_COLUMNS)):
        return "train-higgs-audio"
    if "file_name" in row and "audio" not in row:
        return "audiofolder"
    return None


def table_delimiter(header: str) -> str | None:
    """Delimiter between the names of a header that names a clip and a text; None for any other line."""
    for delimiter in DELIMITERS:
        try:
            names = {plain(name) for name in next(csv.reader([header], delimiter=delimiter), ())}
        except csv.Error:  # a NUL byte
            return None
        if names & set(FILE_COLUMNS) and names & set(TEXT_COLUMNS):
            return delimiter
    return None


def _guess_table(lines: list[str]) -> str | None:
    filled = [line for line in lines if line.strip()]
    if not filled:
        return None
    if table_delimiter(filled[0]):
        return "audiofolder"
    return "ljspeech" if all("|" in line for line in filled) else None


def _guess_folder(folder: Path) -> str | None:
    """By a table at its top, by one below, or by clips beside texts, wherever these are."""
    for name in ("metadata.csv", "metadata.json", "metadata.jsonl", "metadata.tsv", "metadata.txt"):
        if (folder / name).is_file() and (kind := guess(folder / name)):
            return kind
    kind = None
    for count, (parent, folders, names) in enumerate(os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name in names and guess(Path(parent, name)) == "audiofolder" for name in TABLE_NAMES):
            return "audiofolder"
        if kind is None and any(text is not None for _, text in with_texts(names)):
            kind = "folder"
        if count > MOST_ENTRIES:
            break
    return kind


def with_texts(names: list[str]) -> Iterator[tuple[str, str | None]]:
    """(clip, the text file of its name or None) for all clips among a folder's file names, hidden ones left out."""
    texts: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        for suffix in TEXT_SUFFIXES:
            if name.lower().endswith(suffix):
                texts[name[: -len(suffix)], suffix] = name
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in AUDIO_SUFFIXES and not name.startswith("."):
            yield name, next((texts[stem, s] for s in TEXT_SUFFIXES if (stem, s) in texts), None)
