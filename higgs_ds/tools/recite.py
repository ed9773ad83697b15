"""Training rows synthesised again and compared with their codes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..data.audio import read_audio, write_wav
from ..data.chatml import AudioRef, Row, Turn, speech_messages
from ..files import write_text
from ..model.speech import Answer, Sampling, Speaker


@dataclass(frozen=True)
class Ending:
    """A clip as one stop rule ends it."""

    share: float  # of the training codes reproduced, over the longer of the two
    frames: int
    ended: bool  # by itself, and not at the most frames that it was given


@dataclass(frozen=True)
class Recital:
    """One training row synthesised again; `share` and `spoken_frames` by the first of the stop rules."""

    origin: str
    text: str
    share: float  # of the training codes reproduced, over the longer of the two
    frames: int
    spoken_frames: int
    file: str
    endings: dict[str, Ending] = field(default_factory=dict)  # by stop rule


def recite(
    speaker: Speaker,
    rows: Sequence[Row],
    output_dir: Path,
    *,
    rules: Sequence[str],
    sampling: Sampling,
    prompt: dict | None,
    max_new_tokens: int | None,
) -> list[Recital]:
    """Synthesises the last assistant clip of each row and compares it with the training codes.

    Writes `<n>-<clip>.spoken.wav`, `<n>-<clip>.original.wav` and `recital.json`. Raises OSError.

    Args:
        rules: of the speaker's `stop_rules`; the clip of the first one is written.
        prompt: voice or scene for all rows, as `speech_messages` takes it; None keeps each row's own.
        max_new_tokens: longest answer; None is twice the frames of the clip, plus 64.
    """
    recitals = []
    for number, row in enumerate(rows, 1):
        target = target_of(row)
        if target is None:
            continue
        turns = row.messages[: _answer_of(row)]
        text = " ".join(piece for turn in turns[-1:] for piece in turn.content if isinstance(piece, str))
        if prompt is not None:
            turns, _ = speech_messages(text, None, **prompt)
        original, rate = read_audio(target)
        wanted = speaker.codec.encode(original, rate)[: speaker.spec.num_codebooks]
        longest = max_new_tokens or 2 * wanted.shape[1] + 64
        settings = dataclasses.replace(sampling, max_new_tokens=longest)
        answers = _answers(speaker, turns, settings, rules=rules)
        endings = {
            rule: Ending(share_given_back(wanted, a.codes), 0 if a.codes is None else a.codes.shape[1], a.ended)
            for rule, a in answers.items()
        }
        stem = f"{number:02d}-{target.path.stem if target.path else 'clip'}"
        write_wav(output_dir / f"{stem}.original.wav", original, rate)
        spoken, first = answers[rules[0]].codes, endings[rules[0]]
        file = output_dir / f"{stem}.spoken.wav"
        if spoken is not None and first.frames:
            write_wav(file, speaker.decode(spoken), speaker.codec.sample_rate)
        else:
            file.unlink(missing_ok=True)  # an earlier recital's
        recitals.append(Recital(row.origin, text, first.share, wanted.shape[1], first.frames, file.name, endings))
    records = [dataclasses.asdict(recital) for recital in recitals]
    write_text(output_dir / "recital.json", json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    return recitals


def target_of(row: Row) -> AudioRef | None:
    """The clip of a row's last assistant turn, or None."""
    return next((piece for piece in row.messages[_answer_of(row)].content if isinstance(piece, AudioRef)), None)


def _answer_of(row: Row) -> int:
    return max(i for i, turn in enumerate(row.messages) if turn.role == "assistant")


def _answers(speaker: Speaker, turns: Sequence[Turn], sampling: Sampling, *, rules: Sequence[str]) -> dict[str, Answer]:
    """The answer to a prompt by stop rule; generated once if all rules end it at the same frame."""
    clips = [piece for turn in turns for piece in turn.content if isinstance(piece, AudioRef)]
    context = [speaker.codec.encode(*read_audio(clip)) for clip in clips]
    answers: dict[str, Answer] = {}
    for rule in rules:
        same = next((answer for answer in answers.values() if answer.rules_agree), None)
        answers[rule] = same or speaker.speak(turns, context, sampling, force_audio=False, stop=rule)
    return answers


def table(recitals: Sequence[Recital], rules: Sequence[str]) -> list[str]:
    """A line for each clip, and one for each stop rule."""
    lines = []
    for r in recitals:
        length = "right length" if r.frames == r.spoken_frames else f"{r.spoken_frames} frames for {r.frames}"
        cut = [rule for rule, ending in r.endings.items() if not ending.ended]
        note = f"  (not ended by the model: {', '.join(cut)})" if cut else ""
        lines.append(f"{100 * r.share:6.2f} %  {length:<22}  {r.text[:60]}{note}")
    frames = sum(r.frames for r in recitals)
    for rule in rules:
        of_rule = [r.endings[rule] for r in recitals]
        share = sum(ending.share * r.frames for ending, r in zip(of_rule, recitals, strict=True)) / frames
        right = sum(ending.frames == r.frames for ending, r in zip(of_rule, recitals, strict=True))
        worst = min(ending.share for ending in of_rule)
        lines.append(
            f"stop as {rule + ':':<13} {100 * share:.2f} % of the codes of {len(recitals)} clips reproduced "
            f"(worst clip {100 * worst:.2f} %), {right} of {len(recitals)} lengths right"
        )
    return lines


def share_given_back(wanted: np.ndarray, spoken: np.ndarray | None) -> float:
    """Share of equal codes, 0 to 1, over the longer of the two clips."""
    if spoken is None:
        return 0.0
    frames = min(wanted.shape[1], spoken.shape[1])
    equal = int((wanted[:, :frames] == spoken[:, :frames]).sum())
    return equal / (wanted.shape[0] * max(wanted.shape[1], spoken.shape[1]))
