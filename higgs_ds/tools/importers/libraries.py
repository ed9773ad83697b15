"""Readers that use lhotse (manifests, recipes) and datasets, with commands and the network blocked."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from ...data.columns import member
from ...data.foreign import AUDIO_SUFFIXES
from ...errors import ConfigError, nearest, words_of
from .found import Found, beside, word_of
from .parts import part_of

_KIND = re.compile(r"(recordings|supervisions|cuts)")
TOLERANCE_SEC = 0.0015  # rounding of durations
_SOURCES = {
    "command": "recordings with audio from a command (never run)",
    "url": "recordings with audio at a URL (never fetched)",
}
_Items = Iterable[tuple[str, Any]]  # location and lhotse's object
BATCH_ROWS = 16
# First bytes, for clips without a suffix.
_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff\xfb": ".mp3", b"\xff\xf3": ".mp3"}
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_NETWORK = ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
_refused: list[str] = []  # what is blocked now, if anything; an audit hook cannot be removed


def library(name: str) -> ModuleType:
    """Imports a module. Raises ConfigError with the command to install it if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        advice = "pip install -r requirements-import.txt"
        raise ConfigError([f"{name} is required for this format: {advice} ({error})"]) from error


@contextlib.contextmanager
def sandboxed(what: str) -> Iterator[None]:
    """Blocks starting programs and network access inside the context, whatever the user's files contain.

    Raises:
        PermissionError: the code tried either; the message names it as `what`.
    """
    _install()
    _refused[:] = [what]
    try:
        yield
    finally:
        _refused.clear()


@functools.cache
def _install() -> None:
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple) -> None:
    if not _refused:
        return
    if event in _PROGRAMS:
        raise PermissionError(f"{_refused[0]} tried to run a program ({args[0]}), which is not allowed")
    if event in _NETWORK or (event == "socket.connect" and isinstance(args[1], tuple)):
        raise PermissionError(f"{_refused[0]} tried to access the network; only local files are read")


def read_lhotse(path: Path, found: Found, recipe: str | None = None) -> None:
    """Reads cuts, or recordings with supervisions, with parts by file name; or the result of a recipe."""
    library("lhotse")
    if recipe is not None:
        _read_recipe(path, found, recipe)
        return
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in _files(path):
        groups.setdefault((file.parent, _KIND.sub("", file.name)), {})[_KIND.findall(file.name)[-1]] = file
    if not groups:
        raise ValueError("it has no cuts and no recordings with supervisions, as .jsonl or .jsonl.gz")
    for (_, name), files in groups.items():
        part = None if path.is_file() else next((word for word in re.split(r"[_.]", name) if part_of(word)), None)
        for other in (file for kind, file in files.items() if "cuts" in files and kind != "cuts"):
            found.leave_out("manifests beside cuts, which are read instead", str(other))
        if "cuts" in files:
            _add_cuts(found, _items(files["cuts"], found), part)
        elif len(files) < 2:
            found.leave_out("recordings without supervisions, or vice versa", str(*files.values()))
        else:
            _add_segments(found, _items(files["recordings"], found), _items(files["supervisions"], found), part)


def _files(path: Path) -> list[Path]:
    """Returns a folder's manifests; for a file, also the matching recordings or supervisions beside it."""
    if path.is_dir():
        return [file for file in sorted(path.rglob("*.jsonl*")) if _KIND.search(file.name) and file.suffix != ".tmp"]
    if not _KIND.search(path.name):
        raise ValueError("its name must contain `cuts`, `recordings` or `supervisions`, as lhotse's manifests do")
    kinds = ("cuts",) if "cuts" in path.name else ("recordings", "supervisions")
    return [file for kind in kinds if (file := path.with_name(_KIND.sub(kind, path.name))).is_file()]


def _items(file: Path, found: Found) -> Iterator[tuple[str, Any]]:
    """Yields (`file:line`, lhotse's object) of a manifest; counts and leaves out lines that lhotse cannot read."""
    from lhotse.serialization import deserialize_item

    problems = (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError, RecursionError)
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield f"{file}:{number}", deserialize_item(json.loads(line))
                except problems as error:
                    found.leave_out("lines that lhotse cannot read", f"{file}:{number}: {words_of(error)}")


def _add_cuts(found: Found, cuts: _Items, part: str | None) -> None:
    from lhotse.cut import MonoCut, MultiCut

    for origin, cut in cuts:
        if not isinstance(cut, (MonoCut, MultiCut)):
            found.leave_out("mixed cuts, or objects that are not cuts", origin)
        elif cut.recording is None or not cut.supervisions:
            found.leave_out("cuts without a recording or a supervision", origin)
        else:
            _count_unread(found, cut.custom)
            for segment in cut.supervisions:
                if segment.start < -TOLERANCE_SEC or segment.end > cut.duration + TOLERANCE_SEC:
                    found.leave_out("supervisions that extend beyond their cut", origin)
                    continue
                channel = segment.channel if isinstance(cut, MultiCut) else cut.channel
                _add_segment(found, origin, cut.recording, segment, cut.start + segment.start, channel, part)


def _add_segments(found: Found, recordings: _Items, segments: _Items, part: str | None) -> None:
    by_id = {recording.id: recording for _, recording in recordings}
    for origin, segment in segments:
        if segment.recording_id in by_id:
            recording = by_id[segment.recording_id]
            _add_segment(found, origin, recording, segment, segment.start, segment.channel, part)
        else:
            found.leave_out("supervisions without a recording", origin)


def _add_segment(
    found: Found, origin: str, recording: Any, segment: Any, start: float, channel: Any, part: str | None
) -> None:
    """Adds one speech row: a supervision's span in the file with its channels."""
    channels = {*channel} if isinstance(channel, (list, tuple)) else {channel}
    source = next((source for source in recording.sources if channels <= {*source.channels}), None)
    end = start + segment.duration
    if source is None:
        found.leave_out("supervisions of channels that are in no file of their recording", origin)
    elif source.type != "file":
        reason = _SOURCES.get(source.type, "recordings with audio that is not in a file")
        found.leave_out(reason, f"{origin}: {str(source.source)[:200]}")
    elif recording.transforms:
        found.leave_out("transformed recordings, such as of another speed", origin)
    elif end > recording.duration + TOLERANCE_SEC or start < -TOLERANCE_SEC:
        found.leave_out("supervisions that extend beyond their recording", origin)
    elif 1 < len(channels) < len(source.channels):
        found.leave_out("supervisions of several, but not all channels of a file", origin)
    else:
        more: dict[str, Any] = {"speaker": segment.speaker}
        if start > TOLERANCE_SEC or end < recording.duration - TOLERANCE_SEC:
            more |= {"offset": round(max(0.0, start), 6), "duration": round(segment.duration, 6)}
        if len(channels) < len(source.channels):
            more["channel"] = [*source.channels].index(*channels)
        _count_unread(found, {"language": segment.language, "gender": segment.gender, **(segment.custom or {})})
        found.add(origin, beside(found.root, str(source.source)), segment.text, split=part, **more)


def _count_unread(found: Found, fields: dict | None) -> None:
    found.columns.update(member("", name) for name, value in (fields or {}).items() if value not in (None, "", [], {}))


def _threads(max_workers: int | None = None, mp_context: Any = None, **options: Any) -> ThreadPoolExecutor:
    """Replaces a recipe's process pool, since a new process would not be sandboxed."""
    return ThreadPoolExecutor(max_workers, **options)


def _read_recipe(path: Path, found: Found, recipe: str) -> None:
    """Reads the manifests of `lhotse.recipes.prepare_RECIPE`; `RECIPE,NAME=VALUE` gives it an option."""
    recipes = library("lhotse.recipes")
    name, *options = recipe.split(",")
    known = [key.removeprefix("prepare_") for key in dir(recipes) if key.startswith("prepare_")]
    if name not in known:
        raise ConfigError(
            [f"--from lhotse:{name}: recipe not found{nearest(name, known)}; lhotse has {', '.join(known)}"]
        )
    prepare = getattr(recipes, f"prepare_{name}")
    parameters = inspect.signature(prepare).parameters
    values: dict[str, Any] = {key: _value(text) for key, _, text in (option.partition("=") for option in options)}
    if unknown := values.keys() - parameters.keys():
        raise ConfigError([f"--from lhotse:{name}: no option {', '.join(unknown)}; it has {', '.join(parameters)}"])
    there = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and part_of(folder.name))
    if "dataset_parts" in parameters and there:
        values.setdefault("dataset_parts", there)
    if "use_edinburgh_vctk_url" in parameters:  # layout of version 0.92
        values.setdefault("use_edinburgh_vctk_url", (path / "wav48_silence_trimmed").is_dir())
    pool = mock.patch.object(sys.modules[prepare.__module__], "ProcessPoolExecutor", _threads, create=True)
    with tempfile.TemporaryDirectory() as made, sandboxed(f"lhotse.recipes.{prepare.__name__}"), pool:
        if "output_dir" in parameters:
            values.setdefault("output_dir", made)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # hides a progress bar per speaker
                manifests = prepare(str(path.resolve()), **values)
        except Exception as error:
            takes = ", ".join(parameters)
            advice = f"is this the corpus's folder? options of the recipe: {takes}, given as lhotse:{name},NAME=VALUE"
            raise ConfigError([f"{path}: lhotse.recipes.prepare_{name}: {words_of(error)}; {advice}"]) from error
        if not _add_manifests(found, manifests, path, ()):
            raise ValueError(f"lhotse.recipes.prepare_{name} found no recordings with supervisions")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def _add_manifests(found: Found, manifests: Any, path: Path, names: tuple[str, ...]) -> bool:
    """Adds the rows of a recipe's result, nested by part and language; returns False if there are none.

    Sorts by id and key, since recipes return the order of the disk. Sets are recognised by class: the recipe of
    AISHELL-3 swaps their names.
    """
    from lhotse import CutSet, RecordingSet, SupervisionSet

    if not isinstance(manifests, dict):
        return False
    part = next((name for name in names if part_of(name)), None)
    where = " ".join((str(path), *names))
    held = {type(item): [(f"{where}: {of.id}", of) for of in sorted(item, key=lambda of: of.id)]
            for item in manifests.values() if isinstance(item, (CutSet, RecordingSet, SupervisionSet))}  # fmt: skip
    if CutSet in held:
        _add_cuts(found, held[CutSet], part)
    elif {RecordingSet, SupervisionSet} <= held.keys():
        _add_segments(found, held[RecordingSet], held[SupervisionSet], part)
    else:
        added = [_add_manifests(found, item, path, (*names, str(key))) for key, item in sorted(manifests.items())]
        return any(added)
    return True


def read_datasets(path: Path, found: Found, config: str | None = None) -> None:
    """Reads a folder saved to disk, Parquet, an audiofolder, or a name on the hub; runs no data set scripts."""
    datasets = library("datasets")
    is_here = os.path.exists(path)
    find = functools.partial(_clip, found, {})
    with sandboxed(f"datasets, loading {path},") if is_here else contextlib.nullcontext():
        for part, data in _parts_of(datasets, path, config).items():
            split = part if part_of(part) else None
            for number, row in enumerate(_rows(data)):
                found.take(f"{path}: {part}[{number}]", row, find, split)


def _parts_of(datasets: Any, path: Path, config: str | None) -> dict[str, Any]:
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        data = datasets.load_from_disk(str(path))
    elif path.is_file():
        kind = "arrow" if path.suffix == ".arrow" else "parquet"
        data = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    else:
        data = datasets.load_dataset(str(path), config, streaming=True)
    return dict(data) if isinstance(data, dict) else {"rows": data}


def _rows(data: Any) -> Iterator[dict]:
    """Yields rows as stored, without decoding clips, but with class names instead of class numbers."""
    labels = {name: of.names for name, of in (data.features or {}).items() if isinstance(getattr(of, "names", 0), list)}
    for table in data.with_format("arrow").iter(BATCH_ROWS):
        for row in table.to_pylist():
            for name, names in labels.items():
                number = row.get(name)
                row[name] = names[number] if isinstance(number, int) and 0 <= number < len(names) else None
            yield row


def _clip(found: Found, written: dict[str, Path], value: Any) -> Path | None:
    """Returns a clip's file: the one that the row names, or a new one with the row's bytes."""
    name = word_of(value)
    content = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if not content:
        return beside(found.root, name) if name else None
    digest = hashlib.sha256(content).hexdigest()
    if digest not in written:
        if found.clips is None:
            raise ValueError("its clips are bytes, but no folder is given for writing them")
        stem, suffix = os.path.splitext(os.path.basename(name or ""))
        if suffix.lower() not in AUDIO_SUFFIXES:
            suffix = next((end for magic, end in _MAGIC.items() if content.startswith(magic)), ".wav")
        found.clips.mkdir(parents=True, exist_ok=True)
        written[digest] = found.clips / f"{stem[:100] or 'clip'}-{digest[:12]}{suffix}"
        written[digest].write_bytes(content)
    return written[digest]
