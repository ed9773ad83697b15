"""`python -m higgs_ds import`: converts other tools' data sets to train.jsonl and val.jsonl, with no text in both."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...data.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE, AudioError, read_audio, write_wav
from ...data.chatml import AudioRef
from ...data.columns import member
from ...data.faults import plural
from ...data.foreign import FORMATS
from ...data.transcripts import text_key
from ...errors import ConfigError, ExitCode
from ...files import write_text, writing
from ...judges.sound import loudness_of
from ...process import say
from .. import flag_types
from .formats import read_foreign
from .found import Found
from .parts import part_of

TRIM_DB = 40.0  # threshold of silence, below the peak
TRIM_MARGIN_SEC = 0.1  # silence kept at both ends
PEAK = 0.99
LONGEST_STEM = 200  # bytes of a new clip's name, without number and suffix
DEFAULT_VAL_SHARE = 0.02
LEAST_PROMPTS = 10  # equal user turns in conversations; fewer may be chance


@dataclass(frozen=True)
class Sound:
    """Processing of every clip; None changes nothing."""

    trim: bool = False
    loudness: float | None = None  # LUFS
    resample: int | None = None  # Hz

    def __bool__(self) -> bool:
        return self.trim or self.loudness is not None or self.resample is not None

    def apply(self, waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
        """Trims, resamples and normalises the loudness of a mono waveform, float32 [samples].

        The gain is limited to avoid clipping; a waveform without measurable loudness keeps its level.
        """
        if self.trim:
            from librosa.effects import trim

            _, (start, end) = trim(waveform, top_db=TRIM_DB, frame_length=1024, hop_length=256)
            margin = round(TRIM_MARGIN_SEC * sample_rate)
            waveform = waveform[max(0, start - margin) : end + margin]
        if self.resample is not None and self.resample != sample_rate:
            import soxr

            waveform, sample_rate = soxr.resample(waveform, sample_rate, self.resample), self.resample
        if self.loudness is not None and (loudness := loudness_of(waveform, sample_rate)) is not None:
            gain = min(10 ** ((self.loudness - loudness) / 20), PEAK / float(np.abs(waveform).max()))
            waveform = (waveform * gain).astype(np.float32)
        return waveform, sample_rate


def add_import(verbs: Any) -> None:
    """Adds the verb `import` and its flags."""
    parser = verbs.add_parser("import", help="convert another tool's data set into a manifest")
    add, number = flag_types.adder(parser), flag_types.number
    add("path PATH", "file or folder to import; with --from datasets also a name on the hub", flag_types.path)
    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    more = "lhotse:RECIPE uses a lhotse recipe, such as lhotse:libritts; datasets:CONFIG chooses a configuration"
    add("--from FORMAT", f"format (default: detected). {known}. {more}", _format, dest="source")
    add("--output --output_dir DIR", "folder for train.jsonl and val.jsonl", flag_types.path, required=True)
    share_help = "share of rows for validation if the corpus has no validation part (default: 0.02)"
    add("--val_share SHARE", share_help, number(float, 0, 0.99))
    speakers_help = "speakers for validation, or a number to draw; replaces --val_share"
    add("--val_speakers SPEAKER", speakers_help, flag_types.name, nargs="+")
    add("--with_test", "use rows of the corpus's test part like training rows", bool)
    add("--seed", "random seed of the split (default: 0)", int, default=0)
    add("--trim", "write new clips without leading and trailing silence", bool)
    loudness_help = "write new clips at this loudness (-23 if no value is given)"
    add("--loudness LUFS", loudness_help, number(float, -70, 0), nargs="?", const=-23.0)
    rate = number(int, MIN_SAMPLE_RATE, MAX_SAMPLE_RATE)
    add("--resample HZ", "write new clips at this rate (24000 if no value is given)", rate, nargs="?", const=24000)
    parser.set_defaults(verb=run_import)


def _format(text: str) -> str:
    """Checks a format's name, which may have a lhotse recipe or a data set's configuration after a colon."""
    kind, colon, _ = text.partition(":")
    if kind not in FORMATS or (colon and kind not in ("lhotse", "datasets")):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(FORMATS)}, lhotse:RECIPE, datasets:CONFIG")
    return text


def run_import(args: argparse.Namespace) -> int:
    """Writes train.jsonl and, if it gets rows, val.jsonl.

    Raises:
        ConfigError: unreadable input, no rows left, or unknown speakers.
        FileExistsError: the folder already has a manifest.
    """
    path, output_dir = args.path, args.output
    for name in ("train.jsonl", "val.jsonl"):
        if os.path.exists(output_dir / name):
            raise FileExistsError(f"{output_dir} already has {name}; remove it or give another --output")
    sound = Sound(args.trim, args.loudness, args.resample)
    with contextlib.ExitStack() as stack:
        clips = output_dir / "clips"
        if sound:  # temporary folder for clips given as bytes
            clips = output_dir / ".clips"
            stack.callback(shutil.rmtree, clips, ignore_errors=True)
        kind, found = read_foreign(path, args.source, with_test=args.with_test, clips=clips)
        parts = _parts_lines(path, found, val_share=args.val_share, val_speakers=args.val_speakers)

        def nothing_left() -> ConfigError:
            return ConfigError([*found.lines(path), *parts, f"{path}: no rows left, read as {kind}"])

        if not found.rows:
            raise nothing_left()
        share = DEFAULT_VAL_SHARE if args.val_share is None else args.val_share
        train, val, notes = split(found.rows, val_share=share, val_speakers=args.val_speakers, seed=args.seed)
        with writing(f"--output: {output_dir}"):
            output_dir.mkdir(parents=True, exist_ok=True)
            if sound:  # after the split, whose errors must not come after hours of writing clips
                new = NewClips(found, output_dir / "clips", sound)
                train, val = (list(filter(new.replace, tqdm(side, "clips", mininterval=1.0))) for side in (train, val))
                if not train:
                    raise nothing_left()
            sides = [(output_dir / f"{side}.jsonl", rows) for side, rows in (("train", train), ("val", val)) if rows]
            for file, rows in sides:
                kept = ({name: value for name, value in row.items() if name != "split"} for row in rows)
                write_text(file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in kept))
    said = [f"{path}: read as {kind}", *found.lines(path), *parts, *notes]
    for file, rows in sides:
        speakers = len({row["speaker"] for row in rows if "speaker" in row})
        said.append(f"{file}: {plural(len(rows), 'row')}" + (f", {plural(speakers, 'speaker')}" if speakers else ""))
    flags = " ".join(f"--{file.stem}_manifest {file}" for file, _ in sides)
    say("\n".join([*said, f"next: python -m higgs_ds describe {flags}"]))
    return ExitCode.OK


def _parts_lines(path: Path, found: Found, *, val_share: float | None, val_speakers: list[str] | None) -> list[str]:
    """Returns a line on the use of each part of the corpus's own split, and one if --val_share has no effect."""
    has_val = any(part_of(name) == "val" for name in found.parts) and not val_speakers
    drawn = f"train.jsonl, or val.jsonl by {'--val_speakers' if val_speakers else '--val_share'}"
    said = []
    for name, count in found.parts.items():
        place = {"val": "val.jsonl"}.get(part_of(name) or "", "train.jsonl") if has_val else drawn
        if part_of(name) == "test" and not found.with_test:
            place = "in neither file (--with_test adds them)"
        said.append(f"{member('', name)}: {plural(count, 'row')}, {place}")
    lines = [f"{path}: the corpus's own split: {'; '.join(said)}"] if said else []
    unused = ["--val_share: not used, the corpus has a validation part"]
    return lines + unused * (has_val and val_share is not None)


def split(
    rows: list[dict], *, val_share: float, val_speakers: list[str] | None, seed: int
) -> tuple[list[dict], list[dict], list[str]]:
    """Returns (training rows, validation rows, notes), with no text on both sides, see `transcripts.text_key`.

    Splits by `val_speakers` if given (a single number draws that many speakers), else by the corpus's validation part,
    else by `val_share`.

    Raises:
        ConfigError: unknown speakers, or no rows left to train on.
    """
    keys, notes = text_keys(rows), []
    if val_speakers:
        is_val = _by_speaker(rows, val_speakers, seed)
    elif any("split" in row for row in rows):
        is_val = ["split" in row for row in rows]
        if all(is_val):
            raise ConfigError(["no rows left to train on: all are in the corpus's validation part"])
    else:
        counts, order, chosen, held = Counter(keys), sorted({*keys}), set(), 0
        wanted = round(val_share * len(rows)) or int(val_share > 0 and len(counts) > 1)
        random.Random(seed).shuffle(order)
        for key in order if len(counts) > 1 else ():
            if held + counts[key] <= wanted:
                chosen.add(key)
                held += counts[key]
        is_val = [key in chosen for key in keys]
        if wanted and not chosen:
            notes.append("no validation rows: every text occurs in too many rows to be held out")
    trained = {key for key, val in zip(keys, is_val, strict=True) if not val}
    train = [row for row, val in zip(rows, is_val, strict=True) if not val]
    kept = [row for row, key, val in zip(rows, keys, is_val, strict=True) if val and key not in trained]
    if lost := sum(is_val) - len(kept):
        notes.append(f"left out of validation: {plural(lost, 'row')} with a text that is also trained on")
    return train, kept, notes


def _by_speaker(rows: list[dict], named: list[str], seed: int) -> list[bool]:
    speakers = sorted({row["speaker"] for row in rows if "speaker" in row})
    if len(named) == 1 and named[0].isdecimal() and named[0] not in speakers:
        named = random.Random(seed).sample(speakers, min(int(named[0]), len(speakers)))
    if unknown := [name for name in named if name not in speakers]:
        known = ", ".join(speakers[:20]) or "none"
        raise ConfigError([f"--val_speakers: {', '.join(unknown)}: not found; the speakers are {known}"])
    is_val = [row.get("speaker") in named for row in rows]
    if rows and all(is_val):
        raise ConfigError([f"--val_speakers: no rows left to train on, of {plural(len(speakers), 'speaker')}"])
    return is_val


def text_keys(rows: list[dict]) -> list[str]:
    """Returns a key per row that is equal for rows with the same spoken text; if it is unknown, the row as JSON.

    A user's turn shared by most conversations is a prompt, such as `Read it.`, not the spoken text.
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
    """Returns the text of a row's last clip, and True if it is from a user's turn, which may be a mere prompt.

    The text is None if the user's turn contains a clip, since its words then refer to that clip.
    """
    if "text" in row:
        return row["text"], False
    *asked, answer = ([m["content"]] if isinstance(m["content"], str) else m["content"] for m in row["messages"])
    for turn, is_asked in ((answer, False), *((turn, True) for turn in asked[-1:])):
        text = " ".join(piece if isinstance(piece, str) else piece.get("text", "") for piece in turn).strip()
        clips = sum(isinstance(piece, dict) and piece["type"] == "audio" for piece in turn)
        if clips != (not is_asked):
            return None, is_asked
        if text:
            return text, is_asked
    return None, True


class NewClips:
    """Processed copies of the rows' clips."""

    def __init__(self, found: Found, folder: Path, sound: Sound):
        self.found, self.folder, self.sound = found, folder, sound
        folder.mkdir(parents=True, exist_ok=True)
        self._written: dict[AudioRef, str | None] = {}
        self._taken: set[str] = set()
        self._numbers: dict[str, Iterator[int]] = {}

    def replace(self, row: dict) -> bool:
        """Replaces a row's clips by new ones, relative to the manifest; counts an unusable clip and returns False."""
        for holder, name, clip in _clips_of(row):
            if clip not in self._written:
                self._written[clip] = self._write(clip)
            if (written := self._written[clip]) is None:
                return False
            holder[name] = written
        # The new clip is just this slice and channel; trimming changes its length.
        for name in ("offset", "channel", "audio_track", "sampling_rate", *["duration"] * self.sound.trim):
            row.pop(name, None)
        return True

    def _write(self, clip: AudioRef) -> str | None:
        try:
            waveform, sample_rate = self.sound.apply(*read_audio(clip))
        except AudioError as error:
            self.found.leave_out("clips that cannot be used", f"{clip.path}: {error}")
            return None
        stem = Path(str(clip.path)).stem.encode("utf-8", "replace")[:LONGEST_STEM].decode("utf-8", "ignore")
        numbers = self._numbers.setdefault(stem, itertools.count(1))
        names = (stem if number == 1 else f"{stem}-{number}" for number in numbers)
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        write_wav(self.folder / f"{name}.wav", waveform, sample_rate)
        return f"{self.folder.name}/{name}.wav"


def _clips_of(row: dict) -> Iterator[tuple[dict, str, AudioRef]]:
    """Yields (object with the clip's path, its key there, clip) for all clips of a row."""
    if "audio" in row:
        names = {"duration_sec": "duration"} if "offset" in row else {}
        names |= {"offset_sec": "offset", "channel": "channel", "audio_track": "audio_track"}
        part = {field: row[name] for field, name in names.items() if name in row}
        yield row, "audio", AudioRef(Path(row["audio"]), **part)
    if "ref_audio" in row:
        yield row, "ref_audio", AudioRef(Path(row["ref_audio"]))
    for piece in (piece for message in row.get("messages", ()) for piece in message["content"]):
        if isinstance(piece, dict) and piece["type"] == "audio":
            yield piece, "audio_url", AudioRef(Path(piece["audio_url"]))
