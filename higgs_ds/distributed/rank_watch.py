"""Ends this rank when another one has died or nothing moves any more, and says which rank it was and in which step.

A collective waits for a dead rank until the process group's timeout, half an hour by default, and then names nobody.
So every rank keeps a connection to rank 0 and tells it each half second where it stands. A process that dies closes
its connection at once; a host that dies falls silent. Only the standard library, in a thread that never touches torch.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from ..errors import ConfigError
from ..process import say
from .engine import Ranks

BEAT_SEC = 0.5
SILENCE_SEC = 50.0  # a rank not heard from for so long is gone: its host died, or it is frozen
VERDICT_SEC = 3.0  # how long an error waits for the news that another rank's death is behind it
LAST_RITES_SEC = 30.0
NCCL_TIMEOUT_SEC = 600.0  # torch's, which DeepSpeed's own groups keep, whatever the default group has
MAX_LINE = 65536
LAUNCHER_PROGRAMS = {"deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate"}
LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed", "accelerate.commands")


@dataclass
class Beat:
    """Where a rank stands."""

    rank: int
    moves: int = 0  # how often it has moved since it began; all ranks go through the same moves
    step: int = 0
    doing: str = "starting"
    still_sec: float = 0.0  # since its last move
    timed: bool = False  # whether standing still counts now

    @property
    def place(self) -> str:
        return f"in step {self.step} ({self.doing})" if self.step else f"before the first step ({self.doing})"


class Verdict(str):
    """Why all ranks end, and with which exit code."""

    exit_code = 1

    @classmethod
    def of(cls, text: str, exit_code: object = 1) -> Verdict:
        verdict = cls(text)
        verdict.exit_code = exit_code if isinstance(exit_code, int) else 1
        return verdict


def check_stall_timeout(seconds: float, *, on_gpu: bool) -> None:
    """Refuses a `--stall_timeout_sec` that NCCL's own end of a stuck collective, which names nobody, comes before.

    Raises:
        ConfigError: with both numbers.
    """
    if on_gpu and seconds >= NCCL_TIMEOUT_SEC:
        raise ConfigError(
            [
                f"--stall_timeout_sec: {seconds:g} is not below {NCCL_TIMEOUT_SEC:g}, the seconds after which NCCL "
                "ends a stuck collective without saying which rank is stuck; give less (default: 300)"
            ]
        )


class Watch:
    """One rank's watch over the others; a context manager around all that the ranks do together.

    An exception that leaves the context ends this rank and, by name, all others: with code 1, or with the exception's
    own `exit_code` where it is one that the user is to mend, and needs no traceback. ConfigError is raised on all ranks
    at once, and passes.
    """

    def __init__(self, ranks: Ranks, *, stall_timeout_sec: float):
        self._ranks = ranks
        self._stall_timeout_sec = stall_timeout_sec
        self._lock = threading.Lock()
        self._mine = Beat(ranks.rank)
        self._moved_at = time.monotonic()
        self._ending = threading.Lock()
        self._closing = threading.Event()
        self._failed: str | None = None
        self._failed_is_told = threading.Event()
        self._launchers = _launchers()
        self.before_end: list[Callable[[], None]] = []  # what must be finished even then: a checkpoint being written
        token, port, server = secrets.token_hex(16), 0, None
        if ranks.is_main and ranks.world_size > 1:
            any_family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
            server = socket.create_server(("", 0), backlog=ranks.world_size, **any_family)
            port = server.getsockname()[1]
        token, port = ranks.gather((token, port))[0]
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._talk = _Hub(ranks, token, server) if ranks.is_main else _Spoke(ranks, token, host, port)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """This rank moved on; from here on it may stand still for `stall_timeout_sec`."""
        with self._lock:
            self._mine.moves += 1
            self._mine.step, self._mine.doing, self._mine.timed = step, doing, True
            self._moved_at = time.monotonic()

    def untimed(self, doing: str) -> None:
        """This rank moved on to something that takes as long as it takes: a download, loading a large model."""
        self.at(self._mine.step, doing)
        with self._lock:
            self._mine.timed = False

    def moved(self) -> None:
        """This rank goes on with what it is doing, alone: not one of the moves that all ranks make."""
        with self._lock:
            self._moved_at = time.monotonic()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and not isinstance(error, ConfigError):
            users = hasattr(error, "exit_code")
            # Where another rank died, an error of a collective is only its echo: the verdict ends this process first.
            # What is the user's to mend may have met all ranks at once: rank 0 is the first to say so.
            time.sleep(VERDICT_SEC if self._ranks.world_size > 1 and not (users and self._ranks.is_main) else 0.0)
            if users:
                say(str(error), error=True)
            elif not isinstance(error, OSError):  # whose message says it all
                traceback.print_exception(kind, error, trace)
            with self._lock:
                failed = f"rank {self._ranks.rank} failed {self._mine.place}: {_first_line(error)}"
                self._failed = Verdict.of(failed, getattr(error, "exit_code", 1))
            if self._ranks.world_size > 1:
                self._failed_is_told.wait(10 * BEAT_SEC)
            self._end(self._failed)
        self._closing.set()
        self._thread.join(LAST_RITES_SEC)  # a rank that leaves without a word counts as dead

    def _beat(self) -> Beat:
        with self._lock:
            return Beat(**asdict(self._mine) | {"still_sec": time.monotonic() - self._moved_at})

    def _run(self) -> None:
        woken = time.monotonic()
        while not self._closing.is_set():
            slept = time.monotonic() - woken
            if slept > 10 * BEAT_SEC:  # this process was suspended itself, perhaps with all others
                self._talk.forgive(slept)
                with self._lock:
                    self._moved_at += slept
            woken = time.monotonic()
            if self._failed is not None:
                self._talk.tell(self._failed)
                self._failed_is_told.set()
                return
            verdict = _gone_launcher(self._launchers)
            if verdict is not None:
                self._talk.tell(verdict)
            else:
                verdict = self._talk.exchange(self._beat(), self._stall_timeout_sec)
            if verdict is not None:
                self._end(verdict)
        self._talk.leave()

    def _end(self, verdict: str) -> None:
        self._ending.acquire()  # never released: one thread ends the process, another that comes here waits for that
        say(f"[rank {self._ranks.rank}] ending: {verdict}", error=True)
        rites = threading.Thread(target=self._last_rites, daemon=True)
        rites.start()
        rites.join(LAST_RITES_SEC)
        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        os._exit(getattr(verdict, "exit_code", 1))

    def _last_rites(self) -> None:
        for rite in self.before_end:
            try:
                rite()
            except Exception as error:
                say(f"[rank {self._ranks.rank}] {error}", error=True)


class _Hub:
    """Rank 0's side: hears all, finds who is gone or stuck, tells all."""

    def __init__(self, ranks: Ranks, token: str, server: socket.socket | None):
        self._ranks = ranks
        self._token = token
        self._selector = selectors.DefaultSelector()
        self._lines: dict[int, _Lines] = {}
        self._beats: dict[int, Beat] = {}
        self._heard_at: dict[int, float] = {}
        self._left: set[int] = set()
        if server is not None:
            self._accept_all(server)

    def _accept_all(self, server: socket.socket) -> None:
        server.settimeout(60.0)
        try:
            while len(self._lines) < self._ranks.world_size - 1:
                connection, _ = server.accept()
                lines = _Lines(connection)
                connection.settimeout(10.0)
                hello = lines.wait_for_one()
                rank = hello.get("rank") if hello.get("token") == self._token else None
                if not isinstance(rank, int) or not 0 < rank < self._ranks.world_size or rank in self._lines:
                    connection.close()  # a stranger
                    continue
                connection.setblocking(False)
                self._lines[rank] = lines
                self._beats[rank] = Beat(rank)
                self._heard_at[rank] = time.monotonic()
                self._selector.register(connection, selectors.EVENT_READ, rank)
        except OSError as error:
            missing = sorted(set(range(1, self._ranks.world_size)) - set(self._lines))
            raise RuntimeError(f"rank 0 heard nothing from ranks {missing}: {error}") from error
        finally:
            server.close()

    def exchange(self, mine: Beat, stall_timeout_sec: float) -> str | None:
        """Half a second of listening, one beat to all; the verdict if there is one."""
        self._beats[0] = mine
        verdict = self._listen()
        if verdict is None:
            verdict = self._silent() or _stalled(list(self._beats.values()), stall_timeout_sec)
        if verdict is None:
            self._send({"beat": asdict(mine)})
        else:
            self.tell(verdict)
        return verdict

    def _listen(self) -> str | None:
        if not self._selector.get_map():
            time.sleep(BEAT_SEC)
            return None
        until = time.monotonic() + BEAT_SEC
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                rank = key.data
                messages, open_ = self._lines[rank].read()
                for message in messages:
                    self._heard_at[rank] = time.monotonic()
                    if "verdict" in message:
                        return Verdict.of(str(message["verdict"]), message.get("exit_code"))
                    if "bye" in message:
                        self._left.add(rank)
                    if "beat" in message:
                        self._beats[rank] = _beat_of(message["beat"], rank)
                if not open_:
                    self._selector.unregister(key.fileobj)
                    if rank not in self._left:
                        return f"rank {rank} died {self._beats[rank].place}"
                    self._beats.pop(rank)
                    self._heard_at.pop(rank)
        return None

    def _silent(self) -> str | None:
        for rank, at in self._heard_at.items():
            if rank not in self._left and time.monotonic() - at > SILENCE_SEC:
                return f"rank {rank} has not been heard from for {SILENCE_SEC:.0f} s, {self._beats[rank].place}"
        return None

    def forgive(self, seconds: float) -> None:
        self._heard_at = {rank: at + seconds for rank, at in self._heard_at.items()}

    def tell(self, verdict: str) -> None:
        self._send(_told(verdict))

    def leave(self) -> None:
        self._send({"bye": True})

    def _send(self, message: dict) -> None:
        for rank, lines in self._lines.items():
            if rank not in self._left:
                lines.send(message)


class _Spoke:
    """Every other rank's side: tells rank 0 where it stands, and believes its verdict."""

    def __init__(self, ranks: Ranks, token: str, host: str, port: int):
        try:
            connection = socket.create_connection((host, port), timeout=60.0)
        except OSError as error:
            raise RuntimeError(
                f"rank {ranks.rank} cannot reach rank 0's watch at {host}:{port} ({error}); "
                "nodes must reach each other on every TCP port"
            ) from error
        self._lines = _Lines(connection)
        self._lines.send({"token": token, "rank": ranks.rank})
        connection.setblocking(False)
        self._connection = connection
        self._heard_at = time.monotonic()
        self._first = Beat(0)
        self._left = False

    def exchange(self, mine: Beat, stall_timeout_sec: float) -> str | None:
        """One beat to rank 0, half a second of listening; the verdict if there is one."""
        if self._left:
            time.sleep(BEAT_SEC)
            return None
        self._lines.send({"beat": asdict(mine)})
        until = time.monotonic() + BEAT_SEC
        while (left := until - time.monotonic()) > 0 and not self._left:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(left):
                    break
            messages, open_ = self._lines.read()
            for message in messages:
                self._heard_at = time.monotonic()
                if "verdict" in message:
                    return Verdict.of(str(message["verdict"]), message.get("exit_code"))
                self._left = self._left or "bye" in message
                if "beat" in message:
                    self._first = _beat_of(message["beat"], 0)
            if not open_ and not self._left:
                return f"rank 0 died {self._first.place}"
        if not self._left and time.monotonic() - self._heard_at > SILENCE_SEC:
            return f"rank 0 has not been heard from for {SILENCE_SEC:.0f} s, {self._first.place}"
        return None

    def forgive(self, seconds: float) -> None:
        self._heard_at += seconds

    def tell(self, verdict: str) -> None:
        self._lines.send(_told(verdict))

    def leave(self) -> None:
        self._lines.send({"bye": True})
        self._connection.close()


class _Lines:
    """JSON objects, one a line, over a socket; what is not one is dropped."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._rest = b""

    def send(self, message: dict) -> None:
        # A peer that is gone or does not read shows when reading from it.
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> tuple[list[dict], bool]:
        """What has come, and whether the connection is still open."""
        try:
            data = self._connection.recv(MAX_LINE)
        except (BlockingIOError, TimeoutError):
            return [], True
        except OSError:
            return [], False
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-MAX_LINE:]
        return [message for line in lines if (message := _parsed(line))], bool(data)

    def wait_for_one(self) -> dict:
        """The first message; empty if there is none."""
        while True:
            messages, open_ = self.read()
            if messages:
                return messages[0]
            if not open_ or len(self._rest) >= MAX_LINE:
                return {}
            if self._connection.gettimeout():
                return {}


def _told(verdict: str) -> dict:
    return {"verdict": verdict, "exit_code": getattr(verdict, "exit_code", 1)}


def _parsed(line: bytes) -> dict | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _beat_of(values: object, rank: int) -> Beat:
    known = {f.name for f in fields(Beat)}
    given = {k: v for k, v in values.items() if k in known} if isinstance(values, dict) else {}
    return Beat(**given | {"rank": rank})


def _stalled(beats: list[Beat], stall_timeout_sec: float) -> str | None:
    """A sentence about the ranks that hold up all others, once nobody has moved for the timeout."""
    if not all(beat.timed and beat.still_sec > stall_timeout_sec for beat in beats):
        return None
    fewest = min(beat.moves for beat in beats)
    behind = [beat for beat in beats if beat.moves == fewest]
    if len(behind) == len(beats):
        who = "no rank has" if len(beats) > 1 else "rank 0 has not"
    else:
        who = ("rank " if len(behind) == 1 else "ranks ") + ", ".join(str(beat.rank) for beat in behind)
        who += " has not" if len(behind) == 1 else " have not"
    return f"{who} moved for {stall_timeout_sec:g} s (--stall_timeout_sec), {behind[0].place}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    name = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return name + (text[0] if text else "")


def _launchers() -> list[tuple[int, int]]:
    """(process, its parent) from this process up through its launchers: while they live, the parents stay the same."""
    chain = []
    pid = os.getpid()
    while (parent := _parent_of(pid)) and _is_launcher(parent):
        chain.append((pid, parent))
        pid = parent
    return chain


def _gone_launcher(chain: list[tuple[int, int]]) -> str | None:
    for pid, parent in chain:
        if _parent_of(pid) != parent:
            return f"the launcher (process {parent}) is gone"
    return None


def _parent_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _is_launcher(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            program, *words = file.read().split("\0")
    except OSError:
        return False
    return os.path.basename(program).startswith("python") and any(
        os.path.basename(word) in LAUNCHER_PROGRAMS or word.startswith(LAUNCHER_MODULES) for word in words[:4]
    )
