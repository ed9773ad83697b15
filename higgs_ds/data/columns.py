"""Fields of a row, other tools' names for them, and checks of unknown columns."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# `id`, the last of both, is accepted and not read.
CHATML_FIELDS = ("messages", "start_index", "speaker", "misc", "split", "id")
CUT_FIELDS = ("offset", "end", "duration", "channel", "audio_track", "sampling_rate")  # of every clip
SPEECH_FIELDS = ("audio", "text", "speaker", "ref_audio", "ref_text", "scene", "split", *CUT_FIELDS, "id")
ITEM_FIELDS = ("type", "text", "audio_url", "raw_audio", *CUT_FIELDS, "row_id")  # of texts and clips in a turn
# Other tools' names for fields of a speech row. `file_name` is not among them: it marks an audiofolder, to be imported.
SYNONYMS = {
    "audio": "audio_path audio_file audio_filepath audio_filename audio_file_path path file filename filepath "
    "file_path wav wav_path wav_file wav_filename clip clip_path audio_url",
    "text": "transcript transcription sentence normalized_text raw_text transcript_text utterance caption",
    "speaker": "speaker_id speaker_name spk spk_id speaker_label",
    "ref_audio": "reference_audio ref_audio_path ref_audio_file reference_audio_path ref_wav ref_wav_path prompt_audio "
    "prompt_wav prompt_audio_path ref_path",
    "ref_text": "reference_text ref_transcript reference_transcript prompt_text prompt_transcript",
    "channel": "channel_selector channel_id channel_index channel_idx channel_number audio_channel chan ch",
    "audio_track": "track_index stream_index audio_stream",
    "sampling_rate": "sample_rate samplerate sr fs sampling_rate_hz sample_rate_hz sampling_frequency",
    "split": "subset partition data_split",
}
# A misspelling of these would silently change what is trained on.
WEIGHTY = ("start_index", "ref_audio", "ref_text", "offset", "raw_audio", "recipient", "scene")

_CANONICAL = {name: canonical for canonical, names in SYNONYMS.items() for name in (canonical, *names.split())}
# Other names for the edges of a slice, with an optional unit: `begin_time`, `start_sec`, `endTime`, `offset_ms`.
_EDGE = re.compile(
    r"(?P<of>(?:segment|seg|audio|clip|utt|utterance|speech|word|vad|time|ts|t)_?)?"
    r"(?P<edge>start|begin|onset|offset|end|stop|duration|dur)_?(?:times?tamp|time|at|pos|offset)?_?(?:in_)?"
    r"[(\[]?(?P<unit>[a-z]+)?[)\]]?"
)
_EDGES = {"start": "offset", "begin": "offset", "onset": "offset", "stop": "end", "dur": "duration"}
_SECONDS = dict.fromkeys((None, *"s sec secs second seconds".split()), 1.0)
_SECONDS |= dict.fromkeys("ms msec msecs millisecond milliseconds".split(), 0.001)
_OTHER_UNITS = frozenset("sample samples frame frames us ns min minute minutes tick ticks".split())
TRAINED = re.compile(r"tr|train(ing)?([-_./].*)?", re.IGNORECASE)
HELD_OUT = re.compile(
    r"(test(ing)?|dev(el|elopment)?|val(id|idation)?|eval(uation)?|held_?out|holdout|invalidated)([-_./].*)?",
    re.IGNORECASE,
)
_CUTS = "may cut the clip; rename it to `offset` and `end`, in seconds, or remove it"
_KEPT_OUT = "excludes the row from training; remove the row or the column"
# Unread columns that suggest a change of what is trained on: name, kind of value, problem.
_SUSPECTS = (
    (r"times?_?(stamps?|range|span)?|segments?|interval|seg|span|trim|crop|slice|window|ts", "pair", _CUTS),
    (r"from|to|s|e|t0|t1|t_?min|t_?max|x_?min|x_?max|(video|trim|crop)_(start|end)", "number", _CUTS),
    (r"(frame|sample)s?_(offset|start|begin|end)", "number", _CUTS),
    (r"(time_?)?units?", "unit", "is not supported; slices are in seconds"),
    (r"channels|side|track|stream", "channel", "may choose a channel; give `channel`, a number from 0, or remove it"),
    (r"is_?(test|dev|val|eval|valid|validation)", "yes", _KEPT_OUT),
    (r"set|fold|phase|usage|stage|mode|part|(data|set)_?(type|set)", "split", _KEPT_OUT),
    (r"loss|train(ed|able)?|weight", "no", f"{_KEPT_OUT}; turns before `start_index` are not trained on"),
)


_IS: dict[str, Callable[[Any], object]] = {
    "number": lambda v: isinstance(v, int | float) and v == v,
    "pair": lambda v: isinstance(v, list) and len(v) == 2 and all(isinstance(n, int | float) for n in v),
    "channel": lambda v: isinstance(v, list) or v in ("left", "right"),
    "unit": lambda v: v in ("ms", "msec", "milliseconds", "samples", "frames"),
    "split": lambda v: isinstance(v, str) and HELD_OUT.fullmatch(v.strip()),
    "yes": lambda v: v in (True, "true", "True", "yes"),
    "no": lambda v: v in (False, "false", "False", "no"),
}
_OF_REFERENCE = re.compile(r"(ref|reference|prompt)_(start|begin|end|offset|duration|channel|audio_track)(_.*)?")
_CODES = re.compile(
    r"(audio|speech|codec|acoustic|semantic|discrete)?_?(codes?|tokens?|units?|token_ids)(_(path|file))?"
)
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,40}")
_INDEX = re.compile(r"\[\d+\]")


@dataclass(frozen=True)
class Reading:
    """Rules for reading rows with the same columns."""

    kind: str | None  # chatml, speech, or None for neither
    column: dict[str, str] = field(default_factory=dict)  # of each field that is present
    unread: tuple[str, ...] = ()  # as they are displayed
    suspects: tuple[tuple[str, str, str], ...] = ()  # among the unread: column, kind of value, problem
    scale: dict[str, float] = field(default_factory=dict)  # seconds per unit of a field, if it is not 1
    faults: tuple[tuple[str, str], ...] = ()  # (field, problem)


@functools.lru_cache(1024)
def reading(columns: tuple[str, ...]) -> Reading:
    """Determines how rows with these columns are read."""
    if "messages" in columns:
        misspelt, unread = _others(columns, CHATML_FIELDS)
        named = {column: n for column in unread if (n := _CANONICAL.get(plain(column))) in ("split", "speaker")}
        rest = tuple(column for column in unread if column not in named)
        return Reading("chatml", {n: c for c, n in named.items()}, _named(rest), suspects_of(rest), faults=misspelt)
    held: dict[str, list[str]] = {}
    for column in columns:
        if column in SPEECH_FIELDS:
            continue
        if canonical := _CANONICAL.get(plain(column)):
            held.setdefault(canonical, []).append(column)
        elif (edge := _edge(column)) and edge[1] is not None:
            held.setdefault(edge[0], []).append(column)
    names = {name: of_name[0] for name, of_name in held.items() if name not in columns}
    faults = [
        (of_name[0], f"{', '.join(f'`{_shown(c)}`' for c in of_name)}: which one is the {name}? rename it to `{name}`")
        for name, of_name in held.items()
        if len(of_name) > (name in names)
        and (name in names or name in CUT_FIELDS)
        and name not in ("speaker", "duration")
    ]
    codes = next((column for column in columns if _CODES.fullmatch(plain(column))), None)
    if codes is not None and "audio" not in {*columns, *held}:
        problem = f"is missing; codes (`{_shown(codes)}`) are not read, give the clip instead"
        return Reading(None, faults=(("audio", problem),))
    if not ({"audio", "text"} & ({*columns} | {*held})):
        neither = "has neither `messages` (a ChatML row) nor `audio` and `text` (a speech row)"
        return Reading(None, faults=(("row", neither),))
    known = (*SPEECH_FIELDS, *names.values(), *(column for name in CUT_FIELDS for column in held.get(name, ())))
    more, unread = _others(tuple(c for c in columns if c not in known), SPEECH_FIELDS)
    of_field = {name: column for name in SPEECH_FIELDS[:-1] if (column := names.get(name, name)) in columns}
    units = {name: edge[1] for name, column in names.items() if (edge := _edge(column))}
    scale = {name: unit for name, unit in units.items() if unit not in (None, 1.0)}
    return Reading("speech", of_field, _named(unread), suspects_of(unread), scale, (*faults, *more))


def _named(columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(unread_name("", column) for column in columns)


@functools.lru_cache(1024)
def suspects_of(columns: tuple[str, ...]) -> tuple[tuple[str, str, str], ...]:
    """Returns (column, kind of value, problem) of unread columns that may affect training; see `suspicions`."""
    return tuple((c, kind, told) for name, kind, told in _SUSPECTS for c in columns if re.fullmatch(name, plain(c)))


def suspicions(
    values: dict[str, Any], suspects: tuple[tuple[str, str, str], ...], trains: bool | None
) -> Iterator[tuple[str, str]]:
    """Yields (column, problem) of suspects with a suspicious value; `trains` is True for a training manifest."""
    for column, kind, problem in suspects:
        if _IS[kind](values.get(column)) and (trains or problem != _KEPT_OUT):
            yield column, problem


def _edge(column: str) -> tuple[str, float | None] | None:
    """Returns (field, seconds per unit, None for samples or frames) of a column that cuts a clip, or None."""
    found = _EDGE.fullmatch(plain(column))
    edge = found and _EDGES.get(found["edge"], found["edge"])
    if found is None or edge is None or (edge == "duration" and (found["of"] or found["unit"] not in _SECONDS)):
        return None
    return (edge, _SECONDS.get(found["unit"])) if found["unit"] in _OTHER_UNITS | _SECONDS.keys() else None


@functools.lru_cache(1024)
def weighty_misspelling(key: str, names: tuple[str, ...]) -> str | None:
    """Returns a hint about an unknown field that resembles one that affects training, or None."""
    name = plain(key)
    if _OF_REFERENCE.fullmatch(name):
        return "a reference cannot be cut; write the slice to a separate file"
    if (edge := _edge(key)) and edge[1] is None:
        return "is not in seconds; give `offset` and `duration` in seconds instead"
    if edge and edge[0] != "duration":
        return "cuts a clip; give it as `offset` and `duration` or `end`, in seconds, next to the clip's path"
    if name not in names and _CANONICAL.get(name) in ("channel", "audio_track") and "audio" not in names:
        return f"chooses a part of a clip; give it as `{_CANONICAL[name]}` next to the clip's path"
    near = difflib.get_close_matches(plain(key), [name for name in names if name in WEIGHTY], n=1, cutoff=0.8)
    return f"unknown field; did you mean `{near[0]}`?" if near else None


def _others(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Returns (faults, unread) for the columns that are not in `names`."""
    unknown = [column for column in columns if column not in names]
    faults = {column: problem for column in unknown if (problem := weighty_misspelling(column, names))}
    shown = tuple((member("", column), problem) for column, problem in faults.items())
    return shown, tuple(column for column in unknown if column not in faults)


def unread_lines(counts: Counter[str], file: str) -> list[str]:
    """Returns one line per count of rows: `language, emotion: not read, in 100,000 rows`."""
    by_count: dict[int, list[str]] = {}
    for name, count in counts.items():
        by_count.setdefault(count, []).append(name)
    lines = []
    for count, names in sorted(by_count.items(), reverse=True)[:20]:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        lines.append(f"{file}: {shown}: not read, in {count:,} row{'s' * (count != 1)}")
    return lines


def unread_name(field_name: str, key: str) -> str:
    """Returns the name of an unread field, equal for all turns and clips of a row."""
    return _INDEX.sub("[]", member(field_name, key))


def member(field_name: str, key: str) -> str:
    """Appends a user's key to a field's name, escaped and cut, so that a fault stays on one line."""
    name = _shown(key)
    return f"{field_name}.{name}" if field_name else name


def _shown(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else repr(key if len(key) <= 80 else key[:80] + "...")


def plain(key: str) -> str:
    """Normalises a column's name for comparison: `Speaker ID` to `speaker_id`."""
    return key.strip().lower().replace(" ", "_").replace("-", "_")
