"""What every rank keeps of the rows: where each stands in its manifest, the keys of its clips' codes, its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .chatml import Row
from .faults import Fault
from .manifest import Manifest
from .transcripts import FACTS, VOICE


@dataclass
class RowSet(Sequence):
    """The usable rows of a manifest, in its order; each is parsed when it is asked for, and its clips carry keys."""

    manifest: Manifest | None = None
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [rows], in the manifest
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 32), np.uint8))  # [clips of all rows, 32]
    clip_ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [rows], in `keys`
    tokens: np.ndarray | None = None  # int32 [rows], where they were asked for
    voices: np.ndarray = field(default_factory=lambda: np.zeros(0, VOICE))  # VOICE [rows]
    summary: tuple[str, ...] = ()  # what the first rank says of them

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Row:
        behind = int(self.clip_ends[i])
        first = int(self.clip_ends[i - 1]) if i else 0
        return self.manifest.row(int(self.numbers[i])).with_keys(self.keys[first:behind])

    def only(self, kept: np.ndarray) -> RowSet:
        """Those rows alone; `kept` bool [rows]."""
        clips = np.diff(np.r_[0, self.clip_ends])
        tokens = None if self.tokens is None else self.tokens[kept]
        keys = self.keys[np.repeat(kept, clips)]
        return RowSet(self.manifest, self.numbers[kept], keys, np.cumsum(clips[kept]), tokens, self.voices[kept])


@dataclass
class Part:
    """What one rank found in its rows of a chunk."""

    numbers: np.ndarray  # int64 [rows], of the usable ones
    tokens: np.ndarray | None  # int32 [rows]
    clips: np.ndarray  # int64 [rows], how many
    keys: np.ndarray  # uint8 [clips of all rows, 32]
    faults: list[Fault]
    facts: np.ndarray  # FACTS [rows]
    voices: np.ndarray  # VOICE [rows]


def as_array(keys: Iterable[bytes]) -> np.ndarray:
    """uint8 [keys, 32]"""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


def put_together(manifest: Manifest, parts: list[Part]) -> tuple[RowSet, np.ndarray]:
    """All ranks' rows in the manifest's order, and their FACTS."""
    if not parts:
        return RowSet(manifest), np.zeros(0, FACTS)
    names = ("numbers", "clips", "keys", "facts", "voices")
    numbers, clips, keys, facts, voices = (np.concatenate([getattr(p, name) for p in parts]) for name in names)
    order = np.argsort(numbers)
    first = (np.cumsum(clips) - clips)[order]
    clips = clips[order]
    ends = np.cumsum(clips)
    places = np.repeat(first - (ends - clips), clips) + np.arange(len(keys))
    tokens = None if parts[0].tokens is None else np.concatenate([part.tokens for part in parts])[order]
    return RowSet(manifest, numbers[order], keys[places], ends, tokens, voices[order]), facts[order]
