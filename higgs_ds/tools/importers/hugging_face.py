"""Data sets as Hugging Face's `datasets` loads them: rows streamed, clips that are bytes written once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...data.foreign import AUDIO_SUFFIXES, FILE_COLUMNS
from .found import SPEAKER_COLUMNS, TWICE, Found, beside, first, named, read_of, split_of, text_of
from .optional import held_back, library
from .parts import part_of

BATCH_ROWS = 16
# Beginnings of files whose name has no ending.
_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"\xff\xf3": ".mp3"}


def read_datasets(path: Path, found: Found, config: str | None = None) -> None:
    """A folder saved to disk, Parquet, an audiofolder, or a name on the hub; no script of a data set is run."""
    datasets = library("datasets")
    is_here = os.path.exists(path)
    written: dict[str, Path] = {}
    with held_back(f"datasets, loading {path},") if is_here else nullcontext():
        for part, data in _parts_of(datasets, path, config, is_here).items():
            names = {column: feature.names for column, feature in (data.features or {}).items() if _has_names(feature)}
            for number, row in enumerate(_rows(data)):
                row |= {column: _name_of(row[column], of) for column, of in names.items() if column in row}
                _add(found, f"{path}: {part}[{number}]", part, row, written)


def _parts_of(datasets: Any, path: Path, config: str | None, is_here: bool) -> dict[str, Any]:
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        data = datasets.load_from_disk(str(path))
    elif path.is_file():
        kind = "arrow" if path.suffix == ".arrow" else "parquet"
        data = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    else:
        data = datasets.load_dataset(str(path), config, streaming=True)
    return dict(data) if isinstance(data, dict) else {"rows": data}


def _rows(data: Any) -> Iterator[dict]:
    """Rows as they are stored: no clip is decoded."""
    for table in data.with_format("arrow").iter(BATCH_ROWS):
        yield from table.to_pylist()


def _has_names(feature: Any) -> bool:
    return isinstance(getattr(feature, "names", None), list)


def _name_of(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _add(found: Found, origin: str, part: str, row: dict, written: dict[str, Path]) -> None:
    values = named(row)
    if values is None:
        found.leave_out(TWICE, origin)
        return
    stated = found.slice_of(origin, values)
    if stated is None:
        return
    found.count_unread(values, read_of(values))
    split = split_of(values) or (part if part_of(part) else None)
    if not found.takes(split):
        return
    clip = next((clip for name in FILE_COLUMNS if (clip := _clip(found, values.get(name), written)) is not None), None)
    more: dict[str, Any] = {"speaker": first(values, *SPEAKER_COLUMNS), "scene": first(values, "scene")}
    found.add(origin, clip, text_of(values), split=split, **more, **stated)


def _clip(found: Found, value: Any, written: dict[str, Path]) -> Path | None:
    """The file of a clip: that which the row names, or one with the row's bytes."""
    name = first({"clip": value}, "clip")
    content = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if not content:
        return beside(found.root, name) if name else None
    digest = hashlib.sha256(content).hexdigest()
    if digest not in written:
        stem, suffix = os.path.splitext(os.path.basename(name or ""))
        if suffix.lower() not in AUDIO_SUFFIXES:
            suffix = next((end for magic, end in _MAGIC.items() if content.startswith(magic)), ".wav")
        written[digest] = found.write_clip(f"{stem[:100] or 'clip'}-{digest[:12]}{suffix}", content)
    return written[digest]
