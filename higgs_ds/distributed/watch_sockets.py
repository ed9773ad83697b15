"""The ranks' word to each other, to find one that died or is stuck: JSON lines over one TCP connection a rank.

Rank 0 is the server. Every other rank is a client, which sends its state each half second and believes the server's
verdict. They are connected before the first collective (`rendezvous.meet`). A process that dies closes its connection
at once, whatever killed it; a host that dies falls silent.
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
    """The step that a rank is at, and what it is doing there."""

    rank: int
    progress: int = 0  # how often it has begun something new; all ranks begin the same things in the same order
    step: int = 0  # 0 before the first
    doing: str = "starting"
    no_progress_sec: float = 0.0  # how long it has been without any sign of progress
    timed: bool = False  # whether the stall timeout holds for what it is doing
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


class WatchServer:
    """Rank 0's side: hears every rank, finds who is gone or stuck, tells all."""

    def __init__(self, connections: dict[int, JsonConnection], hosts: list[str]):
        """`connections` are those of `rendezvous.meet`, `hosts` every rank's as `RankState.host` has it."""
        self._selector = selectors.DefaultSelector()
        self._connections = connections
        self._states = {rank: RankState(rank, host=hosts[rank]) for rank in connections}
        self._heard_at = dict.fromkeys(connections, time.monotonic())
        self._left: set[int] = set()  # ranks that have ended in good order
        for rank, connection in connections.items():
            connection.never_wait()
            self._selector.register(connection, selectors.EVENT_READ, rank)

    def exchange(self, mine: RankState, stall_timeout_sec: float) -> Verdict | None:
        """Listens for half a second, then sends rank 0's state or the verdict to all; returns the verdict, if any."""
        self._states[0] = mine
        verdict = self._listen() or self._find_silent() or find_stalled(list(self._states.values()), stall_timeout_sec)
        if verdict is None:
            self._send({"state": asdict(mine)})
        else:
            self.send_verdict(verdict)
        return verdict

    def _listen(self) -> Verdict | None:
        if not self._selector.get_map():
            time.sleep(HEARTBEAT_SEC)
            return None
        until = time.monotonic() + HEARTBEAT_SEC
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if (verdict := self._read(key)) is not None:
                    return verdict
        return None

    def _read(self, key: selectors.SelectorKey) -> Verdict | None:
        rank = key.data
        messages, is_open = self._connections[rank].read()
        for message in messages:
            self._heard_at[rank] = time.monotonic()
            if "verdict" in message:
                return Verdict(message["verdict"], message["exit_code"])
            if "leaving" in message:
                self._left.add(rank)
            if "state" in message:
                self._states[rank] = RankState(**message["state"])
        if not is_open:
            self._selector.unregister(key.fileobj)
            if rank not in self._left:
                return Verdict(f"rank {self._states[rank].name} died {self._states[rank]}")
            self._states.pop(rank)
            self._heard_at.pop(rank)
        return None

    def _find_silent(self) -> Verdict | None:
        for rank, at in self._heard_at.items():
            if rank not in self._left and time.monotonic() - at > SILENCE_TIMEOUT_SEC:
                return _silent(self._states[rank])
        return None

    def extend_deadlines(self, seconds: float) -> None:
        """Forgives the ranks that long a silence: this process was suspended and could not hear them."""
        self._heard_at = {rank: at + seconds for rank, at in self._heard_at.items()}

    def send_verdict(self, verdict: Verdict) -> None:
        """Has every rank end."""
        self._send(_verdict_message(verdict))

    def leave(self) -> None:
        """Tells all that this rank's end is in good order."""
        self._send({"leaving": True})

    def _send(self, message: dict) -> None:
        for rank, connection in self._connections.items():
            if rank not in self._left:
                connection.send(message)


class WatchClient:
    """Every other rank's side: tells rank 0 what it is doing, and believes its verdict."""

    def __init__(self, connection: JsonConnection, host_of_0: str):
        """`connection` is that of `rendezvous.meet`."""
        self._connection = connection
        self._connection.never_wait()
        self._heard_at = time.monotonic()
        self._state_of_0 = RankState(0, host=host_of_0)
        self._server_left = False

    def exchange(self, mine: RankState, stall_timeout_sec: float) -> Verdict | None:
        """Sends this rank's state, then listens for half a second; returns the verdict, if any.

        `stall_timeout_sec` is for rank 0 to hold against.
        """
        if self._server_left:
            time.sleep(HEARTBEAT_SEC)
            return None
        self._connection.send({"state": asdict(mine)})
        until = time.monotonic() + HEARTBEAT_SEC
        while (left := until - time.monotonic()) > 0 and not self._server_left:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(left):
                    break
            if (verdict := self._read()) is not None:
                return verdict
        if not self._server_left and time.monotonic() - self._heard_at > SILENCE_TIMEOUT_SEC:
            return _silent(self._state_of_0)
        return None

    def _read(self) -> Verdict | None:
        messages, is_open = self._connection.read()
        for message in messages:
            self._heard_at = time.monotonic()
            if "verdict" in message:
                return Verdict(message["verdict"], message["exit_code"])
            self._server_left = self._server_left or "leaving" in message
            if "state" in message:
                self._state_of_0 = RankState(**message["state"])
        if not is_open and not self._server_left:
            return Verdict(f"rank {self._state_of_0.name} died {self._state_of_0}")
        return None

    def extend_deadlines(self, seconds: float) -> None:
        """Forgives rank 0 that long a silence: this process was suspended and could not hear it."""
        self._heard_at += seconds

    def send_verdict(self, verdict: Verdict) -> None:
        """Has rank 0 end all ranks."""
        self._connection.send(_verdict_message(verdict))

    def leave(self) -> None:
        """Tells rank 0 that this rank's end is in good order, and closes the connection."""
        self._connection.send({"leaving": True})
        self._connection.close()


class JsonConnection:
    """JSON objects, one a line, over a socket; a line that is anything else is dropped."""

    def __init__(self, connected: socket.socket):
        self._socket = connected
        self._unfinished = b""

    def fileno(self) -> int:
        """The socket's, for selectors."""
        return self._socket.fileno()

    def never_wait(self) -> None:
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

    def wait_for_one(self, timeout_sec: float) -> dict:
        """The first message, in however many parts it comes; empty if none is whole by then."""
        self._socket.settimeout(timeout_sec)
        until = time.monotonic() + timeout_sec
        while time.monotonic() < until:
            messages, is_open = self.read()
            if messages:
                return messages[0]
            if not is_open or len(self._unfinished) >= MAX_LINE:
                break
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


def _silent(state: RankState) -> Verdict:
    return Verdict(f"rank {state.name} has not been heard from for {SILENCE_TIMEOUT_SEC:.0f} s, {state}")


def _verdict_message(verdict: Verdict) -> dict:
    return {"verdict": verdict.text, "exit_code": verdict.exit_code}


def _parsed(line: bytes) -> dict | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
