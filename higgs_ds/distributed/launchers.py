"""Finds the launchers of this process, DeepSpeed's, torchrun, accelerate, and the command that goes on with a run."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence

import psutil  # which deepspeed requires

from .launch_env import is_step

LAUNCHER_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate"}
LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed", "accelerate.commands")
RESUMING = ("--resume", "--resume_from_checkpoint")  # two names for one option are refused
LOCAL_RANK = ("--local_rank", "--local-rank")


def find_launchers() -> list[psutil.Process]:
    """This process and its launchers, each the parent of the one before it."""
    found = [psutil.Process()]
    while (parent := found[-1].parent()) is not None and _is_launcher(parent):
        found.append(parent)
    return found


def gone_launcher(found: list[psutil.Process]) -> int | None:
    """The process id of a launcher that has ended since `find_launchers`; None if all live.

    Its child has another parent then, also where whoever started the launcher has not asked for its exit code yet.
    """
    for process, parent in itertools.pairwise(found):
        try:
            if process.ppid() != parent.pid:
                return parent.pid
        except psutil.Error:  # ended between the two questions
            return process.pid
    return None


def resume_command(launchers: Sequence[psutil.Process], environment: Mapping[str, str] = os.environ) -> str:
    """The command that started this process, its topmost launcher included, with `--resume auto`, for a shell.

    Where a command on another host started this process, as srun, mpirun and pdsh do, its command line cannot be read
    here, and this process's own would start a part of the ranks: the text then names the kind of command.

    Args:
        launchers: this process's, without itself.
    """
    words = launchers[-1].cmdline() if launchers else []
    elsewhere = _started_elsewhere(words, environment)
    if elsewhere:
        words = _without(LOCAL_RANK, sys.argv)
    elif not words:
        words = ["python", *sys.argv]
    elif os.path.basename(words[0]).startswith("python") and os.access(words[1], os.X_OK):
        words = words[1:]  # a script that names its interpreter
    if ("--resume", "auto") not in itertools.pairwise(words):
        words = [*_without(RESUMING, words), "--resume", "auto"]
    return f"the same {elsewhere} command, with: {shlex.join(words)}" if elsewhere else shlex.join(words)


def _started_elsewhere(launcher: list[str], environment: Mapping[str, str]) -> str:
    """The kind of command that started this process from another host; empty for one that is seen here."""
    if any(word.startswith("deepspeed.launcher.launch") for word in launcher):  # a host's share of it
        return "launch/multi_node.sh (or deepspeed --hostfile)"
    if is_step(environment):
        return "sbatch or srun"
    if launcher or environment.get("WORLD_SIZE", "1") == "1":
        return ""
    if environment.get("OMPI_COMM_WORLD_SIZE") or environment.get("MV2_COMM_WORLD_SIZE"):
        return "mpirun"
    return "mpiexec" if environment.get("PMI_SIZE") else ""


def _without(flags: tuple[str, ...], words: list[str]) -> list[str]:
    """A command without these flags, with a value or without."""
    pairs = zip(words, ["", *words], strict=False)  # each word and the one before it
    return [
        word
        for word, before in pairs
        if word.split("=")[0] not in flags and (before not in flags or word.startswith("--"))
    ]


def _is_launcher(process: psutil.Process) -> bool:
    """True for a Python process that runs one of the launchers."""
    try:
        program, *words = process.cmdline() or [""]
    except psutil.Error:
        return False
    return os.path.basename(program).startswith("python") and any(
        os.path.basename(word) in LAUNCHER_PROGRAMS or word.startswith(LAUNCHER_MODULES) for word in words[:4]
    )
