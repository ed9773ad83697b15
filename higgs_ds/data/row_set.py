"""Rows in the form that each rank keeps: positions in the manifest, keys of the clips' codes, token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np

from .chatml import Row
from .faults import Fault
from .manifest import Manifest
from .transcripts import TEXT_STATS, VOICE


@dataclass
class RowSet(Sequence[Row]):
    """The usable rows of a manifest in file order. Each is parsed on demand, with the keys of its clips.

    `joined` concatenates the rows of several manifests.
    """

    manifests: tuple[Manifest, ...] = ()
    ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [manifests], end of each in the rows
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [rows], index in the manifest
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 32), np.uint8))  # [clips of all rows, 32]
    clip_ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [rows], end of each in `keys`
    tokens: np.ndarray | None = None  # int32 [rows], if they were counted
    voices: np.ndarray = field(default_factory=lambda: np.zeros(0, VOICE))  # VOICE [rows]
    summary: tuple[str, ...] = ()  # lines that rank 0 prints

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, i: int) -> Row: ...

    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...

    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        end = int(self.clip_ends[i])
        first = int(self.clip_ends[i - 1]) if i else 0
        return self._manifest(i).row(int(self.numbers[i])).with_keys(self.keys[first:end])

    def _manifest(self, i: int) -> Manifest:
        return self.manifests[int(np.searchsorted(self.ends, i, side="right"))]

    def column(self, i: int, name: str) -> object:
        """Returns the value of a row's column, None if it is missing."""
        return self._manifest(i).column(int(self.numbers[i]), name)

    @property
    def counts(self) -> list[int]:
        """Number of rows of each manifest."""
        return np.diff(np.r_[0, self.ends]).tolist()

    def only(self, kept: np.ndarray) -> RowSet:
        """Returns only the rows marked in `kept`, bool [rows]."""
        clips = np.diff(np.r_[0, self.clip_ends])
        tokens = None if self.tokens is None else self.tokens[kept]
        keys = self.keys[np.repeat(kept, clips)]
        ends = np.r_[0, np.cumsum(kept)][self.ends]
        clip_ends = np.cumsum(clips[kept])
        return RowSet(self.manifests, ends, self.numbers[kept], keys, clip_ends, tokens, self.voices[kept])


@dataclass
class Part:
    """Results of one rank for its rows of a chunk."""

    numbers: np.ndarray  # int64 [rows], usable rows only
    tokens: np.ndarray | None  # int32 [rows]
    clips: np.ndarray  # int64 [rows], clips per row
    keys: np.ndarray  # uint8 [clips of all rows, 32]
    faults: list[Fault]
    stats: np.ndarray  # TEXT_STATS [rows]
    voices: np.ndarray  # VOICE [rows]


def put_together(manifest: Manifest, parts: list[Part]) -> tuple[RowSet, np.ndarray]:
    """Merges all ranks' rows in the manifest's order; returns them and their TEXT_STATS."""
    if not parts:
        return RowSet((manifest,), np.zeros(1, np.int64)), np.zeros(0, TEXT_STATS)
    names = ("numbers", "clips", "keys", "stats", "voices")
    numbers, clips, keys, stats, voices = (np.concatenate([getattr(p, name) for p in parts]) for name in names)
    order = np.argsort(numbers)
    first = (np.cumsum(clips) - clips)[order]
    clips = clips[order]
    ends = np.cumsum(clips)
    places = np.repeat(first - (ends - clips), clips) + np.arange(len(keys))
    tokens = None if parts[0].tokens is None else np.concatenate([part.tokens for part in parts])[order]
    rows = RowSet((manifest,), np.array([len(order)]), numbers[order], keys[places], ends, tokens, voices[order])
    return rows, stats[order]


def joined(sets: list[RowSet]) -> RowSet:
    """Concatenates the rows of one or more manifests.

    The same speaker name means a different voice in each manifest, so references never cross manifests.
    """
    if len(sets) == 1:
        return sets[0]
    voices = [rows.voices.copy() for rows in sets]
    for number, of_set in enumerate(voices):
        named = of_set["speaker"] != 0
        of_set["speaker"][named] += np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)
    counts = [len(rows) for rows in sets]
    clips_before = np.cumsum([0, *(len(rows.keys) for rows in sets[:-1])])
    return RowSet(
        tuple(manifest for rows in sets for manifest in rows.manifests),
        np.cumsum(counts),
        np.concatenate([rows.numbers for rows in sets]),
        np.concatenate([rows.keys for rows in sets]),
        np.concatenate([rows.clip_ends + before for rows, before in zip(sets, clips_before, strict=True)]),
        None if sets[0].tokens is None else np.concatenate([rows.tokens for rows in sets]),
        np.concatenate(voices),
        tuple(line for rows in sets for line in rows.summary),
    )
