"""End a process that was in a process group, and print from processes that share a console."""

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

END_SEC = 25.0  # launchers kill after half a minute


def end_in_time(exit_code: int) -> None:
    """Makes this process end within END_SEC with this exit code.

    A thread, child or exit function that hangs would otherwise block a machine that is paid for.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by a launcher once another rank has ended
    timer = threading.Timer(END_SEC, leave_now, [exit_code])
    timer.daemon = True
    timer.start()


def leave_now(exit_code: int) -> NoReturn:
    """Ends this process and its children at once."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(exit_code)


def end_process(exit_code: int) -> NoReturn:
    """Ends this process like `sys.exit`, joining threads and running exit functions, but skips interpreter shutdown.

    gloo's threads outlive `destroy_process_group` while DeepSpeed holds a group. If one frees a tensor during shutdown,
    the process aborts (SIGABRT, "terminate called without an active exception") after its work is done: about once in
    fifty runs on busy machines.
    """
    end_in_time(exit_code)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises if a data worker is killed
    for child in multiprocessing.active_children():
        child.kill()
    # Private functions, but multiprocessing itself does the same before os._exit.
    threading._shutdown()  # type: ignore[attr-defined]  # ends thread pools and joins all non-daemon threads
    atexit._run_exitfuncs()  # removes temporary folders
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


class _Lasting:
    """A stream that ignores write errors after its reader has gone."""

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
    """Context in which printing never fails, even if the terminal is closed or `| tee` ended by the same Ctrl-C."""
    with contextlib.redirect_stdout(_Lasting(sys.stdout)), contextlib.redirect_stderr(_Lasting(sys.stderr)):
        yield


def say(text: str, *, error: bool = False) -> None:
    """Prints a line in a single write, since ranks share the console; write errors are ignored."""
    stream = sys.stderr if error else sys.stdout
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()


def tell(error: Exception, argv: list[str]) -> int:
    """Prints a user's errors on rank 0, one per line, and returns `ExitCode.CONFIG`.

    Every command reports errors here; with `--debug` in `argv`, the traceback comes first.
    """
    if os.environ.get("RANK", "0") == "0":
        if "--debug" in argv:
            say("".join(traceback.format_exception(error)), error=True)
        say(str(error), error=True)
    return ExitCode.CONFIG


def loss_text(loss: float) -> str:
    """A loss as text; a small one must not look like 0.0000."""
    return f"{loss:.2e}" if 0 < abs(loss) < 1e-3 else f"{loss:.4f}"
