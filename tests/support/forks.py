"""Ranks that start in a second, for tests that start many: see workers/forks.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.ranks import ROOT, RankResult, changed, free_port


@dataclass
class Fork:
    """One running rank."""

    pid: int
    output_file: Path

    @property
    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.exists() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Forks:
    """The process that forks; one for all tests of a session."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._started = 0
        env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.workers.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**env, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def _ask(self, order: dict):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        flags: list[str],
        world_size: int,
        *,
        patches: dict[int, list] | None = None,
        env_of: Callable[[int], dict] | None = None,
        more: dict[int, list[str]] | None = None,
    ) -> list[Fork]:
        """Ranks of `train_ds.py` with these flags.

        Args:
            patches: by rank, see workers/patches.py.
            env_of: a rank's environment as its launcher sets it, by default that of torchrun.
            more: further flags by rank.
        """
        port = free_port()
        ranks = []
        for rank in range(world_size):
            self._started += 1
            output = self._folder / f"{self._started}.rank{rank}.txt"
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            env = env_of(rank) if env_of else {"MASTER_ADDR": "127.0.0.1"} | env
            order = {"start": changed(flags, *(more or {}).get(rank, ())), "output": str(output)}
            order |= {"env": {name: str(value) for name, value in env.items()}, "patch": (patches or {}).get(rank)}
            pid = self._ask(order)
            ranks.append(Fork(pid, output))
        return ranks

    def ended(self, rank: Fork) -> bool:
        """True once it has."""
        return self._ask({"poll": rank.pid}) is not None

    def wait(self, ranks: list[Fork], timeout: float) -> list[RankResult]:
        """Until all have ended; what has not by then is killed and has no return code."""
        started = time.monotonic()
        codes: dict[int, int] = {}
        ended: dict[int, float] = {}
        while len(codes) < len(ranks) and time.monotonic() - started < timeout:
            for rank in ranks:
                if rank.pid not in codes and (code := self._ask({"poll": rank.pid})) is not None:
                    codes[rank.pid], ended[rank.pid] = code, time.monotonic() - started
            time.sleep(0.02)
        for rank in ranks:
            if rank.pid not in codes:
                rank.kill()
        return [RankResult(codes.get(r.pid), r.output, ended.get(r.pid, timeout)) for r in ranks]

    def run(self, flags: list[str], world_size: int, *, timeout: float = 120, **how) -> list[RankResult]:
        """`start`, then `wait`."""
        return self.wait(self.start(flags, world_size, **how), timeout)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
