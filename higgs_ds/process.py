"""How a process ends that has had a process group, and how it speaks where several share a console."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn


def end_process(exit_code: int) -> NoReturn:
    """Ends this process as `sys.exit` would, threads joined and exit functions run, but without taking Python down.

    gloo's threads outlive `destroy_process_group`, for as long as DeepSpeed holds a group. One of them that frees a
    tensor while the interpreter goes down is refused its lock, and the whole process aborts (SIGABRT, "terminate called
    without an active exception") after all its work was done: seen about once in fifty runs on busy machines.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, once another rank has ended: the code is decided
    # Neither has a public name; it is what the standard library's own multiprocessing does before it leaves this way.
    threading._shutdown()  # tells thread pools to end, and waits for all threads but daemons
    atexit._run_exitfuncs()  # stops data workers, removes temporary folders
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def say(text: str, *, error: bool = False) -> None:
    """A line to the console in one write: ranks share it, and `print` may let another's come before the line's end.

    A console that is gone, its terminal closed or `| tee` ended by the same Ctrl-C, must not cost what is being saved.
    """
    stream = sys.stderr if error else sys.stdout
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()


def loss_text(loss: float) -> str:
    """A loss as text; a small one must not look like the 0.0000 of a loss that is not there."""
    return f"{loss:.2e}" if 0 < abs(loss) < 1e-3 else f"{loss:.4f}"
