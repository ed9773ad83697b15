"""The reference of a speech row in an epoch: drawn from (seed, epoch, row), the same at every world size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from ..data.chatml import SYSTEM_PROMPT, Row, Turn
from ..data.row_set import RowSet


class References:
    """Rows with another clip of their speaker before them, or with the one that their manifest gives, at a rate.

    A speech row takes part if it has a reference of its own, or if its speaker has another speech row short enough to
    stand before it: both rows' tokens together are at most `max_tokens`. Other rows stay as they are. What a row may
    take at most is in `longest`, for a plan that holds in every epoch.
    """

    def __init__(
        self, rows: RowSet, *, rate: float, seed: int, max_tokens: int, tokenize: Callable[[Sequence[Turn]], list[int]]
    ):
        """`rows` with `tokens`, at most `max_tokens` each; `rate`: the share that carries a reference, 0 to 1."""
        self._rows = rows
        self._rate = rate
        self._seed = seed
        tokens = np.asarray(rows.tokens, np.int64)
        # By speaker, the shortest first; a row's own number settles ties, so that every rank has the same order.
        self._donors = np.lexsort((tokens, rows.voices["speaker"]))
        speakers = rows.voices["speaker"][self._donors]
        self._first = np.searchsorted(speakers, rows.voices["speaker"], side="left")
        # Of the speaker's rows, those that fit: found for all rows at once, by one key that ascends over `_donors`.
        speaker_number = np.unique(rows.voices["speaker"], return_inverse=True)[1].reshape(-1).astype(np.int64)
        width = np.int64(max_tokens + 1)
        ascending = (speaker_number * width + tokens)[self._donors]
        room = np.clip(max_tokens - tokens, 0, max_tokens)
        self._behind = np.searchsorted(ascending, speaker_number * width + room, side="right")
        own = rows.voices["referenced"].astype(bool)
        self._behind[own | (rows.voices["speaker"] == 0)] = 0
        only_itself = self._behind == self._first + 1
        only_itself[only_itself] = self._donors[self._first[only_itself]] == np.flatnonzero(only_itself)
        self._behind[only_itself] = 0
        # Without its reference a row gets upstream's system turn, which may be longer than a very short clip.
        system = len(tokenize((Turn("system", (SYSTEM_PROMPT,)),)))
        self._optional = own & (tokens + system <= max_tokens)
        self.longest = tokens + np.where(self._optional, system, 0)
        lent = np.flatnonzero(self._behind > self._first)
        self.longest[lent] += tokens[self._donors[self._behind[lent] - 1]]
        self.longest = self.longest.astype(np.int32)

    def row(self, i: int, epoch: int | None) -> Row:
        """Row `i` as it is trained on in an epoch (0-based); None: with the longest reference that it may have."""
        row = self._rows[i]
        chance, choice = self._draw(i, epoch)
        if self._optional[i]:
            return row if chance < self._rate else row.with_reference(None)
        count = int(self._behind[i] - self._first[i])
        if count <= 0 or chance >= self._rate:
            return row
        target = row.audio_refs[-1][1]
        for more in range(count):  # past the row itself, and past others that speak the same clip
            place = count - 1 - more if epoch is None else (choice + more) % count
            donor = self._rows[int(self._donors[self._first[i] + place])]
            answer = donor.target()
            assert answer is not None  # a speech row: no other has a speaker's number
            text, clip = answer
            reference = donor.audio_refs[clip][1]
            if reference.key != target.key:
                return row.with_reference((text, reference))
        return row

    def _draw(self, i: int, epoch: int | None) -> tuple[float, int]:
        """A number from 0 up to 1, and a large whole one."""
        if epoch is None:
            return -1.0, 0
        drawn = hashlib.sha256(f"reference:{self._seed}:{epoch}:{i}".encode()).digest()
        return int.from_bytes(drawn[:6], "little") / 2**48, int.from_bytes(drawn[8:16], "little")

    def describe(self) -> str:
        """The rows that take part, as text."""
        own, lent = int(self._optional.sum()), int((self._behind > self._first).sum())
        return (
            f"references: {self._rate:g} of {own + lent} rows an epoch ({lent} with another clip of their speaker, "
            f"{own} with their own); {len(self._rows) - own - lent} rows as they are"
        )
