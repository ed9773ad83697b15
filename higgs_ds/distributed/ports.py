"""TCP ports: the one where the ranks of a job meet, and free ones. Imports no torch; the scripts in launch/ use it."""

from __future__ import annotations

import contextlib
import socket
import zlib

DEFAULT_PORT = 29500  # DeepSpeed's and torchrun's
PORTS_OF_JOBS = range(20000, 30000)  # below the ports that systems hand out by themselves


def port_of_job(job: str) -> int:
    """The port where the ranks of a job meet, so chosen that jobs on one host rarely have the same."""
    return PORTS_OF_JOBS[zlib.crc32(job.encode()) % len(PORTS_OF_JOBS)] if job else DEFAULT_PORT


def is_free(port: int) -> bool:
    """True if a process could listen on it; 0 stands for any."""
    return _bound(port) is not None


def free_port(first: int = 0) -> int:
    """The first free port from `first` on, of a hundred; any free one where those are taken, or `first` is 0."""
    candidates = (*(range(first, min(first + 100, 65536)) if first else ()), 0)
    return next(port for candidate in candidates if (port := _bound(candidate)) is not None)


def taken(port: int) -> str:
    """The line on a MASTER_PORT that is taken on this host, with one that is free."""
    free = free_port(port + 1)
    return (
        f"MASTER_PORT: {port} is taken on {socket.gethostname()}, by another run perhaps; {free} is free: set "
        f"MASTER_PORT={free}, or give deepspeed or torchrun --master_port {free}"
    )


def _bound(port: int) -> int | None:
    """The port that a socket gets where it asks for this one; None where it is taken."""
    with contextlib.suppress(OSError), socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch: a run that has just ended holds nothing
        free.bind(("", port))
        return free.getsockname()[1]
    return None
