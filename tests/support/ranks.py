"""Starts real ranks without a launcher, whose own import of DeepSpeed would cost another 10 s."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class RankResult:
    returncode: int | None  # None: still running when the time was up (it was killed)
    output: str
    ended_after_sec: float


def changed(flags: list[str], *changes: str) -> list[str]:
    """Flags with one value each, and others in the place of those that `changes` gives again."""
    given = {word for word in changes if word.startswith("--")}
    return [word for i, word in enumerate(flags) if word not in given and flags[i - 1] not in given] + [*changes]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_ranks(command: list[str], world_size: int, *, timeout: float, env: dict[str, str] | None = None):
    """Runs `python command…` once a rank, from the project's root; returns a `RankResult` each."""
    port = str(free_port())
    files = [tempfile.TemporaryFile("w+") for _ in range(world_size)]
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": str(ROOT),
                **(env or {}),
            },
        )
        for rank, file in enumerate(files)
    ]
    ended: dict[int, float] = {}
    while len(ended) < world_size and time.monotonic() - started < timeout:
        for rank, process in enumerate(processes):
            if rank not in ended and process.poll() is not None:
                ended[rank] = time.monotonic() - started
        time.sleep(0.05)
    results = []
    for rank, (process, file) in enumerate(zip(processes, files, strict=True)):
        code = process.poll()
        if code is None:
            process.kill()
            process.wait()
        file.seek(0)
        results.append(RankResult(code, file.read(), ended.get(rank, time.monotonic() - started)))
        file.close()
    return results


def assert_all(results: list[RankResult], returncode: int = 0) -> None:
    """Every rank ended with this code; shows the outputs otherwise."""
    codes = [result.returncode for result in results]
    shown = "\n".join(f"--- rank {i}\n{result.output[-4000:]}" for i, result in enumerate(results))
    assert codes == [returncode] * len(results), f"exit codes {codes}\n{shown}"
