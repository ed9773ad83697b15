"""The rows of several manifests in an epoch: drawn from (seed, epoch), as many and as long in each of them.

A manifest of weight 1 gives every row once. Of one with another weight an epoch takes `weight × rows` rows: whole
copies, and for the rest of it rows that are drawn. For batches by token budget the draw goes through the rows from
long to short at even distances, so that every epoch's rows are of nearly the same lengths and one cut fits them all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError

# Rows of an epoch that repeats some, at most: it is held as numbers, by every rank.
MOST_ROWS = 30_000_000
# Rows of similar length change places before each draw: by so many of the distances between drawn rows at most.
JITTER = 2


class Mixture:
    """The rows of one epoch after the other, of manifests whose rows are numbered one after the other.

    An epoch has `slots`: the n-th takes a row of the same manifest and of nearly the same length in every epoch.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        seed: int = 0,
        tokens: np.ndarray | None = None,
        names: Sequence[str] = (),
    ):
        """Manifests of `counts` rows.

        Args:
            weights: how many times an epoch takes each manifest's rows, above 0; once where left out.
            tokens: [rows of all], for batches that are cut by them.
            names: of the manifests, for what is said of them.

        Raises:
            ConfigError: weights by which an epoch becomes longer than can be held.
        """
        self.counts, self.names = list(counts), list(names)
        self.taken = list(map(rows_taken, counts, weights or [1.0] * len(self.counts)))  # rows of each an epoch
        if sum(self.taken) > max(MOST_ROWS, sum(self.counts)):
            long = f"an epoch of {sum(self.taken):,} rows by these weights, over {MOST_ROWS:,}"
            raise ConfigError([f"--train_manifest: {long}; divide all weights by the same number, give more --epochs"])
        self._ends = np.cumsum(self.counts)
        rows = np.split(np.arange(sum(self.counts)), self._ends[:-1])
        self._parts = [
            _Part(f"mixture:{seed}:{number}", of_part, taken, None if tokens is None else np.asarray(tokens)[of_part])
            for number, (of_part, taken) in enumerate(zip(rows, self.taken, strict=True))
        ]
        # [slots]: the row than which none that ever takes this place has more tokens.
        self.longest = np.concatenate([part.longest() for part in self._parts])

    def __len__(self) -> int:
        """Rows an epoch."""
        return sum(self.taken)

    def rows(self, epoch: int) -> np.ndarray:
        """int64 [slots]: the row numbers of an epoch (0-based), manifest by manifest."""
        return np.concatenate([part.rows(epoch) for part in self._parts])

    def shares(self, rows: Sequence[int]) -> dict[str, float]:
        """By manifest its share, 0 to 1, of these rows; nothing where there is but one manifest."""
        if len(self.counts) < 2 or not len(rows):
            return {}
        counts = np.bincount(np.searchsorted(self._ends, rows, side="right"), minlength=len(self.counts))
        return {name: float(count / len(rows)) for name, count in zip(self.names, counts, strict=True)}

    def lines(self) -> dict[str, str]:
        """By manifest what an epoch takes of it, as text; nothing for a single manifest that is taken as it is."""
        if self.taken == self.counts and len(self.counts) < 2:
            return {}
        said = {}
        for name, count, taken in zip(self.names, self.counts, self.taken, strict=True):
            of = f"all {count:,} rows" if taken == count else f"{taken:,} of {count:,} rows"
            if taken > count:
                of = f"{taken:,} rows, each of {count:,} about {taken / count:.3g} times"
            said[name] = f"{of} an epoch, {100 * taken / len(self):.3g} % of it"
        return said


def rows_taken(count: int, weight: float) -> int:
    """Rows that an epoch takes of a manifest of so many."""
    return max(1, round(weight * count)) if count else 0


class _Part:
    """One manifest's rows in an epoch: whole copies, and some that are drawn."""

    def __init__(self, name: str, rows: np.ndarray, taken: int, tokens: np.ndarray | None):
        self._name, self._rows = name, rows
        copies, self._drawn = divmod(taken, len(rows)) if len(rows) else (0, 0)
        self._copied = np.tile(rows, copies)
        self._by_length = None if tokens is None else rows[np.argsort(-tokens, kind="stable")]
        # Places by which a row may move before a draw.
        self._reach = math.ceil(JITTER * len(rows) / self._drawn) if self._drawn else 0

    def rows(self, epoch: int) -> np.ndarray:
        """int64 [taken]: those of an epoch."""
        return np.concatenate([self._copied, self._draw(epoch)]) if self._drawn else self._copied

    def longest(self) -> np.ndarray:
        """int64 [taken]: see `Mixture.longest`."""
        drawn = self._rows[: self._drawn]
        if self._by_length is not None and self._drawn:
            places = np.arange(self._drawn) * len(self._rows) // self._drawn - self._reach
            drawn = self._by_length[np.maximum(places, 0)]
        return np.concatenate([self._copied, drawn])

    def _draw(self, epoch: int) -> np.ndarray:
        """Some epochs that follow each other share no drawn row; then the order is drawn anew."""
        count = len(self._rows)
        block, turn = divmod(epoch, count // self._drawn)
        # Not numpy's newer generators: what RandomState draws is the same in every version, and so after a resume.
        digest = hashlib.sha256(f"{self._name}:{block}".encode()).digest()
        random = np.random.RandomState(int.from_bytes(digest[:4], "little"))
        start = int(random.randint(count)) + turn * self._drawn
        if self._by_length is None:
            order = self._rows[random.permutation(count)]
        else:
            moved = np.arange(count) + self._reach * random.random_sample(count)
            order = self._by_length[np.argsort(moved, kind="stable")]
        # At even distances: a row is taken where its place × drawn, modulo the rows, falls into a window of `drawn`,
        # and the next epoch's window begins where this one ends.
        return order[(np.arange(self._drawn) * count + start % count) // self._drawn]
