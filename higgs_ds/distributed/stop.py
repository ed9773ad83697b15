"""Requests to stop, by a signal or a launcher that is gone, and their effect in each part of a run."""

from __future__ import annotations

import os
import signal
import threading
import time

from ..errors import ExitCode
from ..process import say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# A launcher passes on what its process group already has: a signal counts as a second one only after so long.
SECOND_SIGNAL_SEC = 3.0


class StopRequest:
    """SIGTERM, SIGUSR1, Ctrl-C, a terminal that hangs up, a launcher that is gone: ask for an end that loses nothing.

    Until this process has joined the others it ends at once with code 75; from `joined` on the watch ends all ranks
    with that code, since there is nothing to save; from `training` on the step in hand is finished and saved. Another
    signal some seconds later ends at once, with 128 + its number.

    Signals are taken by a thread of its own, so that a main thread that waits in a collective or for another node is no
    obstacle. One such object a process, made in its main thread.
    """

    def __init__(self):
        self.reason: str | None = None  # who asked; None: nobody
        self.ends_at_once = True  # there is nothing to finish and save
        self._joined = False
        self._first_signal_at: float | None = None
        self._waking, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which `nohup` asks for
                signal.signal(number, _do_nothing)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def joined(self) -> None:
        """The ranks watch each other from here on."""
        self._joined = True

    def training(self) -> None:
        """There are steps to finish and to save from here on."""
        self.ends_at_once = False

    def ask(self, reason: str) -> None:
        """As a signal does, but any number of times."""
        if self.reason is None:
            self.reason = reason
            if not self.ends_at_once and os.environ.get("RANK", "0") == "0":
                say(f"asked to stop ({reason}): after the step in hand")

    def _listen(self) -> None:
        while True:
            for number in os.read(self._waking, 64):
                if number in STOP_SIGNALS:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if self._first_signal_at is None:
            self._first_signal_at = now
        elif now - self._first_signal_at > SECOND_SIGNAL_SEC:
            os._exit(128 + number)
        self.ask(signal.Signals(number).name)
        if not self._joined:
            say(f"asked to stop ({self.reason}) before anything was begun")
            os._exit(ExitCode.STOPPED)


def _do_nothing(number, frame) -> None:
    """A handler has to stand for the wake-up to be written."""


def _forget() -> None:
    """In a forked child, whose signals are not this process's."""
    signal.set_wakeup_fd(-1)
