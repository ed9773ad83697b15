"""TCP ports: the one where the ranks of a job meet, and free ones. Imports no torch; the scripts in launch/ use it."""

from __future__ import annotations

import socket
import zlib

DEFAULT_PORT = 29500  # DeepSpeed's and torchrun's
PORTS_OF_JOBS = range(20000, 30000)  # below the ports that systems hand out by themselves


def port_of_job(job: str) -> int:
    """The port where the ranks of a job meet, so chosen that jobs on one host rarely have the same."""
    return PORTS_OF_JOBS[zlib.crc32(job.encode()) % len(PORTS_OF_JOBS)] if job else DEFAULT_PORT


def free_port(port: int = 0) -> int:
    """This port, or any free one for 0. Raises OSError where it is taken."""
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch: a run that has just ended holds nothing
        free.bind(("", port))
        return free.getsockname()[1]


def taken(port: int) -> str:
    """The line on a MASTER_PORT that is taken on this host, with one that is free."""
    free = free_port()
    return (
        f"MASTER_PORT: {port} is taken on {socket.gethostname()}, by another run perhaps; {free} is free: set "
        f"MASTER_PORT={free}, or give deepspeed or torchrun --master_port {free}"
    )
