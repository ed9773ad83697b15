"""From manifests to rows that can be trained on: every row checked, every clip encoded, by all ranks together.

Rows stay where they are in their manifest's text. What every rank keeps of each is where it stands, its tokens and the
keys of its clips' codes, so that a million rows take some hundred megabytes, which data workers share.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from .codec import check_fits
from .codes import CodeCache
from .config import ConfigError
from .lengths import LengthIndex
from .manifest import AudioRef, Fault, Manifest, Row

if TYPE_CHECKING:
    from .engine import Ranks

CHUNK_ROWS = 16384  # rows of a rank that are objects at a time
BLOCK_ROWS = 64  # rows in a line that one rank takes, so that what stands together is read together
# While clips are encoded, ranks tell each other how far they are: soon at first, then this often.
EXCHANGE_SEC = 16.0


@dataclass
class RowSet(Sequence):
    """The usable rows of a manifest, in its order; each is parsed when it is asked for, and its clips carry keys."""

    manifest: Manifest | None = None
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [rows], in the manifest
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 32), np.uint8))  # [clips of all rows, 32]
    clip_ends: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [rows], in `keys`
    tokens: np.ndarray | None = None  # int32 [rows], where they were asked for

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Row:
        behind = int(self.clip_ends[i])
        first = int(self.clip_ends[i - 1]) if i else 0
        return self.manifest.row(int(self.numbers[i])).with_keys(self.keys[first:behind])


def load_rows(
    manifests: list[str],
    *,
    cache: CodeCache,
    num_codebooks: int,
    codebook_size: int,
    max_duration_sec: float,
    skip_bad_rows: bool,
    ranks: Ranks,
    warn: Callable[[str], None],
    moved: Callable[[], None] = lambda: None,
    lengths: LengthIndex | None = None,
    max_tokens: int | None = None,
    outcome: str = "nothing was trained (--skip_bad_rows trains without them)",
) -> tuple[RowSet, RowSet]:
    """The usable rows of the training manifest, and of the validation manifest where there is one.

    Reads, checks and encodes every clip once; the ranks divide rows and clips among them.

    Args:
        lengths: counts the rows' tokens, where they are wanted.
        moved: told of each clip and row that is done, by this rank.
        max_tokens: with `lengths`, a row of more tokens is a fault.

    Raises:
        ConfigError: all faults of all manifests without `skip_bad_rows`, a manifest without a usable row, or a cache
            that cannot be written to.
    """
    check_fits(cache.codec, num_codebooks, codebook_size)
    read = [Manifest(manifest) for manifest in manifests]
    for manifest, *others in zip(
        manifests, *ranks.gather([(part.digest(), part.faults) for part in read]), strict=True
    ):
        _check_same(manifest, others)
    loader = _Loader(cache, ranks, max_duration_sec, lengths, max_tokens, moved)
    total = sum(map(len, read))
    bar = tqdm(total=total, desc="rows", unit="row", disable=not ranks.is_main, mininterval=1.0)
    with bar, _few_objects_to_collect():
        sets = [loader.load(manifest, bar) for manifest in read]
    loader.read_what_others_encoded()  # here, for data workers to share instead of each reading it for itself
    faults = [fault for manifest, found in zip(read, loader.faults, strict=True) for fault in sorted(found)]
    count = len({(fault.file, fault.line) for fault in faults})
    bad_rows = f"{count} bad row{'s' * (count != 1)}"
    lines = [str(fault) for fault in faults]
    if faults and not skip_bad_rows:
        raise ConfigError([*lines, f"{bad_rows}; {outcome}"])
    for manifest, rows in zip(manifests, sets, strict=True):
        if not rows:
            raise ConfigError([*lines, f"{manifest}: no usable row is left"])
    if faults:
        warn("\n".join([f"--skip_bad_rows: training without {bad_rows}:", *lines]))
    return sets[0], sets[1] if len(sets) > 1 else RowSet()


def _check_same(manifest: str, of_ranks: list[tuple[bytes, list[Fault]]]) -> None:
    """Rows are shared out by number: a rank with another file would pair one row's text with another's clip.

    Raises:
        ConfigError: naming the ranks, with what was wrong for each that could not read the file.
    """
    other = [rank for rank, (digest, _) in enumerate(of_ranks) if digest != of_ranks[0][0]]
    if other:
        named = f"rank{'s' * (len(other) > 1)} {', '.join(map(str, other))}"
        reasons = [f"rank {rank}: {fault}" for rank, (_, faults) in enumerate(of_ranks) for fault in faults]
        raise ConfigError(
            [f"{manifest}: {named} found another file than rank 0; give all nodes the same one", *reasons]
        )


@contextlib.contextmanager
def _few_objects_to_collect() -> Iterator[None]:
    """Spares the garbage collector all that is there already: torch's half a million objects, at each full collection,
    took 40 % of the time that rows take."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass
class _Part:
    """What one rank found in its rows of a chunk."""

    numbers: np.ndarray  # int64 [rows], of the usable ones
    tokens: np.ndarray | None  # int32 [rows]
    clips: np.ndarray  # int64 [rows], how many
    keys: np.ndarray  # uint8 [clips of all rows, 32]
    faults: list[Fault]


class _Loader:
    """All ranks go through the manifests together, a chunk of rows at a time."""

    def __init__(
        self,
        cache: CodeCache,
        ranks: Ranks,
        max_duration_sec: float,
        lengths: LengthIndex | None,
        max_tokens: int | None,
        moved: Callable[[], None],
    ):
        self._cache = cache
        self._ranks = ranks
        self._max_duration_sec = max_duration_sec
        self._lengths = lengths
        self._max_tokens = max_tokens
        self._moved = moved
        self._others_encoded = True  # since this rank last looked
        self.faults: list[list[Fault]] = []  # of each manifest

    def load(self, manifest: Manifest, bar: tqdm) -> RowSet:
        """Its usable rows; what is wrong with the others is added to `faults`."""
        size = CHUNK_ROWS * self._ranks.world_size
        parts: list[_Part] = []
        before = bar.n
        for first in range(0, len(manifest), size):
            rows = range(first, min(first + size, len(manifest)))

            def progress(share: float, at: int = before + first, count: int = len(rows)) -> None:
                bar.update(at + int(share * count) - bar.n)

            parts += self._ranks.gather(self._chunk(manifest, rows, progress))
            progress(1.0)
        self.faults.append([*manifest.faults, *(fault for part in parts for fault in part.faults)])
        return _put_together(manifest, parts)

    def read_what_others_encoded(self) -> None:
        """Brings the index of codes up to date, if it may not be."""
        if self._others_encoded:
            self._cache.read_index()
        self._others_encoded = False

    def _chunk(self, manifest: Manifest, chunk: range, progress: Callable[[float], None]) -> _Part:
        rows: list[Row] = []
        numbers: list[int] = []
        faults: list[Fault] = []
        for number in _share(chunk, self._ranks.rank, self._ranks.world_size):
            row, found = manifest.check(number)
            faults += found
            if row is not None:
                rows.append(row)
                numbers.append(number)
            self._moved()
        refs = [row.audio_refs for row in rows]
        keys, problems = self._encode([ref for of_row in refs for _, ref in of_row], progress)
        clips = np.array([len(of_row) for of_row in refs], np.int64)
        ends = np.cumsum(clips)
        usable = np.ones(len(rows), bool)
        for clip, problem in problems.items():
            i = int(np.searchsorted(ends, clip, side="right"))
            where = refs[i][clip - int(ends[i] - clips[i])][0]
            faults.append(Fault(rows[i].file, rows[i].line, where, problem))
            usable[i] = False
        tokens = None
        if self._lengths is not None:
            counted = np.flatnonzero(usable)
            keyed = [rows[i].with_keys(keys[ends[i] - clips[i] : ends[i]]) for i in counted.tolist()]
            tokens = self._lengths.count(keyed, self._moved)
            too_long = tokens > (self._max_tokens or np.inf)
            for i, count in zip(counted[too_long].tolist(), tokens[too_long].tolist(), strict=True):
                problem = f"takes {count} tokens, over --max_tokens_per_batch {self._max_tokens}"
                faults.append(Fault(rows[i].file, rows[i].line, "row", problem))
            usable[counted[too_long]] = False
            tokens = tokens[~too_long]
        kept = np.repeat(usable, clips)
        return _Part(np.array(numbers, np.int64)[usable], tokens, clips[usable], keys[kept], faults)

    def _encode(self, refs: list[AudioRef], progress: Callable[[float], None]) -> tuple[np.ndarray, dict[int, str]]:
        """Encodes the clips that all ranks have given and that are not cached yet.

        Returns what concerns this rank's `refs`: their keys uint8 [refs, 32], and the problems of bad ones by number.
        A clip that several ranks name is one rank's to encode. Ranks meet every few seconds, for the bar to count all.
        """
        ranks, cache = self._ranks, self._cache
        self.read_what_others_encoded()
        shares = ranks.gather(np.frombuffer(b"".join(map(_identity, refs)), "<u8").reshape(-1, 2))
        start = sum(map(len, shares[: ranks.rank]))
        own = slice(start, start + len(refs))
        # Of those who name a clip, one is drawn: the first would leave rank 0 with all that everybody names.
        named = np.concatenate(shares)
        order = np.random.default_rng(0).permutation(len(named))
        clips, drawn, which = np.unique(named[order], axis=0, return_index=True, return_inverse=True)
        clip_of = np.empty(len(named), np.int64)
        clip_of[order] = which.reshape(-1)
        owner = order[drawn]
        mine = np.flatnonzero((own.start <= owner) & (owner < own.stop))

        found: list[bytes] = []
        problems: dict[int, str] = {}
        encoded_before = cache.encoded
        work = cache.ensure_each([refs[i] for i in (owner[mine] - start).tolist()], self._max_duration_sec)
        more, pause = True, 0.5
        while more:
            go_on = partial(self._go_on, work, mine, found, problems, time.monotonic() + pause)
            states = ranks.gather((ranks.each(go_on), len(found)))
            more = any(state[0] for state in states)
            progress(sum(state[1] for state in states) / max(1, len(clips)))
            pause = min(2 * pause, EXCHANGE_SEC)
        keys = np.zeros((len(clips), 32), np.uint8)
        all_problems: dict[int, str] = {}
        for clip_numbers, their_keys, their_problems, encoded in ranks.gather(
            (mine, _as_array(found), problems, cache.encoded - encoded_before)
        ):
            keys[clip_numbers] = their_keys
            all_problems |= their_problems
            self._others_encoded |= encoded > 0
        own_clips = clip_of[own]
        bad = np.flatnonzero(np.isin(own_clips, list(all_problems)))
        return keys[own_clips], {int(n): all_problems[int(own_clips[n])] for n in bad}

    def _go_on(
        self,
        work: Iterator[tuple[AudioRef, bytes | None, str | None]],
        mine: np.ndarray,
        found: list[bytes],
        problems: dict[int, str],
        until: float,
    ) -> bool:
        """Encodes until then; whether there is more to do."""
        try:
            for _, key, problem in work:
                if problem is not None:
                    problems[int(mine[len(found)])] = problem
                found.append(key or bytes(32))
                self._moved()
                if time.monotonic() > until:
                    return True
        except OSError as error:
            folder = self._cache.folder
            raise ConfigError([f"--codes_cache: {folder} cannot be written to: {error.strerror}"]) from error
        return False


def _share(chunk: range, rank: int, world_size: int) -> list[int]:
    """Every rank's rows: in blocks, so that new rows at a manifest's end are everybody's."""
    block = max(1, min(BLOCK_ROWS, len(chunk) // (16 * world_size)))
    return [i for i in chunk if (i - chunk.start) // block % world_size == rank]


def _identity(ref: AudioRef) -> bytes:
    """16 bytes, the same for refs that are equal."""
    if ref.path is not None:
        name = f"{ref.path}\0{ref.offset_sec} {ref.duration_sec}"
    else:
        name = f"\0{ref.raw_audio}\0{ref.offset_sec} {ref.duration_sec}"
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _as_array(keys: Iterable[bytes]) -> np.ndarray:
    """uint8 [keys, 32]"""
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


def _put_together(manifest: Manifest, parts: list[_Part]) -> RowSet:
    """All ranks' rows in the manifest's order."""
    if not parts:
        return RowSet(manifest)
    numbers, clips, keys = (np.concatenate([getattr(p, name) for p in parts]) for name in ("numbers", "clips", "keys"))
    order = np.argsort(numbers)
    first = (np.cumsum(clips) - clips)[order]
    clips = clips[order]
    ends = np.cumsum(clips)
    places = np.repeat(first - (ends - clips), clips) + np.arange(len(keys))
    tokens = None if parts[0].tokens is None else np.concatenate([part.tokens for part in parts])[order]
    return RowSet(manifest, numbers[order], keys[places], ends, tokens)
