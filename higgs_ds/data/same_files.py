"""Check that all ranks read the same manifests and see the same clips: rows are shared out among them by number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, first_of
from .faults import origin
from .manifest import Manifest

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks

ROWS_LOOKED_AT = 16  # of a manifest


def check_same_files(manifests: list[Manifest], ranks: Ranks) -> None:
    """Raises ConfigError, on all ranks and naming them, where one has another manifest or other clips than rank 0."""
    if ranks.world_size == 1:
        return
    of_ranks = ranks.gather([(manifest.digest(), manifest.faults) for manifest in manifests])
    for i, manifest in enumerate(manifests):
        # A rank with another file would pair one row's text with another's clip.
        other = [rank for rank, found in enumerate(of_ranks) if found[i][0] != of_ranks[0][i][0]]
        if other:
            reasons = [f"rank {rank}: {fault}" for rank, found in enumerate(of_ranks) for fault in found[i][1]]
            raise ConfigError(
                [
                    f"{manifest.file}: {ranks.named(other)} found another file than rank 0; "
                    "give all nodes the same one",
                    *reasons,
                ]
            )
    problems = [problem for manifest in manifests for problem in _clips_seen_otherwise(manifest, ranks)]
    if problems:
        raise ConfigError(first_of(problems, 5))


def _clips_seen_otherwise(manifest: Manifest, ranks: Ranks) -> list[str]:
    """A line for each of a few rows whose clips some rank does not find as rank 0 does.

    Each row is one rank's to check: without this, clips that only some hosts see would be faults of those rows.
    """
    numbers = np.unique(np.linspace(0, max(0, len(manifest) - 1), min(len(manifest), ROWS_LOOKED_AT)).astype(int))
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
