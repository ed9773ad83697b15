"""`--train_manifest A B=0.3`: which manifests an epoch is made of, how much of each, and what each is called."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath

from ..errors import ConfigError

MOST_WEIGHT = 1000.0  # of repeats an epoch; more is a mistake in the sign


@dataclass(frozen=True)
class Portion:
    """A manifest, and how many times an epoch takes its rows: a share of them below 1, repeats above."""

    path: str
    weight: float = 1.0

    def __str__(self) -> str:
        """As it is given; whatever the weight's spelling was, the same."""
        return self.path if self.weight == 1 else f"{self.path}={self.weight!r}"


def portions_of(words: Sequence[str]) -> list[Portion]:
    """The manifests that these words name, `path` or `path=weight`. A file whose own name holds the `=` is a path.

    Raises:
        ConfigError: weights that are no number above 0, or a manifest that is named twice; a line each.
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
            problems.append(f"--train_manifest: {portion.path} is named twice; name it once, with the weight of both")
        found.append(portion)
    if problems:
        raise ConfigError(problems)
    return found


def _portion(word: str) -> Portion:
    path, sign, text = word.rpartition("=")
    # `run=3/data.jsonl` is a path, be it there or not: no weight has a folder in it.
    if not sign or os.path.lexists(word) or (os.sep in text and not os.path.lexists(path)):
        return Portion(word)
    if not path.strip():
        raise ValueError("names no manifest before its `=`")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= MOST_WEIGHT:
        raise ValueError(
            f"the weight {text[:40]!r} is not a number above 0 and up to {MOST_WEIGHT:g} (1: all rows once an epoch)"
        )
    return Portion(path, weight)


def names_of(portions: Sequence[Portion]) -> list[str]:
    """A short name of each manifest, each another: its file's, with as many folders before it as that takes."""
    paths = [PurePath(os.path.abspath(portion.path)) for portion in portions]
    deepest = max(len(path.parts) for path in paths)
    spellings: list[Callable[[PurePath], str]] = [lambda path: path.stem, lambda path: path.name]
    spellings += [partial(_last_parts, n) for n in range(2, deepest + 1)]
    spellings += [str]
    return next(names for spell in spellings if len(set(names := [spell(path) for path in paths])) == len(paths))


def _last_parts(count: int, path: PurePath) -> str:
    return "/".join([*path.parts[-count:-1], path.stem])
