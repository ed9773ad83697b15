"""lhotse's manifests, its recipes for corpora, and Kaldi folders: rows from recordings with supervisions, and cuts."""

from __future__ import annotations

import contextlib
import gzip
import inspect
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...data.columns import member
from ...errors import ConfigError, nearest, words_of
from .found import Found, beside
from .optional import held_back, library
from .parts import part_of

_KIND = re.compile(r"(recordings|supervisions|cuts)")
_UNREAD = ("language", "gender")  # beside all that is custom
MICROSECONDS = 1_000_000  # a rate at which times of Kaldi's segments stay as they are written
TOLERANCE_SEC = 0.0015  # by which durations are rounded; Kaldi's to a thousandth
_SOURCES = {
    "command": "recordings whose sound comes from a command (never run)",
    "url": "recordings whose sound is at an address (never fetched)",
}


def read_lhotse(path: Path, found: Found, recipe: str | None = None) -> None:
    """Cuts, or recordings with supervisions, a file's name being that of its part; or what a recipe makes."""
    library("lhotse")
    if recipe is not None:
        _read_recipe(path, found, recipe)
        return
    groups: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in _files(path):
        [kind] = _KIND.findall(file.name)[-1:]
        groups.setdefault((file.parent, _KIND.sub("", file.name)), {})[kind] = file
    if not groups:
        raise ValueError("it holds no cuts, and no recordings with supervisions, as .jsonl or .jsonl.gz")
    for files in groups.values():
        alone = next(iter(files.values()))
        part = None if path.is_file() else next((w for w in re.split(r"[_.]", alone.name) if part_of(w)), None)
        if "cuts" in files:
            for other in files.keys() - {"cuts"}:
                found.leave_out("manifests beside cuts that are read", str(files[other]))
            _add_cuts(found, _items(files["cuts"], found), part)
        elif len(files) < 2:
            found.leave_out("recordings without supervisions, or the other way round", str(alone))
        else:
            recordings, segments = (_items(files[kind], found) for kind in ("recordings", "supervisions"))
            _add_segments(found, (item for _, item in recordings), segments, part)


def _files(path: Path) -> list[Path]:
    """Manifests of a folder; a file, and the supervisions of recordings or the recordings of supervisions beside it."""
    if path.is_dir():
        names = sorted(file for file in path.rglob("*") if file.name.endswith((".jsonl", ".jsonl.gz")))
        return [file for file in names if _KIND.search(file.name)]
    if path.name.endswith((".jsonl", ".jsonl.gz")) and _KIND.search(path.name) is None:
        raise ValueError("its name has none of `cuts`, `recordings` and `supervisions`, as lhotse's manifests do")
    if "cuts" in path.name:
        return [path]
    beside_it = [path.with_name(_KIND.sub(kind, path.name)) for kind in ("recordings", "supervisions")]
    return [file for file in beside_it if file.is_file()]


def _items(file: Path, found: Found) -> Iterator[tuple[str, Any]]:
    """(`file:line`, lhotse's object) of a manifest; lines that lhotse does not understand are left out."""
    from lhotse.serialization import deserialize_item

    problems = (ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError, RecursionError)
    with (
        gzip.open(file, "rt", encoding="utf-8-sig")
        if file.suffix == ".gz"
        else file.open(encoding="utf-8-sig") as lines
    ):
        for number, line in enumerate(lines, start=1):
            if line.strip():
                origin = f"{file}:{number}"
                try:
                    yield origin, deserialize_item(json.loads(line))
                except problems as error:
                    found.leave_out("lines that lhotse cannot read", f"{origin}: {words_of(error)}")


def _add_cuts(found: Found, cuts: Iterable[tuple[str, Any]], part: str | None) -> None:
    from lhotse.cut import MonoCut, MultiCut

    for origin, cut in cuts:
        if not isinstance(cut, (MonoCut, MultiCut)):
            found.leave_out("cuts that are mixed of others, or no cuts", origin)
        elif cut.recording is None:
            found.leave_out("cuts without a recording", origin)
        else:
            _count_custom(found, cut.custom)
            for segment in cut.supervisions:
                if segment.start < -TOLERANCE_SEC or segment.end > cut.duration + TOLERANCE_SEC:
                    found.leave_out("supervisions that go beyond their cut", origin)
                    continue
                channel = segment.channel if isinstance(cut, MultiCut) else cut.channel
                _add_segment(found, origin, cut.recording, segment, cut.start + segment.start, channel, part)
            if not cut.supervisions:
                found.leave_out("cuts without a supervision", origin)


def _add_segments(
    found: Found, recordings: Iterable[Any], segments: Iterable[tuple[str, Any]], part: str | None
) -> None:
    by_id = {recording.id: recording for recording in recordings}
    for origin, segment in segments:
        if segment.recording_id not in by_id:
            found.leave_out("supervisions of no recording", origin)
            continue
        recording = by_id[segment.recording_id]
        _add_segment(found, origin, recording, segment, segment.start, segment.channel, part)


def _add_segment(
    found: Found, origin: str, recording: Any, segment: Any, start: float, channel: Any, part: str | None
) -> None:
    """One speech row: the span of a supervision in the file that holds its channels."""
    channels = {*channel} if isinstance(channel, (list, tuple)) else {channel}
    source = next((source for source in recording.sources if channels <= {*source.channels}), None)
    end = start + segment.duration
    if source is None:
        found.leave_out("supervisions of channels that no file of their recording holds", origin)
    elif source.type != "file":
        reason = _SOURCES.get(source.type, "recordings whose sound is in no file")
        found.leave_out(reason, f"{origin}: {str(source.source)[:200]}")
    elif recording.transforms:
        found.leave_out("recordings that are transformed, as in speed", origin)
    elif end > recording.duration + TOLERANCE_SEC or start < -TOLERANCE_SEC:
        found.leave_out("supervisions that go beyond their recording", origin)
    elif 1 < len(channels) < len(source.channels):
        found.leave_out("supervisions of several channels of a file, but not of all", origin)
    else:
        more: dict[str, Any] = {"speaker": segment.speaker}
        if start > TOLERANCE_SEC or end < recording.duration - TOLERANCE_SEC:
            more |= {"offset": round(max(0.0, start), 6), "duration": round(segment.duration, 6)}
        if len(channels) < len(source.channels):
            more["channel"] = [*source.channels].index(*channels)
        _count_custom(found, {name: getattr(segment, name) for name in _UNREAD}, segment.custom)
        clip = beside(found.root, str(source.source))
        found.add(origin, clip, segment.text, split=part, **more)


def _count_custom(found: Found, *fields: dict | None) -> None:
    for name in (name for held in fields for name, value in (held or {}).items() if value not in (None, "", [], {})):
        found.columns[member("", name)] += 1


def _read_recipe(path: Path, found: Found, recipe: str) -> None:
    """The manifests that `lhotse.recipes.prepare_RECIPE` makes of a corpus; `RECIPE,NAME=VALUE` gives it an option."""
    recipes = library("lhotse.recipes")
    name, *options = recipe.split(",")
    known = [key.removeprefix("prepare_") for key in dir(recipes) if key.startswith("prepare_")]
    if name not in known:
        raise ConfigError(
            [f"--from lhotse:{name}: no such recipe{nearest(name, known)}; lhotse has {', '.join(known)}"]
        )
    prepare = getattr(recipes, f"prepare_{name}")
    parameters = inspect.signature(prepare).parameters
    given = dict(option.partition("=")[::2] for option in options)
    if unknown := given.keys() - parameters.keys():
        raise ConfigError([f"--from lhotse:{name}: no option {', '.join(unknown)}; it has {', '.join(parameters)}"])
    values: dict[str, Any] = {key: _value(text) for key, text in given.items()}
    if "dataset_parts" in parameters and "dataset_parts" not in values:
        there = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and part_of(folder.name))
        values |= {"dataset_parts": there} if there else {}
    if "use_edinburgh_vctk_url" in parameters:  # the corpus as it has been since version 0.92
        values.setdefault("use_edinburgh_vctk_url", (path / "wav48_silence_trimmed").is_dir())
    with tempfile.TemporaryDirectory() as made, held_back(f"lhotse.recipes.{prepare.__name__}"):
        if "output_dir" in parameters:
            values.setdefault("output_dir", made)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a bar for each speaker
                manifests = prepare(str(path.resolve()), **values)
        except Exception as error:
            takes = ", ".join(parameters)
            advice = f"is it the corpus's folder? the recipe takes {takes}, given as lhotse:{name},NAME=VALUE"
            raise ConfigError([f"{path}: lhotse.recipes.prepare_{name}: {words_of(error)}; {advice}"]) from error
        if not _add_manifests(found, manifests, path, ()):
            raise ValueError(f"lhotse.recipes.prepare_{name} makes no recordings with supervisions of it")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def _add_manifests(found: Found, manifests: Any, path: Path, names: tuple[str, ...]) -> bool:
    """Rows of what a recipe gives back, parts and languages being keys; False where there are none.

    In the order of their names, since recipes give them in that of the disk. Sets are told by their class: the recipe
    of AISHELL-3 gives each by the other's name.
    """
    from lhotse import CutSet, RecordingSet, SupervisionSet

    if not isinstance(manifests, dict):
        return False
    part = next((name for name in names if part_of(name)), None)
    where = " ".join((str(path), *names))
    held = {kind: item for item in manifests.values() for kind in (CutSet, RecordingSet, SupervisionSet)
            if isinstance(item, kind)}  # fmt: skip
    if CutSet in held:
        _add_cuts(found, ((f"{where}: {cut.id}", cut) for cut in held[CutSet]), part)
    elif RecordingSet in held and SupervisionSet in held:
        segments = (
            (f"{where}: {segment.id}", segment) for segment in sorted(held[SupervisionSet], key=lambda of: of.id)
        )
        _add_segments(found, held[RecordingSet], segments, part)
    else:
        added = [_add_manifests(found, item, path, (*names, str(key))) for key, item in sorted(manifests.items())]
        return any(added)
    return True


def read_kaldi(path: Path, found: Found) -> None:
    """A Kaldi folder by lhotse's loader. Raises ValueError for a `wav.scp` with commands, which are never run."""
    kaldi = library("lhotse.kaldi")
    folder = path if path.is_dir() else path.parent
    paths: dict[str, str] = {}
    for number, line in enumerate((folder / "wav.scp").read_text(encoding="utf-8").splitlines(), start=1):
        key, _, place = line.strip().partition(" ")
        if place.strip().endswith("|") or place.strip().startswith("|"):
            advice = "a command, which is never run; write the files that it makes, and name these"
            raise ConfigError([f"{folder / 'wav.scp'}:{number}: {key} is {place.strip()!r}: {advice}"])
        paths[key] = place.strip()
    if not (folder / "text").is_file():
        raise ValueError("it has no file `text`")
    clips = {key: beside(folder, place).absolute() for key, place in paths.items()}
    there = {key: clip for key, clip in clips.items() if found.has_clip(clip, f"{folder / 'wav.scp'}: {key}")}
    with tempfile.TemporaryDirectory() as made, held_back("lhotse.kaldi"):
        _copy_kaldi(folder, Path(made), there)
        recordings, segments, _ = kaldi.load_kaldi_data_dir(made, sampling_rate=MICROSECONDS)
    if segments is None:
        raise ValueError("it has neither `segments` nor `utt2spk`")
    _add_segments(found, recordings, ((f"{folder}: {segment.id}", segment) for segment in segments), None)


def _copy_kaldi(folder: Path, made: Path, clips: dict[str, Path]) -> None:
    """The same folder, whose `wav.scp` has whole paths of clips that are there, so that lhotse finds each."""
    is_whole = not (folder / "segments").is_file()
    for name in ("text", "utt2spk", "segments"):
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.split(maxsplit=1)[:1] and (not is_whole or line.split()[0] in clips)]
            (made / name).write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    (made / "wav.scp").write_text("".join(f"{key} {clip}\n" for key, clip in clips.items()), encoding="utf-8")
