"""Loading of manifests into trainable rows. All ranks together check every row and encode every clip.

Rows stay in the text of their manifest. Each rank keeps only their positions, token counts and the keys of their
clips' codes: a million rows take a few hundred megabytes, which the data workers share.
"""

from __future__ import annotations

import gc
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from ..errors import ConfigError, reason_of
from .chatml import SERVED, AudioRef, Row
from .code_cache import CodeCache
from .controls import DEFAULT_CONTROLS
from .faults import SHOWN_OF_A_KIND, Fault, grouped, plural, write_faults
from .manifest import Manifest
from .row_set import Part, RowSet, joined, put_together
from .same_files import check_same_files
from .schema import OWN_REFERENCE
from .transcripts import TEXT_STATS, VOICE, SpeechStats, first_lines, text_stats_of, voice_of, warnings_of

if TYPE_CHECKING:
    from ..batching.token_counts import LengthIndex
    from ..distributed.ranks import Ranks

CHUNK_ROWS = 16384  # rows per rank that are in memory as objects at a time
BLOCK_ROWS = 64  # consecutive rows per rank, so that neighbouring clips are read by one rank
EXCHANGE_SEC = 16.0  # longest interval at which ranks exchange their progress while encoding; the first are shorter


@dataclass(frozen=True)
class RowOptions:
    """Options for reading rows, for limits on their length (None: no limit) and for reporting faults."""

    max_duration_sec: float
    skip_bad_rows: bool = False
    count_tokens: bool = True
    max_tokens: int | None = None  # per batch; if tokens are counted, a longer row is a fault
    max_row_tokens: int | None = None
    audio_root: str | None = None  # searched for clips before the manifest's folder
    channel: int | None = None  # default for rows that name none, from 0
    audio_track: int | None = None  # likewise, in a container
    controls: re.Pattern[str] = DEFAULT_CONTROLS  # tokens not allowed in texts; see `controls.control_tokens`
    prompt_style: str = SERVED  # of speech rows; see `chatml.speech_messages`
    problem_of: Callable[[Row], str | None] = lambda row: None  # problem of a row for this model family
    faults_dir: Path | None = None  # folder for `faults.jsonl` with all faults and warnings
    outcome: str = "nothing was trained (--skip_bad_rows trains without them)"  # last line after a list of faults

    def open(self, manifest: str, trains: bool) -> Manifest:
        """Opens a manifest with these options, for training or for validation."""
        names = ("audio_root", "controls", "prompt_style", "channel", "audio_track")
        return Manifest(manifest, trains=trains, **{name: getattr(self, name) for name in names})


def load_rows(
    manifests: list[str],
    options: RowOptions,
    *,
    trained: int = 1,
    cache: CodeCache,
    ranks: Ranks,
    lengths: LengthIndex | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[RowSet, RowSet]:
    """Loads the usable rows of the training manifests, joined, and those of the validation manifest if there is one.

    Checks every row and encodes every clip once; rows and clips are divided among the ranks.

    Args:
        trained: number of training manifests; these come first in `manifests`.
        lengths: counts the tokens of rows.
        on_progress: called after each clip and row that this rank finishes.

    Raises:
        ConfigError: faults in any manifest without `skip_bad_rows`, a manifest without a usable row, or a cache that
            is not writable.
    """
    read = [options.open(manifest, number < trained) for number, manifest in enumerate(manifests)]
    check_same_files(read, ranks)
    loader = _Loader(cache, ranks, options, lengths, on_progress)
    total = sum(map(len, read))
    bar = tqdm(total=total, desc="rows", unit="row", disable=not ranks.is_main, mininterval=1.0)
    gc.freeze()  # otherwise each full collection scans torch's half a million objects: 40 % of the time for rows
    try:
        with bar:
            sets = [loader.load(manifest, bar) for manifest in read]
    finally:
        gc.unfreeze()
    loader.refresh_index()  # here, so that data workers share the index instead of each reading it
    _report(read, trained, loader, options, ranks)
    for manifest, rows, faults in zip(read, sets, loader.faults, strict=True):
        if not rows:
            raise ConfigError([*grouped(faults), f"{manifest.file}: no usable rows left"])
    for rows, speech in zip(sets, loader.speech, strict=True):
        rows.summary = tuple(first_lines(speech)) if ranks.is_main else ()
    return joined(sets[:trained]), sets[trained] if len(sets) > trained else RowSet()


def _report(read: list[Manifest], trained: int, loader: _Loader, options: RowOptions, ranks: Ranks) -> None:
    """Prints all findings by kind and writes each of them to `faults_dir`.

    Raises:
        ConfigError: there are faults, and `skip_bad_rows` is off; or faults of the manifest as a whole.
    """
    faults = [fault for found in loader.faults for fault in found]
    bad_rows = plural(len({fault.row for fault in faults}), "bad row")
    of_texts = [manifest.of_texts() for manifest in read]
    stops = [fault for found, _ in of_texts for fault in found]
    warnings = warnings_of(loader.speech, trained) if ranks.is_main else []
    warnings += [warning for _, found in of_texts for warning in found]
    path = None
    if ranks.is_main and options.faults_dir is not None:
        path = write_faults(options.faults_dir, [*faults, *stops, *warnings])
    notes = [note for manifest in read for note in manifest.notes()]
    if warnings:
        rows = plural(len({f.row for f in warnings}), "row")
        notes += [f"{rows} with warnings, used as they are:", *grouped(warnings)]
    lines = grouped([*faults, *stops])
    if path is not None and len(faults) + len(warnings) > SHOWN_OF_A_KIND:
        (lines if faults else notes).append(f"complete list: {path}")
    if notes:
        ranks.say("\n".join(notes))
    if faults and not options.skip_bad_rows:
        raise ConfigError([*lines, f"{bad_rows}; {options.outcome}"])
    if stops:
        raise ConfigError([*lines, "nothing was trained"])
    if faults:
        ranks.say("\n".join([f"--skip_bad_rows: training without {bad_rows}:", *lines]))


class _Loader:
    """Loads manifests on all ranks together, one chunk of rows at a time."""

    def __init__(
        self,
        cache: CodeCache,
        ranks: Ranks,
        options: RowOptions,
        lengths: LengthIndex | None,
        on_progress: Callable[[], None],
    ):
        self._cache = cache
        self._ranks = ranks
        self._options = options
        self._lengths = lengths
        self._on_progress = on_progress
        self._others_encoded = True  # since this rank last read the index
        self.faults: list[list[Fault]] = []  # of each manifest
        self.speech: list[SpeechStats] = []  # of each manifest, usable rows only

    def load(self, manifest: Manifest, bar: tqdm) -> RowSet:
        """Returns a manifest's usable rows; adds the faults of the others to `faults`."""
        size = CHUNK_ROWS * self._ranks.world_size
        parts: list[Part] = []
        before = bar.n
        for first in range(0, len(manifest), size):
            chunk = range(first, min(first + size, len(manifest)))

            def progress(share: float, at: int = before + first, count: int = len(chunk)) -> None:
                bar.update(at + int(share * count) - bar.n)

            parts += self._ranks.gather(self._chunk(manifest, chunk, progress))
            progress(1.0)
        manifest.set_seen(self._ranks.gather(manifest.seen()))
        rows, stats = put_together(manifest, parts)
        rows, found = self._screen(manifest, rows, stats)
        self.faults.append(sorted([*manifest.faults, *(fault for part in parts for fault in part.faults), *found]))
        return rows

    def _screen(self, manifest: Manifest, rows: RowSet, stats: np.ndarray) -> tuple[RowSet, list[Fault]]:
        """Drops rows that take too many tokens and returns their faults.

        Every rank screens all rows, with the same result.
        """
        clip_frames = self._cache.frames_each(rows.keys) if len(rows.keys) else np.zeros(0, np.int64)
        first_clip = np.r_[0, rows.clip_ends[:-1]][: len(rows)]
        place = np.where(stats["clip"] >= 0, first_clip + stats["clip"], -1)
        speaks, place = place >= 0, place[place >= 0]
        clips, seconds = np.zeros(len(rows), np.uint64), np.zeros(len(rows))
        clips[speaks] = rows.keys.view("<u8").reshape(-1, 4)[place, 0]  # 64 of the 256 bits distinguish a million clips
        seconds[speaks] = clip_frames[place] / self._cache.codec.frame_rate
        lines, elements = manifest.lines_of(rows.numbers), manifest.elements_of(rows.numbers)
        problems = dict(self._too_long(rows, stats, clip_frames, first_clip))
        speech = SpeechStats(manifest.file, lines, elements, stats, clips, seconds)
        faults = [speech.fault(i, "row", problem) for i, problem in problems.items()]
        if problems:
            kept = np.ones(len(rows), bool)
            kept[list(problems)] = False
            rows = rows.only(kept)
            speech = speech.only(kept)
        self.speech.append(speech)
        return rows, faults

    def _too_long(
        self, rows: RowSet, stats: np.ndarray, clip_frames: np.ndarray, first_clip: np.ndarray
    ) -> Iterator[tuple[int, str]]:
        """Yields (row, problem) of each row over the limit; counts tokens only if bytes and frames exceed it."""
        limit = self._options.max_row_tokens
        if limit is None or self._lengths is None:
            return
        frames = np.r_[0, np.cumsum(clip_frames)]
        most = stats["bytes"] + frames[rows.clip_ends] - frames[first_clip] if len(rows) else np.zeros(0)
        for i in np.flatnonzero(most > limit).tolist():
            tokens = self._lengths.tokens(rows[i]) if rows.tokens is None else int(rows.tokens[i])
            if tokens > limit:
                yield i, f"takes {tokens} tokens, over --max_row_tokens {limit}"

    def refresh_index(self) -> None:
        """Reads the index of codes again if other ranks encoded clips."""
        if self._others_encoded:
            self._cache.read_index()
        self._others_encoded = False

    def _chunk(self, manifest: Manifest, chunk: range, progress: Callable[[float], None]) -> Part:
        rows: list[Row] = []
        numbers: list[int] = []
        faults: list[Fault] = []
        for number in _share(chunk, self._ranks.rank, self._ranks.world_size):
            row, found = manifest.check(number)
            faults += found
            if row is not None and (problem := self._options.problem_of(row)):
                faults.append(row.fault("row", problem))
            elif row is not None:
                rows.append(row)
                numbers.append(number)
            self._on_progress()
        refs = [row.audio_refs for row in rows]
        keys, problems = self._encode([ref for of_row in refs for _, ref in of_row], progress)
        clips = np.array([len(of_row) for of_row in refs], np.int64)
        ends = np.cumsum(clips)
        usable = np.ones(len(rows), bool)
        for clip, problem in problems.items():
            i = int(np.searchsorted(ends, clip, side="right"))
            where = refs[i][clip - int(ends[i] - clips[i])][0]
            faults.append(rows[i].fault(where, problem))
            usable[i] = False
        for i, where in _own_references(rows, keys, clips):
            if usable[i]:
                faults.append(rows[i].fault(where, f"has the same content as {OWN_REFERENCE}"))
                usable[i] = False
        tokens = None
        if self._options.count_tokens and self._lengths is not None:
            counted = np.flatnonzero(usable)
            keyed = [rows[i].with_keys(keys[ends[i] - clips[i] : ends[i]]) for i in counted.tolist()]
            tokens = self._lengths.count(keyed, self._on_progress)
            too_long = tokens > (self._options.max_tokens or np.inf)
            for i, count in zip(counted[too_long].tolist(), tokens[too_long].tolist(), strict=True):
                problem = f"takes {count} tokens, over --max_tokens_per_batch {self._options.max_tokens}"
                faults.append(rows[i].fault("row", problem))
            usable[counted[too_long]] = False
            tokens = tokens[~too_long]
        kept = np.repeat(usable, clips)
        stats = np.array([text_stats_of(row) for row, use in zip(rows, usable, strict=True) if use], TEXT_STATS)
        voices = np.array([voice_of(row) for row, use in zip(rows, usable, strict=True) if use], VOICE)
        return Part(np.array(numbers, np.int64)[usable], tokens, clips[usable], keys[kept], faults, stats, voices)

    def _encode(self, refs: list[AudioRef], progress: Callable[[float], None]) -> tuple[np.ndarray, dict[int, str]]:
        """Encodes the clips of all ranks that are not cached yet.

        Returns the keys of this rank's `refs`, uint8 [refs, 32], and the problems of bad ones by number. A clip named
        by several ranks is encoded by one. Ranks synchronise every few seconds, so that the bar counts all clips.
        """
        ranks, cache = self._ranks, self._cache
        self.refresh_index()
        shares = ranks.gather(np.frombuffer(b"".join(map(_identity, refs)), "<u8").reshape(-1, 2))
        start = sum(map(len, shares[: ranks.rank]))
        own = slice(start, start + len(refs))
        # Each clip's rank is drawn among those that name it: the first would give rank 0 all shared clips.
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
        work = cache.ensure_each([refs[i] for i in (owner[mine] - start).tolist()], self._options.max_duration_sec)
        more, pause = True, 0.5
        while more:
            encode_some = partial(self._encode_some, work, mine, found, problems, time.monotonic() + pause)
            states = ranks.gather((ranks.each(encode_some), len(found)))
            more = any(state[0] for state in states)
            progress(sum(state[1] for state in states) / max(1, len(clips)))
            pause = min(2 * pause, EXCHANGE_SEC)
        keys = np.zeros((len(clips), 32), np.uint8)
        all_problems: dict[int, str] = {}
        for clip_numbers, their_keys, their_problems, encoded in ranks.gather(
            (mine, np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32), problems, cache.encoded - encoded_before)
        ):
            keys[clip_numbers] = their_keys
            all_problems |= their_problems
            self._others_encoded |= encoded > 0
        own_clips = clip_of[own]
        bad = np.flatnonzero(np.isin(own_clips, list(all_problems)))
        return keys[own_clips], {int(n): all_problems[int(own_clips[n])] for n in bad}

    def _encode_some(
        self,
        work: Iterator[tuple[AudioRef, bytes | None, str | None]],
        mine: np.ndarray,
        found: list[bytes],
        problems: dict[int, str],
        until: float,
    ) -> bool:
        """Encodes until the time `until`. Returns False once this rank has no clips left."""
        try:
            for _, key, problem in work:
                if problem is not None:
                    problems[int(mine[len(found)])] = problem
                found.append(key or bytes(32))
                self._on_progress()
                if time.monotonic() > until:
                    return True
        except OSError as error:
            folder = self._cache.folder
            raise ConfigError([f"--codes_cache: {folder} is not writable: {reason_of(error)}"]) from error
        return False


def _own_references(rows: list[Row], keys: np.ndarray, clips: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yields (row, field) of each earlier clip with the same content as the row's target clip.

    `keys` uint8 [clips of all rows, 32]; `clips` int64 [rows], clips per row. The target is a row's last clip.
    """
    if not len(keys):
        return
    last = np.cumsum(clips) - 1
    words = np.ascontiguousarray(keys).view("<u8").reshape(-1, 4)
    same = (words == np.repeat(words[last], clips, axis=0)).all(axis=1)
    same[last] = False
    row_of = np.repeat(np.arange(len(rows)), clips)
    for clip in np.flatnonzero(same).tolist():
        i = int(row_of[clip])
        if rows[i].target_clip() is not None:
            yield i, rows[i].audio_refs[clip - int(last[i] + 1 - clips[i])][0]


def _share(chunk: range, rank: int, world_size: int) -> list[int]:
    """Returns a rank's rows, in blocks, so that new rows at a manifest's end are shared by all ranks."""
    block = max(1, min(BLOCK_ROWS, len(chunk) // (16 * world_size)))
    return [i for i in chunk if (i - chunk.start) // block % world_size == rank]


def _identity(ref: AudioRef) -> bytes:
    """Returns 16 bytes that are equal for equal refs."""
    name = f"{ref.path or ''}\0{ref.raw_audio or ''}\0{ref.span} {ref.sample_rate}"
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
