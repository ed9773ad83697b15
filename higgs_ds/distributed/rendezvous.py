"""Brings the ranks together; a host name, a port or a firewall that keeps them apart is said in one line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ..errors import ConfigError, reason_of
from ..process import say
from .watch_sockets import JsonConnection

# Torch's default. Once they have met, one rank may encode for hours while the others wait: a dead or stuck rank is then
# found by `rank_watch`, and not by a collective's timeout.
MEETING_TIMEOUT = timedelta(minutes=30)
SAID_TO_WAIT_SEC = 60.0
REACH_TIMEOUT_SEC = 20.0
HELLO_TIMEOUT_SEC = 10.0  # for a connection to say which rank it is
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


@dataclass(frozen=True)
class Meeting:
    """The ranks that have found each other, before their first collective."""

    store: dist.Store
    rank: int
    world_size: int
    hosts: tuple[str, ...]  # every rank's
    connections: dict[int, JsonConnection]  # rank 0's by rank; another's to rank 0


def meet(*, on_cpu: bool) -> Meeting:
    """Waits until all ranks are there and each has connected to rank 0; without a launcher there is one rank.

    Raises:
        ConfigError: MASTER_ADDR has no address or MASTER_PORT is taken; ranks did not come; or, on all ranks, a
            firewall stands between two hosts.
    """
    if not os.environ.get("RANK"):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ["MASTER_PORT"] = str(free_port(0))
    _check_address()
    try:
        with _said_to_wait():
            store, rank, world_size = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
            hosts, connections, other_host = connect(store, rank, world_size)
    except dist.DistError as error:
        raise _not_met(error) from None
    if on_cpu and other_host is not None:
        _take_the_way_to(other_host)
    return Meeting(store, rank, world_size, hosts, connections)


def named(ranks: list[int], hosts: tuple[str, ...]) -> str:
    """`rank 2`, `ranks 2, 3`; where there are several hosts, `ranks 2, 3 on node02 and rank 5 on node03`."""
    if len(set(hosts)) < 2:
        return _listed(ranks)
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank], []).append(rank)
    return " and ".join(f"{_listed(those)} on {host}" for host, those in of_host.items())


def _listed(ranks: list[int]) -> str:
    """`rank 2` or `ranks 2, 3`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _check_address() -> None:
    """Raises ConfigError on a rank where MASTER_ADDR cannot be resolved."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return
    try:
        socket.getaddrinfo(address, int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError, OverflowError) as error:
        reason = reason_of(error)
        raise _refused(f"MASTER_ADDR: {address}:{port} has no address on {socket.gethostname()}: {reason}") from None


@contextlib.contextmanager
def _said_to_wait() -> Iterator[None]:
    """Has rank 0 say where it waits, and for how many ranks, once that has taken a minute."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    text = f"still waiting at {where} for all {os.environ.get('WORLD_SIZE')} ranks to come"
    timer = threading.Timer(SAID_TO_WAIT_SEC, say, [text])
    timer.daemon = True
    if os.environ["RANK"] == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_met(error: dist.DistError) -> ConfigError:
    """Puts torch's error into one line."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" and "EADDRINUSE" in str(error):
        free = free_port(port + 1)
        return _refused(
            f"MASTER_PORT: {port} is taken on {socket.gethostname()}, by another run perhaps; {free} is free: "
            f"{_port_option(free)}"
        )
    reason = str(error).strip().splitlines()[0]
    return _refused(f"MASTER_ADDR, MASTER_PORT: the ranks did not meet at {address}:{port}: {reason}")


def _port_option(port: int) -> str:
    """The option that gives another port to the launcher that started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun --master_port {port}"
    return f"deepspeed --master_port {port}" if "CROSS_RANK" in os.environ else f"MASTER_PORT={port}"


def free_port(first: int = 0) -> int:
    """The first free port from `first` on, of a hundred; any free one where those are taken, or `first` is 0."""
    for port in (*(range(first, min(first + 100, 65536)) if first else ()), 0):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("", port))
            return free.getsockname()[1]
    raise _refused(f"{socket.gethostname()} has no free TCP port")


def connect(
    store: dist.Store, rank: int, world_size: int
) -> tuple[tuple[str, ...], dict[int, JsonConnection], str | None]:
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
    if rank == 0:
        connections, hellos, failed = _let_in(store, world_size)
        hosts = [socket.gethostname(), *(hello["host"] for _, hello in sorted(hellos.items()))]
        others = [hello["address"] for hello in hellos.values() if not _is_loopback(hello["address"])]
        store.set("reach/all", json.dumps([failed, hosts, others[:1]]))
    else:
        connections = _reach(store, rank)
        failed, hosts, others = json.loads(store.get("reach/all"))
        if failed:
            store.set(f"reach/{rank}/told", "")
    if failed:
        if rank == 0:  # the store ends with this process, so the others must have read it
            with contextlib.suppress(dist.DistError):
                store.wait([f"reach/{other}/told" for other in range(1, world_size)], timedelta(seconds=10))
        first, last = _ephemeral_ports()
        raise ConfigError(
            [*failed, f"hosts must reach each other on TCP ports {first}-{last} (net.ipv4.ip_local_port_range)"]
        )
    return tuple(hosts), connections, others[0] if others else None


def _let_in(store: dist.Store, world_size: int) -> tuple[dict[int, JsonConnection], dict[int, dict], list[str]]:
    """Rank 0's connections to all others, what they said of themselves, and why others could not connect."""
    token, until = secrets.token_hex(16), time.monotonic() + MEETING_TIMEOUT.total_seconds()
    connections: dict[int, JsonConnection] = {}
    hellos: dict[int, dict] = {}
    failed: dict[int, str] = {}
    with listen(world_size) as listener:
        listener.settimeout(1.0)
        store.set("reach/at", json.dumps([listener.getsockname()[1], token]))
        while missing := set(range(1, world_size)) - hellos.keys() - failed.keys():
            try:
                connection = JsonConnection(listener.accept()[0])
            except TimeoutError:
                for rank in filter(lambda rank: store.check([f"reach/{rank}"]), missing):
                    failed[rank] = store.get(f"reach/{rank}").decode()
                if time.monotonic() > until:
                    raise dist.DistStoreError(f"{_listed(sorted(missing))} did not come") from None
                continue
            hello = connection.wait_for_one(HELLO_TIMEOUT_SEC)
            if hello.get("token") == token and hello.get("rank") in missing:
                connections[hello["rank"]], hellos[hello["rank"]] = connection, hello
            else:
                connection.close()  # a stranger
    return connections, hellos, [failed[rank] for rank in sorted(failed)]


def _reach(store: dist.Store, rank: int) -> dict[int, JsonConnection]:
    """Connects another rank to rank 0; an empty dict where that fails, of which rank 0 is told."""
    (port, token), host = json.loads(store.get("reach/at")), socket.gethostname()
    address = os.environ["MASTER_ADDR"]
    try:
        reached = socket.create_connection((address, port), timeout=REACH_TIMEOUT_SEC)
    except OSError as error:
        met_at = f"{address} on port {os.environ['MASTER_PORT']} (MASTER_PORT)"
        store.set(f"reach/{rank}", f"rank {rank} on {host} reaches {met_at}, but not on port {port}: {error}")
        return {}
    connection = JsonConnection(reached)
    connection.send({"token": token, "rank": rank, "host": host, "address": reached.getsockname()[0]})
    return {0: connection}


def listen(backlog: int) -> socket.socket:
    """A socket for other hosts to connect to, on a port that the system chooses."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def _ephemeral_ports() -> tuple[str, str]:
    """The first and last port that this system hands out."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            first, last = file.read().split()
    except (OSError, ValueError):
        return "32768", "60999"
    return first, last


def _take_the_way_to(other_host: str) -> None:
    """Has gloo use the network interface that leads to rank 0, or from rank 0 to `other_host`, unless one is named.

    By default gloo takes the address of this host's name, which is 127.0.1.1 on many systems, where no other host can
    reach it.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    mine = next(filter(None, map(_own_address, (os.environ["MASTER_ADDR"], other_host))), None)
    if mine is None:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == mine:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


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
