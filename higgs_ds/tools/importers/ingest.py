"""`python -m higgs_ds import`: data sets of other tools become train.jsonl and val.jsonl with no text in both."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...data.audio import AudioError, read_audio, write_wav
from ...data.chatml import AudioRef, Row, Turn
from ...data.columns import member
from ...data.faults import plural
from ...data.transcripts import text_key
from ...errors import ConfigError
from ...files import write_text, writing
from .formats import read_foreign
from .found import Found
from .parts import part_of

TRIM_DB = 40.0  # below the loudest, where silence begins
TRIM_MARGIN_SEC = 0.1  # of it that is kept at both ends
PEAK = 0.99
LONGEST_STEM = 200  # bytes of a new clip's name, to which a number and an ending come
DEFAULT_VAL_SHARE = 0.02
LEAST_PROMPTS = 10  # conversations with the same words of the user, below which that may be chance
LEAST_BLOCK_SEC, BLOCK_SEC = 0.05, 0.4  # of loudness by ITU-R BS.1770


@dataclass(frozen=True)
class Sound:
    """Processing of every clip; None leaves it as it is."""

    trim: bool = False
    loudness: float | None = None  # LUFS
    resample: int | None = None  # Hz

    def __bool__(self) -> bool:
        return self.trim or self.loudness is not None or self.resample is not None

    def apply(self, waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
        """A mono waveform float32 [samples] trimmed, resampled, and brought to its loudness without clipping."""
        if self.trim:
            waveform = trimmed(waveform, sample_rate)
        if self.resample is not None and self.resample != sample_rate:
            import soxr

            waveform, sample_rate = soxr.resample(waveform, sample_rate, self.resample), self.resample
        if self.loudness is not None:
            waveform = at_loudness(waveform, sample_rate, self.loudness)
        return waveform, sample_rate


def trimmed(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Without the silence at both ends, but for a tenth of a second of it."""
    from librosa.effects import trim

    _, (first, behind) = trim(waveform, top_db=TRIM_DB, frame_length=1024, hop_length=256)
    margin = round(TRIM_MARGIN_SEC * sample_rate)
    return waveform[max(0, first - margin) : behind + margin]


def at_loudness(waveform: np.ndarray, sample_rate: int, lufs: float) -> np.ndarray:
    """At an integrated loudness; softer where it would clip, unchanged where there is nothing to measure."""
    import pyloudnorm

    seconds = len(waveform) / sample_rate
    if seconds < LEAST_BLOCK_SEC:
        return waveform
    meter = pyloudnorm.Meter(sample_rate, block_size=min(BLOCK_SEC, 0.99 * seconds))
    found = meter.integrated_loudness(waveform.astype(np.float64))
    if not np.isfinite(found):
        return waveform
    gain = 10 ** ((lufs - found) / 20)
    peak = float(np.abs(waveform).max()) * gain
    return (waveform * (gain * min(1.0, PEAK / peak))).astype(np.float32)


def run_import(
    path: Path,
    output_dir: Path,
    *,
    kind: str | None = None,
    val_share: float | None = None,
    val_speakers: list[str] | None = None,
    with_test: bool = False,
    seed: int = 0,
    sound: Sound | None = None,
) -> list[str]:
    """Writes train.jsonl and, where it gets rows, val.jsonl; the lines to say.

    Raises:
        ConfigError: nothing that can be read, no row left, speakers that are not there.
        FileExistsError: the folder holds a manifest already.
    """
    for name in ("train.jsonl", "val.jsonl"):
        if os.path.exists(output_dir / name):
            raise FileExistsError(f"{output_dir} already holds {name}; remove it or give another --output")
    with contextlib.ExitStack() as stack:
        clips = output_dir / "clips"
        if sound:  # sound that is not in files waits in one that is made anew
            clips = output_dir / ".clips"
            stack.callback(shutil.rmtree, clips, ignore_errors=True)
        kind, found = read_foreign(path, kind, with_test=with_test, clips=clips)
        before = _parts_lines(path, found, val_share=val_share, val_speakers=val_speakers)

        def shared_out() -> tuple[list[dict], list[dict], list[str]]:
            if not found.rows:
                raise ConfigError([*found.lines(path), *before, f"{path}: no row is left, read as {kind}"])
            share = DEFAULT_VAL_SHARE if val_share is None else val_share
            return split(found.rows, val_share=share, val_speakers=val_speakers, seed=seed)

        with writing(f"--output: {output_dir}"):
            output_dir.mkdir(parents=True, exist_ok=True)
            train, val, notes = shared_out()
            if sound:  # only now: what cannot be split is said before hours of clips are written
                _write_clips(found, output_dir / "clips", sound)
                train, val, notes = shared_out()
            sides = [(output_dir / f"{side}.jsonl", rows) for side, rows in (("train", train), ("val", val)) if rows]
            for file, rows in sides:
                write_text(file, "".join(_line_of(row) for row in rows))
    summaries = (_summary(file, rows) for file, rows in sides)
    said = [f"{path}: read as {kind}", *found.lines(path), *before, *notes, *summaries]
    flags = " ".join(f"--{file.stem}_manifest {file}" for file, _ in sides)
    return [*said, f"next: python -m higgs_ds describe {flags}"]


def _line_of(row: dict) -> str:
    return json.dumps({name: value for name, value in row.items() if name != "split"}, ensure_ascii=False) + "\n"


def _parts_lines(path: Path, found: Found, *, val_share: float | None, val_speakers: list[str] | None) -> list[str]:
    """One line on what becomes of each part of the corpus's own split; one on a flag that has no effect beside it."""
    if not found.parts:
        return []
    has_val = any(part_of(name) == "val" for name in found.parts) and not val_speakers
    drawn = "--val_speakers" if val_speakers else "--val_share"
    said = []
    for name, count in found.parts.items():
        part = part_of(name)
        if part == "test" and not found.with_test:
            place = "in neither file (--with_test takes them)"
        elif has_val:
            place = "val.jsonl" if part == "val" else "train.jsonl"
        else:
            place = f"train.jsonl, or val.jsonl by {drawn}"
        said.append(f"{member('', name)}: {plural(count, 'row')}, {place}")
    lines = [f"{path}: the corpus's own split: {'; '.join(said)}"]
    if has_val and val_share is not None:
        lines.append("--val_share: not used, the corpus has a part for validation")
    return lines


def split(
    rows: list[dict], *, val_share: float, val_speakers: list[str] | None, seed: int
) -> tuple[list[dict], list[dict], list[str]]:
    """(training rows, validation rows, notes), never a text on both.

    By speaker where some are named, else by the corpus's own parts where it has one for validation, else by share.
    A single number for `val_speakers` draws so many. Texts are the same whatever their case and punctuation.

    Raises:
        ConfigError: speakers that are not there, or no row left to train on.
    """
    if val_speakers:
        return _split_by_speaker(rows, val_speakers, seed)
    if any("split" in row for row in rows):
        if all("split" in row for row in rows):
            raise ConfigError(["no row is left to train on: all are of the corpus's part for validation"])
        return _held_out(rows, ["split" in row for row in rows])
    groups: dict[str, list[int]] = {}
    for i, key in enumerate(text_keys(rows)):
        groups.setdefault(key, []).append(i)
    wanted = round(val_share * len(rows))
    if val_share > 0 and wanted == 0 and len(groups) > 1:
        wanted = 1
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for key in order:
        if len(chosen) + len(groups[key]) <= wanted and len(groups) > 1:
            chosen.update(groups[key])
    train = [row for i, row in enumerate(rows) if i not in chosen]
    note = "no validation rows: every text is shared by too many rows to be held out"
    return train, [row for i, row in enumerate(rows) if i in chosen], [note] if wanted and not chosen else []


def _split_by_speaker(rows: list[dict], named: list[str], seed: int) -> tuple[list[dict], list[dict], list[str]]:
    speakers = sorted({row["speaker"] for row in rows if "speaker" in row})
    if len(named) == 1 and named[0].isdecimal() and named[0] not in speakers:
        named = random.Random(seed).sample(speakers, min(int(named[0]), len(speakers)))
    if unknown := [name for name in named if name not in speakers]:
        known = ", ".join(speakers[:20]) or "none"
        raise ConfigError([f"--val_speakers: {', '.join(unknown)}: no such speaker; the speakers are {known}"])
    if all(row.get("speaker") in named for row in rows):
        raise ConfigError([f"--val_speakers: no row is left to train on, of {plural(len(speakers), 'speaker')}"])
    return _held_out(rows, [row.get("speaker") in named for row in rows])


def _held_out(rows: list[dict], is_val: list[bool]) -> tuple[list[dict], list[dict], list[str]]:
    """(training rows, validation rows whose text is not trained on, notes)."""
    keys = text_keys(rows)
    trained = {key for key, val in zip(keys, is_val, strict=True) if not val}
    train = [row for row, val in zip(rows, is_val, strict=True) if not val]
    kept = [row for row, key, val in zip(rows, keys, is_val, strict=True) if val and key not in trained]
    note = f"left out of validation: {plural(sum(is_val) - len(kept), 'row')} whose text is trained on too"
    return train, kept, [note] if len(kept) < sum(is_val) else []


def text_keys(rows: list[dict]) -> list[str]:
    """For each row the same as for all that speak its text; a row of which no text is known is told by all of it.

    A user's turn that most conversations share is a prompt, such as `Read it.`, and not what is spoken.
    """
    texts = [_spoken(row) for row in rows]
    asked = Counter(text_key(text) for text, is_asked in texts if text is not None and is_asked)
    [(prompt, count)] = asked.most_common(1) or [("", 0)]
    talks = sum("messages" in row for row in rows)
    shared = prompt if count >= LEAST_PROMPTS and count > talks / 2 else None
    return [
        json.dumps(row) if text is None or (is_asked and text_key(text) == shared) else text_key(text)
        for row, (text, is_asked) in zip(rows, texts, strict=True)
    ]


def _spoken(row: dict) -> tuple[str | None, bool]:
    """(what a row's last clip says, whether it stands in the user's turn of a conversation and may be a mere prompt).

    Nothing is known to be spoken where the user's turn holds a clip: its words are about that clip.
    """
    if "text" in row:
        return row["text"], False
    turns = tuple(Turn(message["role"], _pieces(message["content"])) for message in row["messages"])
    spoken = Row(turns, None, None, "", 0).target()
    if spoken is None or any(isinstance(piece, str) for piece in turns[-1].content):
        return (None if spoken is None else spoken[0]), False
    is_about_clip = any(isinstance(piece, AudioRef) for piece in turns[-2].content)
    return (None if is_about_clip else spoken[0]), True


def _pieces(content: str | list[dict]) -> tuple[str | AudioRef, ...]:
    if isinstance(content, str):
        return (content,)
    return tuple(AudioRef(Path(p["audio_url"])) if p["type"] == "audio" else p["text"] for p in content)


def _write_clips(found: Found, folder: Path, sound: Sound) -> None:
    """New clips in the place of all that the rows name; rows whose clip cannot be used are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[AudioRef, str | None] = {}
    taken: dict[str, int] = {}
    kept = []
    for row in tqdm(found.rows, desc="clips", unit="clip", mininterval=1.0):
        written = []
        for name, holder, clip in list(_clips_of(row)):
            if clip not in done:
                done[clip] = _write_clip(clip, folder, taken, sound, found)
            written.append(done[clip])
            holder[name] = done[clip] or holder[name]
        if None not in written:
            row.pop("offset", None)  # the new clip is that slice, of that channel
            row.pop("channel", None)
            if sound.trim:
                row.pop("duration", None)  # that of the clip before
            kept.append(row)
    found.rows = kept


def _clips_of(row: dict) -> Iterable[tuple[str, dict, AudioRef]]:
    """(key, object that has it, clip) for each of a row's clips."""
    if "audio" in row:
        span = (row["offset"], row.get("duration")) if "offset" in row else ()
        part: dict[str, Any] = {"channel": row["channel"]} if "channel" in row else {}
        yield "audio", row, AudioRef(Path(row["audio"]), None, *span, **part)
    if "ref_audio" in row:
        yield "ref_audio", row, AudioRef(Path(row["ref_audio"]))
    for message in row.get("messages", ()):
        if isinstance(message["content"], list):
            pieces = (piece for piece in message["content"] if piece["type"] == "audio")
            yield from (("audio_url", piece, AudioRef(Path(piece["audio_url"]))) for piece in pieces)


def _free_name(source: str, taken: dict[str, int]) -> str:
    """A clip's name without its ending, with a number behind it where others have it.

    `taken` holds the names, each with the last number that was put behind it.
    """
    stem = Path(source).stem.encode("utf-8", "replace")[:LONGEST_STEM].decode("utf-8", "ignore")
    name, number = stem, taken.get(stem, 1)
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken |= {name: 1, stem: number}
    return name


def _write_clip(clip: AudioRef, folder: Path, taken: dict[str, int], sound: Sound, found: Found) -> str | None:
    """The new clip's path relative to the manifest; None for a clip that cannot be used."""
    try:
        waveform, sample_rate = sound.apply(*read_audio(clip))
    except AudioError as error:
        found.leave_out("clips that cannot be used", f"{clip.path}: {error}")
        return None
    stem = _free_name(str(clip.path), taken)
    write_wav(folder / f"{stem}.wav", waveform, sample_rate)
    return f"{folder.name}/{stem}.wav"


def _summary(path: Path, rows: list[dict]) -> str:
    speakers = len({row["speaker"] for row in rows if "speaker" in row})
    return f"{path}: {plural(len(rows), 'row')}" + (f", {plural(speakers, 'speaker')}" if speakers else "")
