"""Heartbeats between rank 0 and every other rank, to find one that died or is stuck: JSON lines over TCP.

Each side sends its state every half second. The connections are made before the first collective (`rendezvous.meet`).
A process that dies closes its connection at once, whatever killed it; a host that dies falls silent.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from dataclasses import asdict, dataclass

from ..errors import ExitCode

HEARTBEAT_SEC = 0.5
SILENCE_TIMEOUT_SEC = 50.0  # a rank not heard from for so long is gone: its host died, or it is frozen
MAX_LINE = 65536


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

    def __init__(self, rank: int, connections: dict[int, JsonConnection], hosts: list[str]):
        """`connections` are those of `rendezvous.meet`, `hosts` every rank's as `RankState.host` has it."""
        self._rank = rank
        self._connections = dict(connections)  # without those that have left
        self._states = {peer: RankState(peer, host=hosts[peer]) for peer in connections}
        self._heard_at = dict.fromkeys(connections, time.monotonic())
        self._selector = selectors.DefaultSelector()
        for peer, connection in connections.items():
            connection.set_nonblocking()
            self._selector.register(connection, selectors.EVENT_READ, peer)

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
        self._send({"verdict": verdict.text, "exit_code": verdict.exit_code})

    def leave(self) -> None:
        """Tells the peers that this rank ends in good order."""
        self._send({"leaving": True})

    def _send(self, message: dict) -> None:
        for connection in self._connections.values():
            connection.send(message)

    def _listen(self) -> Verdict | None:
        until = time.monotonic() + HEARTBEAT_SEC
        while self._connections and (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if (verdict := self._read(key.data)) is not None:
                    return verdict
        time.sleep(max(0.0, until - time.monotonic()))  # every peer has left
        return None

    def _read(self, peer: int) -> Verdict | None:
        messages, is_open = self._connections[peer].read()
        for message in messages:
            self._heard_at[peer] = time.monotonic()
            if "verdict" in message:
                return Verdict(message["verdict"], message["exit_code"])
            if "leaving" in message:
                self._forget(peer)
                return None
            self._states[peer] = RankState(**message["state"])
        if not is_open:
            state = self._states[peer]
            self._forget(peer)
            return Verdict(f"rank {state.name} died {state}")
        return None

    def _forget(self, peer: int) -> None:
        self._selector.unregister(self._connections.pop(peer))
        del self._states[peer], self._heard_at[peer]

    def _find_silent(self) -> Verdict | None:
        for peer, at in self._heard_at.items():
            if time.monotonic() - at > SILENCE_TIMEOUT_SEC:
                state = self._states[peer]
                return Verdict(f"rank {state.name} has not been heard from for {SILENCE_TIMEOUT_SEC:.0f} s, {state}")
        return None


class JsonConnection:
    """JSON objects, one a line, over a socket; a line that is anything else is dropped."""

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._unfinished = b""

    def fileno(self) -> int:
        """The socket's, for selectors."""
        return self._socket.fileno()

    def set_nonblocking(self) -> None:
        """From here on neither sending nor reading waits."""
        self._socket.setblocking(False)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def send(self, message: dict) -> None:
        """Sends it; raises nothing: a peer that is gone or does not read shows when reading from it."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> tuple[list[dict], bool]:
        """The messages that have come, and whether the connection is still open."""
        try:
            data = self._socket.recv(MAX_LINE)
        except (BlockingIOError, TimeoutError):
            return [], True
        except OSError:
            return [], False
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self._unfinished = self._unfinished[-MAX_LINE:]
        return [message for line in lines if (message := _parsed(line))], bool(data)

    def receive_first(self, timeout_sec: float) -> dict:
        """The peer's first message, before it sends another; empty where it is anything else, or does not come."""
        self._socket.settimeout(timeout_sec)
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            return _parsed(lines.readline(MAX_LINE)) or {}
        return {}


def find_stalled(states: list[RankState], stall_timeout_sec: float) -> Verdict | None:
    """Names the ranks that hold up all others, once no rank has made progress for the timeout."""
    if not all(state.timed and state.no_progress_sec > stall_timeout_sec for state in states):
        return None
    least = min(state.progress for state in states)
    behind = [state for state in states if state.progress == least]
    if len(behind) == len(states):
        who = "no rank has" if len(states) > 1 else "rank 0 has not"
    else:
        who = ("rank " if len(behind) == 1 else "ranks ") + ", ".join(state.name for state in behind)
        who += " has not" if len(behind) == 1 else " have not"
    return Verdict(f"{who} moved for {stall_timeout_sec:g} s (--stall_timeout_sec), {behind[0]}")


def _parsed(line: bytes) -> dict | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
