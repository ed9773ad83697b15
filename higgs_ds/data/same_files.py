"""Check that all ranks read the same manifests and see the same clips, since ranks divide rows by number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, first_of
from .faults import origin
from .manifest import Manifest

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks

CHECKED_ROWS = 16  # per manifest


def check_same_files(manifests: list[Manifest], ranks: Ranks) -> None:
    """Raises ConfigError on all ranks if some have other manifests or clips than rank 0, and names these ranks."""
    if ranks.world_size == 1:
        return
    of_ranks = ranks.gather([(manifest.digest(), manifest.faults) for manifest in manifests])
    for i, manifest in enumerate(manifests):
        # A rank with another file would combine one row's text with another row's clip.
        other = [rank for rank, found in enumerate(of_ranks) if found[i][0] != of_ranks[0][i][0]]
        if other:
            reasons = [f"rank {rank}: {fault}" for rank, found in enumerate(of_ranks) for fault in found[i][1]]
            raise ConfigError(
                [
                    f"{manifest.file}: differs on {ranks.named(other)} from rank 0; copy the same file to all nodes",
                    *reasons,
                ]
            )
    problems = [problem for manifest in manifests for problem in _differing_clips(manifest, ranks)]
    if problems:
        raise ConfigError(first_of(problems, 5))


def _differing_clips(manifest: Manifest, ranks: Ranks) -> list[str]:
    """Checks a few rows on all ranks; returns one line for each whose clips differ from rank 0.

    Otherwise each row is checked by one rank, and clips missing on that host would be reported as faults of the row.
    """
    numbers = np.unique(np.linspace(0, max(0, len(manifest) - 1), min(len(manifest), CHECKED_ROWS)).astype(int))
    of_ranks = ranks.gather([manifest.clips_here(number) for number in numbers.tolist()])
    problems = []
    elements = manifest.elements_of(numbers).tolist()
    for i, line in enumerate(manifest.lines_of(numbers).tolist()):
        other = [rank for rank, found in enumerate(of_ranks) if found[i] != of_ranks[0][i]]
        if other:
            place = origin(manifest.file, line, elements[i])
            problems.append(
                f"{place}: {ranks.named([0])}: {of_ranks[0][i]}; {ranks.named(other)}: "
                f"{of_ranks[other[0]][i]}; all hosts must see the same clips (docs/many-machines.md)"
            )
    return problems
