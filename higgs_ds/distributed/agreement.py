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
import platform
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import ConfigError, first_of, reading

if TYPE_CHECKING:
    from .ranks import Ranks

T = TypeVar("T")

LIBRARIES = ("torch", "deepspeed", "transformers", "peft")

# A host may not yet see what another has written: NFS clients remember a folder's names for up to half a minute.
PATIENCE_SEC = 30.0
PAUSE_SEC = 0.5


def check_same(values: Mapping[str, object], ranks: Ranks) -> None:
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
    return {f"installed {name}": importlib.metadata.version(name) for name in LIBRARIES}


def trained_with(ranks: Ranks) -> dict[str, str]:
    """Versions and devices that a run is trained with."""
    import torch

    name = ranks.device.type if ranks.device.type != "cuda" else torch.cuda.get_device_name(ranks.device)
    found = {"devices": f"{ranks.world_size} × {name}", "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    root = Path(__file__).parents[2]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():  # a checkout of this project, not the repository of a user's environment
            command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
            found["higgs_ds"] = subprocess.check_output(
                command, text=True, stderr=subprocess.DEVNULL, timeout=10
            ).strip()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found.setdefault("higgs_ds", importlib.metadata.version("higgs-ds"))
    if ranks.device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        with contextlib.suppress(OSError):
            found["driver"] = Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    return found


def made_once(files: object, make: Callable[[], T], ranks: Ranks) -> T:
    """Calls `make` on the first rank of those with the same `files`, and gives its result to all of them.

    Args:
        files: stamps of the files that the result follows from, see `files.stamp`.
    """
    first = ranks.gather(files).index(files)
    made = ranks.each(lambda: make() if first == ranks.rank else None)
    return ranks.gather(made)[first]


def check_shared(folders: Mapping[str, Path], ranks: Ranks) -> None:
    """Proves that every rank sees the same folders, by a file that rank 0 writes to each and all others look for.

    A folder that rank 0 may only read is compared by the names in it. Rank 0 makes those that are missing.

    Args:
        folders: by the flag that names them.

    Raises:
        ConfigError: on all ranks, naming those that do not see what rank 0 wrote within `PATIENCE_SEC`.
    """
    if ranks.world_size == 1:
        return
    with contextlib.ExitStack() as written:
        mine = ranks.on_main(lambda: {flag: _mark(flag, folders[flag], written) for flag in folders})
        marks: dict[str, str] = ranks.gather(mine)[0]

        def unseen() -> list[str]:
            return [flag for flag, folder in folders.items() if marks[flag] not in _names_of(folder)]

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


def _mark(flag: str, folder: Path, written: contextlib.ExitStack) -> str:
    """Leaves rank 0's sign in a folder until the stack closes: a file's name, or that of all names, see `_names_of`."""
    file = folder / f".seen-by-all-{secrets.token_hex(16)}"
    with reading(f"{flag}: {folder} cannot be used"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError:
            if not (names := _names_of(folder)):
                raise
            return names[0]
    written.callback(file.unlink, missing_ok=True)
    return file.name


def _names_of(folder: Path) -> list[str]:
    """The digest of all names in a folder, and these names; nothing for a folder that cannot be read."""
    with contextlib.suppress(OSError):
        names = os.listdir(folder)  # opens the folder, which has NFS ask the server what is new
        return [hashlib.sha256(os.fsencode("\0".join(sorted(names)))).hexdigest(), *names]
    return []
