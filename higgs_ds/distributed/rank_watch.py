"""Ends this rank when another one has died or hangs, and names that rank and its step.

A collective waits for a dead rank until the process group's timeout, half an hour by default, and then names nobody.
So every rank keeps a connection to rank 0 (`watch_sockets`) and tells it each half second what it is doing, in a thread
that never touches torch.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection

from ..errors import ConfigError, ExitCode
from ..process import END_SEC, leave_now, say
from .launchers import find_launchers, gone_launcher, resume_command
from .ranks import Ranks
from .stop import StopRequest
from .watch_sockets import HEARTBEAT_SEC, Peers, RankState, Verdict

NEWS_WAIT_SEC = 3.0  # how long an error waits for the news that another rank's death is behind it
SUSPENDED_SEC = 10 * HEARTBEAT_SEC  # a heartbeat that takes longer: this process did not run meanwhile
STALL_TIMEOUT_SEC = {"cuda": 300.0, "cpu": 3600.0}  # where the user gives none
NCCL_TIMEOUT_SEC = 600.0  # torch's, which DeepSpeed's own groups keep, whatever the default group has


def check_stall_timeout(seconds: float, *, on_gpu: bool) -> None:
    """Refuses a `--stall_timeout_sec` that NCCL's own end of a stuck collective, which names nobody, comes before."""
    if on_gpu and seconds >= NCCL_TIMEOUT_SEC:
        text = f"--stall_timeout_sec: {seconds:g} is not below {NCCL_TIMEOUT_SEC:g}, the seconds after which NCCL ends"
        raise ConfigError([f"{text} a stuck collective without saying which rank is stuck; give less, or leave it out"])


class Watch:
    """One rank's watch over the others; a context manager around all that the ranks do together.

    An exception that leaves the context ends this rank and, by name, all others: with code 1, or with the exception's
    own `exit_code` where it is one that the user is to mend, and needs no traceback. ConfigError is raised on all ranks
    at once, and passes.
    """

    def __init__(
        self,
        ranks: Ranks,
        connections: dict[int, Connection],
        *,
        stall_timeout_sec: float,
        stop: StopRequest | None = None,
    ):
        """`connections` as in `Meeting`. `stop` is told of a launcher that is gone, which without it ends all ranks."""
        self._ranks = ranks
        self._stall_timeout_sec = stall_timeout_sec
        self._lock = threading.Lock()  # of the two that follow
        self._state = RankState(ranks.rank, host=ranks.host_of(ranks.rank))
        self._progress_at = time.monotonic()
        self._ending = threading.Lock()
        self._closing = threading.Event()
        self._launchers = find_launchers()
        self.resume_command = resume_command(self._launchers[1:])
        self._stop = stop
        # Actions that come before any end: a checkpoint being written is finished.
        self.before_end: list[Callable[[Verdict], None]] = []
        self._peers = Peers(ranks.rank, connections, [ranks.host_of(rank) for rank in range(ranks.world_size)])
        # A data worker may outlive its rank, and must not hold the connection by whose end that rank is missed.
        for connection in connections.values():
            os.register_at_fork(after_in_child=connection.close)
        if stop is not None:
            stop.joined()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """This rank moved on; from here on it may stand still for `stall_timeout_sec`."""
        self._move_on(step, doing, timed=True)

    def untimed(self, doing: str) -> None:
        """This rank moved on to something that takes as long as it takes: a download, loading a large model."""
        self._move_on(self._state.step, doing, timed=False)

    def progressed(self) -> None:
        """This rank goes on with what it is doing: not one of the moves that all ranks make."""
        with self._lock:
            self._progress_at = time.monotonic()

    def _move_on(self, step: int, doing: str, *, timed: bool) -> None:
        with self._lock:
            progress = self._state.progress + 1
            self._state = replace(self._state, progress=progress, step=step, doing=doing, timed=timed)
            self._progress_at = time.monotonic()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and not isinstance(error, ConfigError):
            self._fail(error)
        self._closing.set()
        self._thread.join(END_SEC)  # a rank that leaves without a word counts as dead

    def _fail(self, error: BaseException) -> None:
        """Ends all ranks with this error; does not return."""
        single, for_user = self._ranks.world_size == 1, hasattr(error, "exit_code")
        # Where another rank died, an error of a collective is only its echo: the verdict ends this process first.
        # An error that the user is to mend may have met all ranks at once: rank 0 is the first to say so.
        time.sleep(0.0 if single or (for_user and self._ranks.is_main) else NEWS_WAIT_SEC)
        name = f"{type(error).__name__}: "
        if for_user:
            say(str(error), error=True)
        elif isinstance(error, OSError):
            name = ""  # its message says it all
        else:
            traceback.print_exception(error)
        text, exit_code = str(error).strip().partition("\n")[0], getattr(error, "exit_code", ExitCode.FAILED)
        state = self._current_state()
        failed = Verdict(
            f"rank {state.name} failed {state}: {name}{text}",
            exit_code if isinstance(exit_code, int) else ExitCode.FAILED,
        )
        self._peers.send_verdict(failed)
        self._end(failed)

    def _current_state(self) -> RankState:
        with self._lock:
            return replace(self._state, no_progress_sec=time.monotonic() - self._progress_at)

    def _run(self) -> None:
        """The thread: a heartbeat each half second, until the run is over or has to end."""
        woken = time.monotonic()
        while not self._closing.is_set():
            slept = time.monotonic() - woken
            if slept > SUSPENDED_SEC:  # this process was suspended itself, perhaps with all others
                self._peers.extend_deadlines(slept)
                with self._lock:
                    self._progress_at += slept
            woken = time.monotonic()
            verdict = self._asked_to_end()
            if verdict is not None:
                self._peers.send_verdict(verdict)
            else:
                verdict = self._peers.exchange(self._current_state(), self._stall_timeout_sec)
            if verdict is not None:
                self._end(verdict)
        self._peers.leave()

    def _asked_to_end(self) -> Verdict | None:
        """The verdict where this rank is asked for an end that need not wait for a step."""
        launcher = gone_launcher(self._launchers)
        gone = launcher and f"the launcher (process {launcher}) is gone"
        if self._stop is None:
            return Verdict(gone) if gone else None
        if gone:
            self._stop.ask(gone)
        if self._stop.reason is None or not self._stop.ends_at_once:
            return None
        text = f"rank {self._ranks.rank} was asked to stop ({self._stop.reason}) {self._current_state()}"
        return Verdict(f"{text}; --resume auto begins there again", ExitCode.STOPPED)

    def _end(self, verdict: Verdict) -> None:
        self._ending.acquire()  # never released: one thread ends the process, another that comes here waits for that
        say(f"[rank {self._ranks.rank}] ending: {verdict.text}", error=True)
        cleanup = threading.Thread(target=self._clean_up, args=[verdict], daemon=True)
        cleanup.start()
        cleanup.join(END_SEC)
        leave_now(verdict.exit_code)

    def _clean_up(self, verdict: Verdict) -> None:
        for action in self.before_end:
            try:
                action(verdict)
            except Exception as error:
                say(f"[rank {self._ranks.rank}] {error}", error=True)
