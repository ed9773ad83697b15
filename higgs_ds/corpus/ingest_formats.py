"""What other tools write, as rows of a manifest: one reader a format, which leaves every clip where it is."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, reason_of
from .columns import SYNONYMS
from .foreign import AUDIO_SUFFIXES, FILE_COLUMNS, FORMATS, TEXT_COLUMNS, guess, lines_in

AUDIO_TAG = "<audio>"
TEXT_SUFFIXES = (".normalized.txt", ".txt", ".lab")
SPEAKER_COLUMNS = ("speaker", *SYNONYMS["speaker"].split())
_SURROGATE = re.compile("[\ud800-\udfff]")


class Found:
    """Rows so far, and what was left out, by reason with an example."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, origin: str, audio: Path | None, text: Any, **more: Any) -> None:
        """One speech row; left out where its clip or its text is not there."""
        if audio is None or not os.path.isfile(audio):
            self.leave_out("clips that do not exist", f"{origin}: {audio}")
        elif not isinstance(text, str) or not text.strip():
            self.leave_out("rows without a text", origin)
        else:
            row = {"audio": os.path.abspath(audio), "text": _clean(text), **more}
            self.rows.append({name: value for name, value in row.items() if value not in (None, "")})

    def leave_out(self, reason: str, example: str) -> None:
        """Counts what does not become a row."""
        self.left_out[reason] += 1
        self.examples.setdefault(reason, example)

    def lines(self) -> list[str]:
        """What was left out, a line a reason."""
        return [
            f"left out: {count:,} × {reason}, e.g. {self.examples[reason]}" for reason, count in self.left_out.items()
        ]


def read_foreign(path: Path, kind: str | None) -> tuple[str, Found]:
    """(format, rows) of a file or folder; the format is guessed where none is given.

    Raises:
        ConfigError: what is not there, cannot be read, or is no format that is known.
    """
    if not os.path.exists(path):
        raise ConfigError([f"{str(path)[:200]}: does not exist; name a file or a folder of {', '.join(FORMATS)}"])
    kind = kind or guess(path)
    if kind is None:
        raise ConfigError([f"{path}: holds none of the formats that are known; say --from {'|'.join(FORMATS)}"])
    try:
        return kind, READERS[kind](path)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8"]) from error
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {reason_of(error)}"]) from error
    except (csv.Error, ValueError, RecursionError) as error:
        raise ConfigError([f"{path}: is not {FORMATS[kind]}: {error}"]) from error


def read_ljspeech(path: Path) -> Found:
    """`id|text`, `id|text|normalised text` or `id|speaker|text`, told apart by the second column."""
    table = _one_of(path, ("metadata.csv", "metadata.txt", "metadata.list", "filelist.txt"))
    rows = [
        (number, [part.strip() for part in line.split("|")])
        for number, line in enumerate(lines_in(table.read_text(encoding="utf-8-sig")), start=1)
        if line.strip()
    ]
    with_speaker = _second_is_speaker([parts for _, parts in rows])
    found = Found()
    for number, parts in rows:
        origin = f"{table}:{number}"
        if len(parts) < 2:
            found.leave_out("lines without `|`", origin)
            continue
        speaker, text = (parts[1], parts[2]) if with_speaker and len(parts) > 2 else (None, parts[-1] or parts[1])
        found.add(origin, _clip_of(table.parent, parts[0]), text, speaker=speaker)
    return found


def _second_is_speaker(rows: list[list[str]]) -> bool:
    """A name has no blanks and is not what the third column says in other words."""
    three = [parts for parts in rows if len(parts) == 3 and parts[2]]
    names = sum(not re.search(r"\s", parts[1]) and _words(parts[1]) != _words(parts[2]) for parts in three)
    return bool(three) and names >= 0.95 * len(three)


def _clip_of(folder: Path, name: str) -> Path | None:
    """A clip by its id or its path, beside the table or in one of the folders that such a corpus has."""
    suffixes = ("", ".wav", ".flac", ".mp3", ".ogg", ".m4a")
    for parent in (folder, folder / "wavs", folder / "wav", folder / "audio", folder / "clips"):
        for suffix in suffixes:
            candidate = parent / f"{name}{suffix}"
            if (suffix or candidate.suffix) and os.path.isfile(candidate):
                return candidate
    return folder / "wavs" / f"{name}.wav"


def read_train_higgs_audio(path: Path) -> Found:
    """`metadata.json` with `samples`: each names its clip, its text's file, and may name a reference and its text."""
    file = _one_of(path, ("metadata.json",))
    samples = json.loads(file.read_text(encoding="utf-8-sig")).get("samples")
    if not isinstance(samples, list):
        raise ValueError("it has no list of `samples`")
    found = Found()
    for number, sample in enumerate(samples):
        origin = f"{file}: samples[{number}]"
        if not isinstance(sample, dict):
            found.leave_out("samples that are no objects", origin)
            continue
        ref_audio = _first(sample, "ref_audio_file", "reference_audio_file", "ref_audio", "reference_audio")
        try:
            ref_text, text = (_text_of(file.parent, sample, of) for of in (("ref_", "reference_"), ("",)))
        except UnicodeDecodeError:
            found.leave_out("rows whose text file is not UTF-8", origin)
            continue
        more: dict[str, Any] = {}
        if ref_audio and ref_text and os.path.isfile(ref_path := _beside(file.parent, ref_audio)):
            more = {"ref_audio": os.path.abspath(ref_path), "ref_text": _clean(ref_text)}
        elif ref_audio:
            found.leave_out("references whose clip or text is not there (their rows are kept)", origin)
        scene = sample.get("scene")
        audio = _first(sample, "audio_file", "audio", "audio_path")
        found.add(
            origin,
            _beside(file.parent, audio) if audio else None,
            text,
            speaker=_first(sample, "speaker_id", "speaker_name", "speaker"),
            scene=scene.replace("_", " ").strip() if isinstance(scene, str) else None,
            **more,
        )
    return found


def _text_of(folder: Path, sample: dict, prefixes: tuple[str, ...]) -> str | None:
    """A text given in place, or in a file."""
    for prefix in prefixes:
        if text := _first(sample, f"{prefix}transcript", f"{prefix}text"):
            return text
        name = _first(sample, f"{prefix}transcript_file", f"{prefix}text_file")
        if name and os.path.isfile(path := _beside(folder, name)):
            return path.read_text(encoding="utf-8-sig")
    return None


def read_ms_swift(path: Path) -> Found:
    """`messages` whose `<audio>` tags stand for the `audios` in order.

    A clip that the user gives and the assistant writes down becomes a speech row, and so does a text that the
    assistant speaks; any other conversation in which the assistant speaks becomes a ChatML row.
    """
    found = Found()
    for origin, row in _json_rows(path):
        messages, audios = row.get("messages"), row.get("audios")
        if isinstance(audios, str):
            audios = [audios]
        if not _is_talk(messages) or not isinstance(audios, list) or not all(isinstance(a, str) for a in audios):
            found.leave_out("rows without `messages` and `audios`", origin)
            continue
        tags = [message["content"].count(AUDIO_TAG) for message in messages]
        if sum(tags) == 0 and len(audios) == 1:
            tags[0], messages = 1, [{**messages[0], "content": AUDIO_TAG + messages[0]["content"]}, *messages[1:]]
        if sum(tags) != len(audios):
            found.leave_out("rows with another number of `<audio>` tags than `audios`", origin)
            continue
        _add_talk(found, origin, messages, tags, [_beside(path.parent, audio) for audio in audios])
    return found


def _add_talk(found: Found, origin: str, messages: list[dict], tags: list[int], clips: list[Path]) -> None:
    texts = [message["content"].replace(AUDIO_TAG, "").strip() for message in messages]
    roles = [message["role"] for message in messages]
    turns = [i for i, role in enumerate(roles) if role != "system"]
    speaks = sum(count for role, count in zip(roles, tags, strict=True) if role == "assistant")
    if not speaks and len(clips) == 1 and roles[-1] == "assistant":
        found.add(origin, clips[0], texts[-1])
    elif (
        [roles[i] for i in turns] == ["user", "assistant"] and tags[turns[1]] == len(clips) == 1 and not texts[turns[1]]
    ):
        found.add(origin, clips[0], texts[turns[0]])
    elif not speaks:
        found.leave_out("conversations in which the assistant has no clip", origin)
    elif missing := [clip for clip in clips if not os.path.isfile(clip)]:
        found.leave_out("clips that do not exist", f"{origin}: {missing[0]}")
    else:
        left = iter(clips)
        found.rows.append({"messages": [_chatml(message, left) for message in messages]})


def _chatml(message: dict, clips: Iterator[Path]) -> dict:
    pieces: list[Any] = []
    for index, text in enumerate(message["content"].split(AUDIO_TAG)):
        if index:
            pieces.append({"type": "audio", "audio_url": os.path.abspath(next(clips))})
        if text.strip():
            pieces.append({"type": "text", "text": _clean(text)})
    return {"role": message["role"], "content": pieces if message["role"] != "system" or pieces else ""}


def _is_talk(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict)
            and m.get("role") in ("system", "user", "assistant")
            and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def read_audiofolder(path: Path) -> Found:
    """Hugging Face's metadata.csv or .jsonl, one a folder, or any table whose header names a clip and a text."""
    names = ("metadata.csv", "metadata.jsonl", "metadata.tsv")
    tables = [path] if path.is_file() else [t for name in names for t in sorted(path.rglob(name))]
    if not tables:
        raise ValueError("it holds no metadata.csv or metadata.jsonl")
    found = Found()
    for table in tables:
        rows = _json_rows(table) if table.suffix in (".jsonl", ".json") else _csv_rows(table)
        for origin, row in rows:
            values = {str(name).strip().lower(): value for name, value in row.items()}
            name, text = _first(values, *FILE_COLUMNS), _first(values, *TEXT_COLUMNS)
            speaker = _first(values, *SPEAKER_COLUMNS)
            found.add(origin, _beside(table.parent, name) if name else None, text, speaker=speaker)
    return found


def read_folder(path: Path) -> Found:
    """Every clip that has a text file of its name beside it; a folder of folders has a speaker a folder."""
    if not path.is_dir():
        raise ValueError("it is a file; name the folder")
    found = Found()
    clips = sorted(clip for clip in path.rglob("*") if clip.suffix.lower() in AUDIO_SUFFIXES and clip.is_file())
    speakers = {clip.relative_to(path).parts[0] for clip in clips if len(clip.relative_to(path).parts) > 1}
    for clip in clips:
        parts = clip.relative_to(path).parts
        text = next((t for suffix in TEXT_SUFFIXES if (t := clip.with_suffix(suffix)).is_file()), None)
        if text is None:
            found.leave_out("clips without a text file of the same name", str(clip))
            continue
        speaker = parts[0] if len(parts) > 1 and len(speakers) > 1 else None
        try:
            found.add(str(clip), clip, text.read_text(encoding="utf-8-sig"), speaker=speaker)
        except UnicodeDecodeError:
            found.leave_out("rows whose text file is not UTF-8", str(text))
    return found


READERS: dict[str, Callable[[Path], Found]] = {
    "ljspeech": read_ljspeech,
    "train-higgs-audio": read_train_higgs_audio,
    "ms-swift": read_ms_swift,
    "audiofolder": read_audiofolder,
    "folder": read_folder,
}


def _json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(`file:line`, object) of JSONL or a JSON array."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        values = ((f"{path}: [{i}]", value) for i, value in enumerate(json.loads(text)))
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        values = ((f"{path}:{number}", json.loads(line)) for number, line in lines)
    for origin, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{origin} is not a JSON object")
        yield origin, value


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        delimiter = max((",", "\t", ";", "|"), key=header.count)
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            yield f"{path}:{reader.line_num}", {name: value for name, value in row.items() if name}


def _one_of(path: Path, names: tuple[str, ...]) -> Path:
    if path.is_file():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"it holds no {names[0]}")


def _beside(folder: Path, name: str) -> Path:
    """A path as another tool wrote it: beside its table, else below the working folder."""
    beside = folder / os.path.expanduser(name)
    return beside if os.path.exists(beside) or not os.path.exists(name) else Path(name)


def _first(values: dict, *names: str) -> str | None:
    """The first of these that is filled, as text."""
    for name in names:
        value = values.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return None


def _clean(text: str) -> str:
    """One line, as a transcript is; half surrogates, which are no characters, are left out."""
    return _SURROGATE.sub("", " ".join(text.split()))


def _words(text: str) -> str:
    return " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split())
