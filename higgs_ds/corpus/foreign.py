"""What other tools write: recognised by its content, and answered with the command that makes a manifest of it."""

from __future__ import annotations

import csv
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .columns import SYNONYMS

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
HEAD_BYTES = 1 << 16
HEAD_LINES = 20
MOST_ENTRIES = 10_000  # of a folder that are looked at, to guess what it is
TEXT_COLUMNS = ("text", *SYNONYMS["text"].split())
FILE_COLUMNS = ("file_name", "audio", *SYNONYMS["audio"].split())


def import_command(kind: str, path: str | Path) -> str:
    """What a user runs to make a manifest of it."""
    return f"python -m higgs_ds import --from {kind} {shlex.quote(str(path))} --output DIR"


def guess(path: Path) -> str | None:
    """Which of `FORMATS` a file or a folder holds; None where it is none of them, or cannot be read."""
    try:
        if path.is_dir():
            return _guess_folder(path)
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        whole = path.read_bytes if _begins_with(head, b"{") else None
    except OSError:
        return None
    return guess_content(head, whole)


def guess_content(head: bytes, whole=None) -> str | None:
    """`guess` from a file's first bytes; `whole` gives all of them where one JSON object might fill the file."""
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    start = text.lstrip()
    if start.startswith("{"):
        row = _json(lines_in(start)[0])
        if isinstance(row, dict):
            return _guess_row(row)
        row = _json(whole().decode("utf-8-sig", "replace")) if whole is not None else None
        return _guess_row(row) if isinstance(row, dict) else None
    if start.startswith("["):
        try:
            first, _ = json.JSONDecoder().raw_decode(start[1:].lstrip())
        except (ValueError, RecursionError):
            return None
        return _guess_row(first) if isinstance(first, dict) else None
    return _guess_table(lines_in(text)[:HEAD_LINES])


def lines_in(text: str) -> list[str]:
    """As an editor counts them; `splitlines` also splits at U+2028, form feeds and the like, within a transcript."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def no_manifest(path: str, content: bytes) -> str | None:
    """One sentence about a file that holds no rows at all, be it another tool's or nobody's; None for a manifest."""
    kind = guess_content(content[:HEAD_BYTES], lambda: content)
    if kind is not None:
        return f"is {FORMATS[kind]}, not a manifest; this makes one of it: {import_command(kind, path)}"
    if _begins_with(content, b"["):
        return None
    lines = list(_filled_lines(content))
    if len(lines) < 2 or any(isinstance(_json(line), dict) for line in lines):
        return None
    if _begins_with(content, b"{") and isinstance(_json(content.decode("utf-8", "replace")), dict):
        return "is one JSON object over many lines, not a manifest; write one row a line, or an array of rows"
    return f"none of its first {len(lines)} lines is a JSON object, so it is no manifest; write one row a line"


def _filled_lines(content: bytes) -> Iterator[str]:
    start = 0
    found = 0
    while start < len(content) and found < HEAD_LINES:
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        line = content[start:end]
        start = end + 1
        if line.strip():
            found += 1
            yield line.decode("utf-8", "replace")


def _begins_with(content: bytes, sign: bytes) -> bool:
    return content[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(sign)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _guess_row(row: dict) -> str | None:
    if isinstance(row.get("samples"), list) and "messages" not in row:
        return "train-higgs-audio"
    if "messages" in row and "audios" in row:
        return "ms-swift"
    if "file_name" in row and "messages" not in row and "audio" not in row:
        return "audiofolder"
    return None


def _guess_table(lines: list[str]) -> str | None:
    filled = [line for line in lines if line.strip()]
    if not filled:
        return None
    for delimiter in (",", "\t", ";"):
        try:
            header = {name.strip().lower() for name in next(csv.reader(filled[:1], delimiter=delimiter), ())}
        except csv.Error:  # a NUL byte
            return None
        if header & set(FILE_COLUMNS) and header & set(TEXT_COLUMNS):
            return "audiofolder"
    return "ljspeech" if all("|" in line for line in filled) else None


def _guess_folder(folder: Path) -> str | None:
    for name in ("metadata.csv", "metadata.json", "metadata.jsonl", "metadata.tsv", "metadata.txt"):
        if (folder / name).is_file() and (kind := guess(folder / name)):
            return kind
    if any(folder.glob("*/metadata.csv")) or any(folder.glob("*/metadata.jsonl")):
        return "audiofolder"
    for count, (_, _, names) in enumerate(os.walk(folder)):
        stems = {os.path.splitext(name)[0] for name in names if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES}
        texts = {os.path.splitext(name)[0] for name in names if name.lower().endswith((".txt", ".lab"))}
        if stems & texts:
            return "folder"
        if count > MOST_ENTRIES:
            break
    return None
