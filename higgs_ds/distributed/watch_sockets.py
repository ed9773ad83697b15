"""Heartbeats between rank 0 and every other rank, to find one that died or is stuck: JSON messages over TCP.

Each side sends its state every half second. The connections are made before the first collective (`rendezvous.meet`).
A process that dies closes its connection at once, whatever killed it; a host that dies falls silent.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait

from ..errors import ExitCode

HEARTBEAT_SEC = 0.5
SILENCE_TIMEOUT_SEC = 50.0  # a rank not heard from for so long is gone: its host died, or it is frozen


@dataclass
class RankState:
    """A rank's step, and its activity there."""

    rank: int
    progress: int = 0  # how often it has begun something new; all ranks begin the same things in the same order
    step: int = 0  # 0 before the first
    doing: str = "starting"
    no_progress_sec: float = 0.0  # how long it has been without any sign of progress
    timed: bool = False  # True: the stall timeout holds for this activity
    host: str = ""  # where it is, in a run on several hosts

    @property
    def name(self) -> str:
        """Its number, and where it is."""
        return f"{self.rank} on {self.host}" if self.host else str(self.rank)

    def __str__(self) -> str:
        return f"in step {self.step} ({self.doing})" if self.step else f"before the first step ({self.doing})"


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end, and with which exit code."""

    text: str
    exit_code: int = ExitCode.FAILED


class Peers:
    """The ranks that this one is connected to: all others for rank 0, and rank 0 for each of them.

    Rank 0 hears of a failure first, and relays the verdict to all.
    """

    def __init__(self, rank: int, connections: dict[int, Connection], hosts: list[str]):
        """`connections` are those of `rendezvous.meet`, `hosts` every rank's as `RankState.host` has it."""
        self._rank, self._sending = rank, threading.Lock()  # a failed rank's main thread sends too
        self._ranks = {connection: peer for peer, connection in connections.items()}  # without those that have left
        self._states = {peer: RankState(peer, host=hosts[peer]) for peer in connections}
        self._heard_at = dict.fromkeys(connections, time.monotonic())

    def exchange(self, mine: RankState, stall_timeout_sec: float) -> Verdict | None:
        """Sends this rank's state, listens for half a second; returns the verdict, if any. Only rank 0 finds stalls."""
        self._send({"state": asdict(mine)})
        verdict = self._listen() or self._find_silent()
        if verdict is None and self._rank == 0:
            verdict = find_stalled([mine, *self._states.values()], stall_timeout_sec)
        if verdict is not None and self._rank == 0:
            self.send_verdict(verdict)
        return verdict

    def extend_deadlines(self, seconds: float) -> None:
        """Forgives the peers that long a silence: this process was suspended and could not hear them."""
        self._heard_at = {peer: at + seconds for peer, at in self._heard_at.items()}

    def send_verdict(self, verdict: Verdict) -> None:
        """Has every peer end, and through rank 0 every rank."""
        self._send({"verdict": asdict(verdict)})

    def leave(self) -> None:
        """Tells the peers that this rank ends in good order."""
        self._send({})

    def _send(self, message: dict) -> None:
        with self._sending:
            for connection in list(self._ranks):
                with contextlib.suppress(OSError):  # a peer that is gone shows when reading from it
                    connection.send_bytes(json.dumps(message).encode())

    def _listen(self) -> Verdict | None:
        until = time.monotonic() + HEARTBEAT_SEC
        while self._ranks and (left := until - time.monotonic()) > 0:
            ready = wait(list(self._ranks), left)
            for connection in [connection for connection in self._ranks if connection in ready]:
                if (verdict := self._read(connection)) is not None:
                    return verdict
        time.sleep(max(0.0, until - time.monotonic()))  # every peer has left
        return None

    def _read(self, connection: Connection) -> Verdict | None:
        peer = self._ranks[connection]
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            state = self._states[peer]
            self._forget(connection)
            return Verdict(f"rank {state.name} died {state}")
        self._heard_at[peer] = time.monotonic()
        if "state" in message:
            self._states[peer] = RankState(**message["state"])
        elif "verdict" in message:
            return Verdict(**message["verdict"])
        else:
            self._forget(connection)
        return None

    def _forget(self, connection: Connection) -> None:
        peer = self._ranks.pop(connection)
        del self._states[peer], self._heard_at[peer]

    def _find_silent(self) -> Verdict | None:
        for peer, at in self._heard_at.items():
            if time.monotonic() - at > SILENCE_TIMEOUT_SEC:
                state = self._states[peer]
                return Verdict(f"rank {state.name} has not been heard from for {SILENCE_TIMEOUT_SEC:.0f} s, {state}")
        return None


def find_stalled(states: list[RankState], stall_timeout_sec: float) -> Verdict | None:
    """Names the ranks that hold up all others, once no rank has made progress for the timeout."""
    if not all(state.timed and state.no_progress_sec > stall_timeout_sec for state in states):
        return None
    least = min(state.progress for state in states)
    behind = [state for state in states if state.progress == least]
    if len(behind) == len(states):
        who = "no rank has" if len(states) > 1 else "rank 0 has not"
    else:
        who = f"rank{'s' * (len(behind) > 1)} {', '.join(state.name for state in behind)} "
        who += "have not" if len(behind) > 1 else "has not"
    return Verdict(f"{who} moved for {stall_timeout_sec:g} s (--stall_timeout_sec), {behind[0]}")
