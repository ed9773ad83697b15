"""Checks that all ranks have the same options and work in the same folders, before anything is trained.

Hosts with different files or settings would each train on something else. Every check raises ConfigError on all ranks
at once, naming the ranks and their hosts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..errors import ConfigError, first_of, reason_of
from ..files import write_text

if TYPE_CHECKING:
    from .engine import Ranks
    from .single_process import SingleProcess

T = TypeVar("T")

# A host may not yet see what another has written: NFS clients remember a folder's names for up to half a minute.
PATIENCE_SEC = 30.0
PAUSE_SEC = 0.5


def check_same(values: Mapping[str, object], ranks: Ranks | SingleProcess) -> None:
    """Raises ConfigError where a rank has another value than rank 0 under one of these names.

    Args:
        values: plain values by the name that a user knows them by (`--lr`); compared as JSON, by its digest.
    """
    mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in values.items()}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(ranks.gather(digest))) == 1:
        return
    of_ranks = ranks.gather(mine)
    problems = []
    for name in sorted(set().union(*of_ranks)):
        groups: dict[str, list[int]] = {}
        for rank, theirs in enumerate(of_ranks):
            groups.setdefault(theirs.get(name, "not there"), []).append(rank)
        if len(groups) > 1:
            shown = ", ".join(f"{value} on {ranks.named(those)}" for value, those in groups.items())
            problems.append(f"{name}: {shown}; give all ranks the same")
    raise ConfigError(first_of(problems))


def versions() -> dict[str, str]:
    """Versions of the libraries that all ranks must share, for `check_same`."""
    return {f"installed {name}": importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")}


def made_once(files: object, make: Callable[[], T], ranks: Ranks | SingleProcess) -> T:
    """Calls `make` on the first rank of those with the same `files`, and gives its result to all of them.

    Args:
        files: stamps of the files that the result follows from, see `files.stamp`.
    """
    first = ranks.gather(files).index(files)
    made = ranks.each(lambda: make() if first == ranks.rank else None)
    return ranks.gather(made)[first]


def check_shared(folders: Mapping[str, Path], ranks: Ranks | SingleProcess) -> None:
    """Proves that every rank sees the same folders, by a file that rank 0 writes to each and all others read.

    A folder that rank 0 may only read is compared by the names in it. Rank 0 makes those that are missing.

    Args:
        folders: by the flag that names them.

    Raises:
        ConfigError: on all ranks, naming those that do not see what rank 0 wrote within `PATIENCE_SEC`.
    """
    if ranks.world_size == 1:
        return
    with contextlib.ExitStack() as written:
        mine = ranks.each(lambda: [_mark(flag, folders[flag], written) for flag in folders] if ranks.is_main else [])
        marks = ranks.gather(mine)[0]

        def unseen() -> list[str]:
            return [flag for flag, mark in zip(folders, marks, strict=True) if not mark.seen(folders[flag])]

        missing = patiently(unseen, lambda found: not found)
        of_ranks = ranks.gather((missing, {flag: str(folder.absolute()) for flag, folder in folders.items()}))
    problems = []
    for flag in folders:
        blind = [rank for rank, (theirs, _) in enumerate(of_ranks) if flag in theirs]
        if blind:
            here, there = of_ranks[0][1][flag], of_ranks[blind[0]][1][flag]
            problems.append(
                f"{flag}: {ranks.named(blind)} cannot see what {ranks.named([0])} has written to {here}"
                f"{f' ({there} there)' if there != here else ''}; "
                "it must be one folder, which all hosts share (docs/many-machines.md)"
            )
    if problems:
        raise ConfigError(problems)


def patiently(look: Callable[[], T], enough: Callable[[T], bool]) -> T:
    """Calls `look` until its result is enough or `PATIENCE_SEC` are over; returns the last result."""
    until = time.monotonic() + PATIENCE_SEC
    while not enough(found := look()) and time.monotonic() < until:
        time.sleep(PAUSE_SEC)
    return found


class Mark(NamedTuple):
    """A sign in a folder, by which another rank knows it for rank 0's: a file with a token, or all names' digest."""

    file: str | None
    content: str

    def seen(self, folder: Path) -> bool:
        """Looks for it in the folder; False where it is not there or cannot be read."""
        with contextlib.suppress(OSError):
            digest = _digest_of_names(folder)  # opens the folder, which has NFS ask the server what is new
            found = digest if self.file is None else (folder / self.file).read_text(encoding="utf-8")
            return found == self.content
        return False


def _mark(flag: str, folder: Path, written: contextlib.ExitStack) -> Mark:
    """Leaves rank 0's sign in a folder until the stack closes. Raises ConfigError: it can neither be made nor read."""
    token = secrets.token_hex(16)
    file = folder / f".seen-by-all-{token}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written.callback(_remove, file)
        write_text(file, token)
        return Mark(file.name, token)
    except OSError as error:
        with contextlib.suppress(OSError):
            return Mark(None, _digest_of_names(folder))
        raise ConfigError([f"{flag}: {folder} cannot be used: {reason_of(error)}"]) from None


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)


def _digest_of_names(folder: Path) -> str:
    return hashlib.sha256("\0".join(sorted(os.listdir(folder))).encode("utf-8", "surrogateescape")).hexdigest()
