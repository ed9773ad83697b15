"""The launchers that this process was started by, found in `/proc`: DeepSpeed's, torchrun, accelerate."""

from __future__ import annotations

import itertools
import os
import shlex
import sys

LAUNCHER_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate"}
RESUMING = ("--resume", "--resume_from_checkpoint")  # two names for one option are refused
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


def resume_command(chain: list[tuple[int, int]]) -> str:
    """What was typed to start this process, its topmost launcher included, with `--resume auto`, for a shell."""
    words = _words_of(chain[-1][1]) if chain else ["python", *sys.argv]
    if os.path.basename(words[0]).startswith("python") and len(words) > 1 and os.access(words[1], os.X_OK):
        words = words[1:]  # a script that names its interpreter
    if not any(pair == ("--resume", "auto") for pair in itertools.pairwise(words)):
        words = [*_without_resume(words), "--resume", "auto"]
    return shlex.join(words)


def _without_resume(words: list[str]) -> list[str]:
    """A command without what it says of resuming, by either name, with a value or without."""
    kept, before = [], ""
    for word in words:
        flag = word.split("=")[0] in RESUMING
        if not flag and not (before in RESUMING and not word.startswith("--")):
            kept.append(word)
        before = word
    return kept


def _parent_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The program's name stands before it in parentheses, and may hold spaces and parentheses itself.
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_launcher(pid: int) -> bool:
    program, *words = _words_of(pid)
    return os.path.basename(program).startswith("python") and any(
        os.path.basename(word) in LAUNCHER_PROGRAMS or word.startswith(LAUNCHER_MODULES) for word in words[:4]
    )


def _words_of(pid: int) -> list[str]:
    """A process's command line; one empty word where it cannot be read."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().removesuffix("\0").split("\0")
    except OSError:
        return [""]
