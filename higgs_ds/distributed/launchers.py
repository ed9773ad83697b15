"""The launchers that this process was started by, found in `/proc`: DeepSpeed's, torchrun, accelerate."""

from __future__ import annotations

import os

LAUNCHER_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate"}
LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed", "accelerate.commands")


def find_launchers() -> list[tuple[int, int]]:
    """(process id, its parent's) from this process up to the topmost launcher; empty without one, or without `/proc`.

    As long as the launchers live, each process keeps its parent: `gone_launcher` looks at nothing else.
    """
    chain = []
    pid = os.getpid()
    while (parent := _parent_of(pid)) and _is_launcher(parent):
        chain.append((pid, parent))
        pid = parent
    return chain


def gone_launcher(chain: list[tuple[int, int]]) -> int | None:
    """The process id of a launcher that has ended since `find_launchers` gave this chain; None if all live."""
    for pid, parent in chain:
        if _parent_of(pid) != parent:
            return parent
    return None


def _parent_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The program's name stands before it in parentheses, and may hold spaces and parentheses itself.
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_launcher(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            program, *words = file.read().split("\0")
    except OSError:
        return False
    return os.path.basename(program).startswith("python") and any(
        os.path.basename(word) in LAUNCHER_PROGRAMS or word.startswith(LAUNCHER_MODULES) for word in words[:4]
    )
