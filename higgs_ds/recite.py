"""The training rows spoken again, and held against their codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .corpus.audio import read_audio, write_wav
from .corpus.manifest import AudioRef, Row
from .model.speaker import Sampling, Speaker


@dataclass(frozen=True)
class Recital:
    """One training row spoken again."""

    origin: str
    text: str
    share: float  # of the training codes given back, over the longer of the two
    frames: int
    spoken_frames: int
    file: str


def recite(speaker: Speaker, rows: Sequence[Row], output_dir: Path, *, limit: int | None = None) -> list[Recital]:
    """Lets the model speak the last assistant clip of each row, greedily, and compares it with the training codes.

    Writes `<n>-<clip>.spoken.wav` beside `<n>-<clip>.original.wav`, and `recital.json`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    recitals = []
    for number, row in enumerate(rows[:limit], 1):
        last = max(i for i, turn in enumerate(row.messages) if turn.role == "assistant")
        target = next((piece for piece in row.messages[last].content if isinstance(piece, AudioRef)), None)
        if target is None:
            continue
        prompt = row.messages[:last]
        wanted = speaker.codec.encode(*read_audio(target))[: speaker.facts.num_codebooks]
        context = [
            speaker.codec.encode(*read_audio(piece))
            for turn in prompt
            for piece in turn.content
            if isinstance(piece, AudioRef)
        ]
        sampling = Sampling(max_new_tokens=2 * wanted.shape[1] + 64)
        spoken = speaker.speak(prompt, context, sampling, force_audio=False)
        stem = f"{number:02d}-{target.path.stem if target.path else 'clip'}"
        original, rate = read_audio(target)
        write_wav(output_dir / f"{stem}.original.wav", original, rate)
        if spoken is not None and spoken.shape[1]:
            write_wav(output_dir / f"{stem}.spoken.wav", speaker.decode(spoken), speaker.codec.sample_rate)
        text = " ".join(piece for turn in prompt[-1:] for piece in turn.content if isinstance(piece, str))
        frames = 0 if spoken is None else spoken.shape[1]
        recitals.append(
            Recital(row.origin, text, share_given_back(wanted, spoken), wanted.shape[1], frames, f"{stem}.spoken.wav")
        )
    facts = [recital.__dict__ for recital in recitals]
    (output_dir / "recital.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return recitals


def share_given_back(wanted: np.ndarray, spoken: np.ndarray | None) -> float:
    """Share of equal codes, 0 to 1, over the longer of the two clips."""
    if spoken is None:
        return 0.0
    frames = min(wanted.shape[1], spoken.shape[1])
    equal = int((wanted[:, :frames] == spoken[:, :frames]).sum())
    return equal / (wanted.shape[0] * max(wanted.shape[1], spoken.shape[1]))
