"""`--train_manifest A B=0.3`: the manifests of an epoch, their weights and their names."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from ..errors import ConfigError

MOST_WEIGHT = 1000.0  # repeats per epoch; more is probably a typo


@dataclass(frozen=True)
class Portion:
    """A manifest and its weight: the number of times an epoch takes its rows, as a share below 1, repeated above."""

    path: str
    weight: float = 1.0

    def __str__(self) -> str:
        """Canonical form of the flag's value, independent of the weight's spelling."""
        return self.path if self.weight == 1 else f"{self.path}={self.weight!r}"


def portions_of(words: Sequence[str]) -> list[Portion]:
    """Parses values `path` or `path=weight`. An existing file with `=` in its name is a path.

    Raises:
        ConfigError: invalid weights, or a manifest that is given twice; one line each.
    """
    found: list[Portion] = []
    problems: list[str] = []
    for word in words:
        try:
            portion = _portion(word)
        except ValueError as error:
            problems.append(f"--train_manifest: {word[:200]}: {error}")
            continue
        if any(os.path.abspath(portion.path) == os.path.abspath(other.path) for other in found):
            problems.append(f"--train_manifest: {portion.path} is given twice; give it once, with the total weight")
        found.append(portion)
    if problems:
        raise ConfigError(problems)
    return found


def _portion(word: str) -> Portion:
    path, sign, text = word.rpartition("=")
    # `run=3/data.jsonl` is a path even if it does not exist: a weight has no folder.
    if not sign or os.path.lexists(word) or (os.sep in text and not os.path.lexists(path)):
        return Portion(word)
    if not path.strip():
        raise ValueError("has no manifest before `=`")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MOST_WEIGHT:
        raise ValueError(
            f"the weight {text[:40]!r} must be a number above 0 and up to {MOST_WEIGHT:g} (1: all rows once per epoch)"
        )
    return Portion(path, weight)


def names_of(portions: Sequence[Portion]) -> list[str]:
    """Returns a short, unique name of each manifest: its file's, preceded by as many folders as necessary."""
    paths = [PurePath(os.path.abspath(portion.path)) for portion in portions]
    deepest = max(len(path.parts) for path in paths)
    spellings: list[Callable[[PurePath], str]] = [lambda path: path.stem, lambda path: path.name]
    spellings += [partial(_last_parts, n) for n in range(2, deepest + 1)]
    spellings += [str]
    return next(names for spell in spellings if len(set(names := [spell(path) for path in paths])) == len(paths))


def _last_parts(count: int, path: PurePath) -> str:
    return "/".join([*path.parts[-count:-1], path.stem])
