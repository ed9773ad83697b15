"""Brings the ranks together; a host name, a port or a firewall that keeps them apart is one error line."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import psutil  # which deepspeed requires
import torch.distributed as dist

from ..errors import ConfigError, words_of
from ..process import say
from .ports import free_port, taken

# Torch's default. Once they have met, one rank may encode for hours while the others wait: a dead or stuck rank is then
# found by `rank_watch`, and not by a collective's timeout.
MEETING_TIMEOUT = timedelta(minutes=30)
SAID_TO_WAIT_SEC = 60.0
REACH_TIMEOUT_SEC = 20.0
PORT_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
HELLO_TIMEOUT_SEC = 10.0  # for a connection to say which rank it is
HELLO_BYTES = 200


@dataclass(frozen=True)
class Meeting:
    """The ranks that have found each other, before their first collective."""

    store: dist.Store
    rank: int
    world_size: int
    hosts: tuple[str, ...]  # every rank's
    connections: dict[int, Connection]  # rank 0's by rank; another's to rank 0


def meet(*, on_cpu: bool) -> Meeting:
    """Waits until all ranks are there and each has connected to rank 0; without a launcher there is one rank.

    Raises:
        ConfigError: MASTER_ADDR has no address or MASTER_PORT is taken; ranks did not come; or, on all ranks, a
            firewall stands between two hosts.
    """
    if not os.environ.get("RANK"):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        with _said_to_wait(where):
            socket.getaddrinfo(os.environ.get("MASTER_ADDR", "localhost"), None)  # torch would ask for half an hour
            store, rank, world_size = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
            hosts, connections, other_host = connect(store, rank, world_size)
    except ConfigError:
        raise
    except (dist.DistError, OSError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise _refused(taken(int(os.environ["MASTER_PORT"]))) from None
        words = f"the ranks did not meet at {where}, says {socket.gethostname()}: {words_of(error)}"
        raise _refused(f"MASTER_ADDR, MASTER_PORT: {words}") from None
    if on_cpu and other_host is not None:
        _set_gloo_interface(other_host)
    return Meeting(store, rank, world_size, hosts, connections)


def named(ranks: list[int], hosts: tuple[str, ...]) -> str:
    """`rank 2`, `ranks 2, 3`; where there are several hosts, `ranks 2, 3 on node02 and rank 5 on node03`."""
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank] if len(set(hosts)) > 1 else "", []).append(rank)
    return " and ".join(
        f"rank{'s' * (len(those) > 1)} {', '.join(map(str, those))}{f' on {host}' if host else ''}"
        for host, those in of_host.items()
    )


@contextlib.contextmanager
def _said_to_wait(where: str) -> Iterator[None]:
    """Has rank 0 say where it waits, and for how many ranks, once that has taken a minute."""
    text = f"still waiting at {where} for all {os.environ.get('WORLD_SIZE')} ranks to come"
    timer = threading.Timer(SAID_TO_WAIT_SEC, say, [text])
    timer.daemon = True
    if os.environ["RANK"] == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def connect(store: dist.Store, rank: int, world_size: int) -> tuple[tuple[str, ...], dict[int, Connection], str | None]:
    """Connects every rank to a port of rank 0 that the system chose, for the watch, and as collectives will do.

    Behind a firewall that lets only MASTER_PORT through, the first collective would wait for hours.

    Returns:
        every rank's host; the connections, see `Meeting`; and the address of some rank on another host than rank 0's,
        None where all are on one.

    Raises:
        ConfigError: on all ranks, naming those that did not get through.
    """
    if world_size == 1:
        return (socket.gethostname(),), {}, None
    connections, address, failed = _accept_all(store, world_size) if rank == 0 else _connect_to_0(store, rank)
    store.set(f"reach/{rank}", json.dumps([socket.gethostname(), address, failed]))
    reports = [json.loads(text) for text in store.multi_get([f"reach/{rank}" for rank in range(world_size)])]
    if found := [failed for _, _, failed in reports if failed]:
        store.set(f"told/{rank}", "")
        if rank == 0:  # the store ends with this process, so the others must have read it
            with contextlib.suppress(dist.DistError):
                store.wait([f"told/{other}" for other in range(world_size)], timedelta(seconds=10))
        first, last = PORT_RANGE_FILE.read_text(encoding="ascii").split()
        found.append(f"hosts must reach each other on TCP ports {first}-{last} (net.ipv4.ip_local_port_range)")
        raise ConfigError(found)
    elsewhere = (address for _, address, _ in reports if not _is_loopback(address))
    return tuple(host for host, _, _ in reports), connections, next(elsewhere, None)


def _accept_all(store: dist.Store, world_size: int) -> tuple[dict[int, Connection], str, str]:
    """Rank 0's connections to all others, without those that report that they could not connect."""
    token, until = secrets.token_hex(16), time.monotonic() + MEETING_TIMEOUT.total_seconds()
    connections: dict[int, Connection] = {}
    missing = set(range(1, world_size))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both) as listener:
        listener.settimeout(1.0)
        store.set("reach/at", json.dumps([listener.getsockname()[1], token]))
        while missing:
            try:
                connection = _messages(listener.accept()[0])
            except TimeoutError:
                missing -= {rank for rank in missing if store.check([f"failed/{rank}"])}
                if missing and time.monotonic() > until:
                    raise dist.DistStoreError(f"{named(sorted(missing), ())} did not come") from None
                continue
            with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # a stranger may say anything
                if connection.poll(HELLO_TIMEOUT_SEC):
                    said, rank = json.loads(connection.recv_bytes(HELLO_BYTES))
                    if said == token and rank in missing:
                        connections[rank] = connection
                        missing.remove(rank)
                        continue
            connection.close()
    return connections, "127.0.0.1", ""


def _connect_to_0(store: dist.Store, rank: int) -> tuple[dict[int, Connection], str, str]:
    """Another rank's connection to rank 0, its own address there, and why there is none, if so."""
    port, token = json.loads(store.get("reach/at"))
    host = os.environ["MASTER_ADDR"]
    try:
        reached = socket.create_connection((host, port), timeout=REACH_TIMEOUT_SEC)
    except OSError as error:
        met_at = f"{host} on port {os.environ['MASTER_PORT']} (MASTER_PORT)"
        where = f"rank {rank} on {socket.gethostname()}"
        store.set(f"failed/{rank}", "")
        return {}, "127.0.0.1", f"{where} reaches {met_at}, but not on port {port}: {error}"
    address, connection = reached.getsockname()[0], _messages(reached)
    connection.send_bytes(json.dumps([token, rank]).encode())
    return {0: connection}, address, ""


def _messages(connected: socket.socket) -> Connection:
    """A socket that carries messages of bytes; nothing that comes over it is unpickled."""
    connected.settimeout(None)
    return Connection(connected.detach())


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def _set_gloo_interface(other_host: str) -> None:
    """Has gloo use the network interface that leads to rank 0, or from rank 0 to `other_host`, unless one is named.

    By default gloo takes the address of this host's name, which is 127.0.1.1 on many systems, where no other host can
    reach it.
    """
    mine = _own_address(os.environ["MASTER_ADDR"]) or _own_address(other_host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == mine for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _own_address(other: str) -> str | None:
    """This host's IPv4 address on the way to another; None for itself, or where there is no route."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing, only looks up the route
        mine = probe.getsockname()[0]
        return None if _is_loopback(mine) else mine
    return None


def _refused(text: str) -> ConfigError:
    """Makes the error, and prints it on any rank but 0, for which `main` does: this may be the only rank to know."""
    if os.environ.get("RANK", "0") != "0":
        say(f"[rank {os.environ['RANK']}] {text}", error=True)
    return ConfigError([text])
