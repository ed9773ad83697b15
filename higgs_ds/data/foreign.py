"""Other tools' formats: detected by content and refused with the command that imports them."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import os
import re
import shlex
import zlib
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
    "lhotse": "lhotse's cuts, or recordings with supervisions",
    "kaldi": "a Kaldi folder (`wav.scp`, `text`, `utt2spk`)",
    "datasets": "anything that `datasets` loads: a saved folder, Parquet, an audiofolder, a name on the hub",
}
TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.tsv")  # of an audiofolder
TEXT_SUFFIXES = (".normalized.txt", ".txt", ".lab", ".original.txt")  # in order of precedence
# Keys of lhotse's recordings, supervisions and cuts.
LHOTSE_KEYS = (
    {"sources", "sampling_rate", "num_samples"},
    {"recording_id", "start", "duration"},
    {"supervisions", "start", "duration"},
    {"tracks", "type"},
)
AUDIO_TAG = "<audio>"  # placeholder for a clip in ms-swift's texts
HEAD_BYTES = 1 << 16
HEAD_LINES = 20
_MANIFEST_NAME = re.compile(r"(cuts|supervisions).*\.jsonl(\.gz)?$")
MOST_FOLDERS = 10_000  # scanned to guess a folder's format
TEXT_COLUMNS = ("text", *SYNONYMS["text"].split())
DELIMITERS = (",", "\t", ";", "|")
FILE_COLUMNS = ("file_name", "audio", *SYNONYMS["audio"].split())


# Files often mistaken for a manifest, by their first bytes.
_STARTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    b"<!doctype html": "a web page, often the result of a download without login; download the file again",
    b"<html": "a web page, often the result of a download without login; download the file again",
    b"\x1f\x8b": "compressed with gzip; decompress it",
    b"par1": "Parquet; convert it with `python -m higgs_ds import`",
}
_JSON = json.JSONDecoder()


class JsonDict(dict):
    """A JSON object that records its duplicate keys in `repeated`."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


def keys_given_twice(content: bytes, value: object) -> list[str]:
    """Returns the duplicate keys within any object of `content`; JSON readers silently keep the last.

    Args:
        value: the parsed content. The text is parsed again only if it may have more keys than `value`.
    """
    if sum(map(content.count, (b'":', b'" :', b'"\t:'))) == _count_keys(value):
        return []
    repeated: list[str] = []

    def noted(pairs: list[tuple[str, Any]]) -> JsonDict:
        repeated.extend((found := JsonDict(pairs)).repeated)
        return found

    json.loads(content, object_pairs_hook=noted)
    return repeated


def _count_keys(value: object) -> int:
    if not isinstance(value, dict | list):
        return 0
    parts, here = (value.values(), len(value)) if isinstance(value, dict) else (value, 0)
    return here + sum([_count_keys(part) for part in parts if isinstance(part, dict | list)])


def import_command(kind: str | None, path: str | Path) -> str:
    """Returns the command that imports a path; without `kind` it detects the format."""
    return f"python -m higgs_ds import {f'--from {kind} ' if kind else ''}{shlex.quote(str(path))} --output DIR"


def guess(path: Path) -> str | None:
    """Detects the format of a file or folder, one of `FORMATS`; None if it is unknown or unreadable."""
    try:
        if path.is_dir():
            return _guess_folder(path)
        if path.suffix in (".parquet", ".arrow"):
            return "datasets"
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return guess_content(file.read(HEAD_BYTES) if path.suffix == ".gz" else file.read())
    except (OSError, EOFError, zlib.error):
        return None


def guess_content(content: bytes, rows: int = HEAD_LINES) -> str | None:
    """Detects the format of a file's content by its first `rows` rows."""
    text = content[:HEAD_BYTES].removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace").lstrip()
    if text.startswith("["):
        return _guess_rows(_first_elements(text[1:], rows))
    lines = lines_in(text)[:HEAD_LINES]
    if not text.startswith("{"):
        return _guess_table(lines)
    values = [_json(line) for line in lines[:rows]]
    if not isinstance(values[0], dict):  # one object may fill the file
        values.insert(0, _json(content.decode("utf-8-sig", "replace")))
    return _guess_rows(values)


def _first_elements(text: str, count: int) -> list[Any]:
    """Parses up to `count` elements of a JSON array that may be truncated."""
    values: list[Any] = []
    with contextlib.suppress(ValueError, RecursionError):
        while len(values) < count:
            text = text.lstrip(" \t\r\n,")
            value, end = _JSON.raw_decode(text)
            values.append(value)
            text = text[end:]
    return values


def lines_in(text: str) -> list[str]:
    """Splits a text at line breaks only; `splitlines` also splits at U+2028, form feeds and others."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def problem_of_format(path: str, content: bytes) -> str | None:
    """Returns the problem of a file that is clearly not a manifest, such as another tool's; else None."""
    head = content[:64].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if what := next((what for start, what in _STARTS.items() if head.startswith(start)), None):
        return f"is {what}"
    if (kind := guess_content(content, rows=1)) is None:  # one row: mixed files get a fault per bad row
        return _other_json(content)
    return f"is {FORMATS[kind]}, not a manifest; convert it with: {import_command(kind, path)}"


def _other_json(content: bytes) -> str | None:
    """Returns the problem of JSON-like content that is not a manifest, though it may contain rows."""
    text = content[:HEAD_BYTES].decode("utf-8-sig", "replace").lstrip()
    if re.match(r"\[?\s*\{'", text):
        return "contains Python objects (from str()), not JSON; write them with json.dumps"
    if not text.startswith("{"):
        return None
    try:
        value, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError):  # one object may fill the file
        text = content.decode("utf-8-sig", "replace").lstrip()
        if not (found := _first_elements(text, 1)):
            return None
        value, end = found[0], len(text)
    follows = text[end:].split("\n", 1)[0].strip()
    if _is_row(value):
        if "\n" in text[:end].rstrip():
            return "has objects that span several lines; write each on one line, or all as a JSON array"
        if follows == ",":
            return "has a comma after each line; remove the commas, or enclose all objects in [ and ] as a JSON array"
        return "has several objects on one line; write one per line" if follows.startswith("{") else None
    lists = {name: part for name, part in value.items() if isinstance(part, list) and any(map(_is_row, part))}
    by_id = {name: part for name, part in value.items() if _is_row(part)}
    names = ", ".join(f"`{name[:40]}`" for name in [*(lists or by_id)][:3]) + ", …" * (len(lists or by_id) > 3)
    if lists:
        return f"is one object with lists of rows ({names}); write each list to a separate file"
    if by_id:
        return f"is one object that maps ids to rows ({names}); write the rows as a JSON array"
    return None


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not {"messages", *TEXT_COLUMNS, *FILE_COLUMNS}.isdisjoint(map(plain, value))


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
    if any(names <= row.keys() for names in LHOTSE_KEYS):
        return "lhotse"
    if "file_name" in row and "audio" not in row:
        return "audiofolder"
    return None


def table_delimiter(header: str) -> str | None:
    """Returns the delimiter of a table's header with a clip and a text column; None for any other line."""
    for delimiter in DELIMITERS:
        names = {plain(name) for name in next(csv.reader([header], delimiter=delimiter), ())}
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
    """Detects a folder's format by a table at its top, by one further down, or by clips beside text files."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "datasets"
    if (folder / "wav.scp").is_file():
        return "kaldi"
    for name in ("metadata.csv", "metadata.json", "metadata.jsonl", "metadata.tsv", "metadata.txt"):
        if (folder / name).is_file() and (kind := guess(folder / name)):
            return kind
    kind = None
    for count, (parent, folders, names) in enumerate(os.walk(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name in names and guess(Path(parent, name)) == "audiofolder" for name in TABLE_NAMES):
            return "audiofolder"
        if any(name.endswith(".parquet") for name in names):
            return "datasets"
        if any(_MANIFEST_NAME.search(name) and guess(Path(parent, name)) == "lhotse" for name in names):
            return "lhotse"
        if kind is None and any(text is not None for _, text in with_texts(names)):
            kind = "folder"
        if count > MOST_FOLDERS:
            break
    return kind


def with_texts(names: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yields (clip, text file of the same name or None) for a folder's file names, without hidden ones."""
    texts: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        for suffix in TEXT_SUFFIXES:
            if name.lower().endswith(suffix):
                texts[name[: -len(suffix)], suffix] = name
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in AUDIO_SUFFIXES and not name.startswith("."):
            yield name, next((texts[stem, s] for s in TEXT_SUFFIXES if (stem, s) in texts), None)
