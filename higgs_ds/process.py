"""Ending a process that was in a process group, and printing from one of several that share a console."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn, TextIO

from .errors import ExitCode

END_SEC = 25.0  # from the last line to the end; launchers kill what takes half a minute


def end_in_time(exit_code: int) -> None:
    """Nothing that this process still waits for holds it up for longer than END_SEC, and nothing changes its exit code.

    A thread, a child or a library's exit function that never comes back would keep a machine that is paid for.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's, once another rank has ended
    timer = threading.Timer(END_SEC, leave_now, [exit_code])
    timer.daemon = True
    timer.start()


def leave_now(exit_code: int) -> NoReturn:
    """Ends this process as it stands, and the processes that it has forked."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(exit_code)


def end_process(exit_code: int) -> NoReturn:
    """Ends this process as `sys.exit` would, threads joined and exit functions run, but without taking Python down.

    gloo's threads outlive `destroy_process_group`, for as long as DeepSpeed holds a group. One of them that frees a
    tensor while the interpreter goes down is refused its lock, and the whole process aborts (SIGABRT, "terminate called
    without an active exception") after all its work was done: seen about once in fifty runs on busy machines.
    """
    end_in_time(exit_code)
    # Neither has a public name; it is what the standard library's own multiprocessing does before it leaves this way.
    threading._shutdown()  # type: ignore[attr-defined]  # tells thread pools to end, and waits for all threads but daemons
    atexit._run_exitfuncs()  # removes temporary folders
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


class _Lasting:
    """A stream whose reader may go: what is written then is lost, and nothing else."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


@contextlib.contextmanager
def lasting_console() -> Iterator[None]:
    """Inside, no library's line and no progress bar fails where the console is gone.

    A terminal was closed, or `| tee` ended by the same Ctrl-C: that must not cost what was trained.
    """
    with contextlib.redirect_stdout(_Lasting(sys.stdout)), contextlib.redirect_stderr(_Lasting(sys.stderr)):
        yield


def say(text: str, *, error: bool = False) -> None:
    """A line to the console in one write: ranks share it, and `print` may let another's come before the line's end.

    A console that is gone costs nothing, as in `lasting_console`.
    """
    stream = sys.stderr if error else sys.stdout
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()


def tell(error: Exception, argv: list[str]) -> int:
    """Says on rank 0 what is wrong with a user's flags or files, a line a fault; returns `ExitCode.CONFIG`.

    The one door of every command: `--debug` among `argv` has the traceback before it, of what a library raised too.
    """
    if os.environ.get("RANK", "0") == "0":
        if "--debug" in argv:
            say("".join(traceback.format_exception(error)), error=True)
        say(str(error), error=True)
    return ExitCode.CONFIG


def loss_text(loss: float) -> str:
    """A loss as text; a small one must not look like the 0.0000 of a loss that is not there."""
    return f"{loss:.2e}" if 0 < abs(loss) < 1e-3 else f"{loss:.4f}"
