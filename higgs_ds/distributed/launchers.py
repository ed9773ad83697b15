"""Finds the launchers of this process in `/proc`: DeepSpeed's, torchrun, accelerate."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Mapping

from .launch_env import is_step

LAUNCHER_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate"}
RESUMING = ("--resume", "--resume_from_checkpoint")  # two names for one option are refused
LOCAL_RANK = ("--local_rank", "--local-rank")
LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed", "accelerate.commands")


def find_launchers() -> list[tuple[int, int]]:
    """Pairs (process id, its parent's) from this process up to the topmost launcher; empty where there is none.

    As long as the launchers live, each process keeps its parent, which is all that `gone_launcher` looks at.
    """
    chain = []
    pid = os.getpid()
    while (parent := _parent_of(pid)) and _is_launcher(parent):
        chain.append((pid, parent))
        pid = parent
    return chain


def gone_launcher(chain: list[tuple[int, int]]) -> int | None:
    """Returns the process id of a launcher that has ended since `find_launchers` gave this chain; None if all live."""
    for pid, parent in chain:
        if _parent_of(pid) != parent:
            return parent
    return None


def resume_command(chain: list[tuple[int, int]], environment: Mapping[str, str] = os.environ) -> str:
    """The command that started this process, its topmost launcher included, with `--resume auto`, for a shell.

    Where a command on another host started this process, as srun, mpirun and pdsh do, its command line cannot be read
    here, and this process's own would start a part of the ranks: the text then names the kind of command.
    """
    words = _words_of(chain[-1][1]) if chain else ["python", *sys.argv]
    elsewhere = _started_elsewhere(words if chain else [], environment)
    if elsewhere:
        words = _without(LOCAL_RANK, sys.argv)
    elif os.path.basename(words[0]).startswith("python") and len(words) > 1 and os.access(words[1], os.X_OK):
        words = words[1:]  # a script that names its interpreter
    if not any(pair == ("--resume", "auto") for pair in itertools.pairwise(words)):
        words = [*_without(RESUMING, words), "--resume", "auto"]
    return f"the same {elsewhere} command, with: {shlex.join(words)}" if elsewhere else shlex.join(words)


def _started_elsewhere(launcher: list[str], environment: Mapping[str, str]) -> str:
    """The kind of command that started this process from another host; empty for one that is seen here.

    `launcher` is the topmost launcher's command line, empty without one.
    """
    if any(word.startswith("deepspeed.launcher.launch") for word in launcher):  # a host's share of it
        return "launch/multi_node.sh (or deepspeed --hostfile)"
    if is_step(environment) and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return "sbatch or srun"
    if launcher or environment.get("WORLD_SIZE", "1") == "1":
        return ""
    if environment.get("OMPI_COMM_WORLD_SIZE") or environment.get("MV2_COMM_WORLD_SIZE"):
        return "mpirun"
    return "mpiexec" if environment.get("PMI_SIZE") else ""


def _without(flags: tuple[str, ...], words: list[str]) -> list[str]:
    """A command without these flags, with a value or without."""
    kept, before = [], ""
    for word in words:
        flag = word.split("=")[0] in flags
        if not flag and not (before in flags and not word.startswith("--")):
            kept.append(word)
        before = word
    return kept


def _parent_of(pid: int) -> int | None:
    """The parent's process id; None where it cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The program's name stands before it in parentheses, and may hold spaces and parentheses itself.
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_launcher(pid: int) -> bool:
    """True for a Python process that runs one of the launchers."""
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
