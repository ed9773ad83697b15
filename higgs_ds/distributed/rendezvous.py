"""How the ranks find each other, and what keeps them from it: a name, a port, a firewall, said in one line each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from ..errors import ConfigError, reason_of
from ..process import say

# To find each other, the ranks have torch's half an hour. After that one may encode for hours while the others wait for
# it: who is dead or stuck is for `rank_watch` to find, and not for a collective's timeout.
MEETING_TIMEOUT = timedelta(minutes=30)
SAID_TO_WAIT_SEC = 60.0
REACH_TIMEOUT_SEC = 20.0
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


def meet(*, on_cpu: bool) -> tuple[dist.Store, int, int]:
    """(store, rank, world size), once all ranks are there and the hosts reach each other; alone without a launcher.

    Raises:
        ConfigError: the meeting place has no address or its port is taken; ranks did not come; or, on all ranks, a
            firewall stands between two hosts.
    """
    if not os.environ.get("RANK"):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ["MASTER_PORT"] = str(free_port(0))
    _check_address()
    try:
        with _said_to_wait():
            store, rank, world_size = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
        other_host = _check_reach(store, rank, world_size) if world_size > 1 else None
    except dist.DistError as error:
        raise _not_met(error) from None
    if on_cpu and other_host is not None:
        _take_the_way_to(other_host)
    return store, rank, world_size


def host_names(world_size: int) -> tuple[str, ...]:
    """Every rank's host, on every rank of the process group."""
    names: list = [None] * world_size
    dist.all_gather_object(names, socket.gethostname())
    return tuple(names)


def named(ranks: list[int], hosts: tuple[str, ...]) -> str:
    """`rank 2`, `ranks 2, 3`; where there are several hosts, `ranks 2, 3 on node02 and rank 5 on node03`."""
    if len(set(hosts)) < 2:
        return _listed(ranks)
    of_host: dict[str, list[int]] = {}
    for rank in ranks:
        of_host.setdefault(hosts[rank], []).append(rank)
    return " and ".join(f"{_listed(those)} on {host}" for host, those in of_host.items())


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _check_address() -> None:
    """Raises ConfigError, on the rank that cannot say which address MASTER_ADDR is."""
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
    """Rank 0 says where it waits, and for how many, once that has taken a minute."""
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
    """Torch's error in one line."""
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
    """How the launcher that started this process is given another port."""
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


def _check_reach(store: dist.Store, rank: int, world_size: int) -> str | None:
    """Has every rank connect to a port of rank 0's that the system chose, as collectives and the watch will.

    Behind a firewall that lets only the meeting place through, the first collective would wait for hours.

    Returns:
        the address of some rank on another host than rank 0's; None where all are on one.

    Raises:
        ConfigError: on all ranks, naming those that did not get through.
    """
    if rank == 0:
        with listen(world_size) as listener:
            threading.Thread(target=_let_in, args=(listener,), daemon=True).start()
            store.set("reach/port", str(listener.getsockname()[1]))
            answers = [json.loads(store.get(f"reach/{other}")) for other in range(1, world_size)]
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        failed = [answer["problem"] for answer in answers if "problem" in answer]
        others = [answer["address"] for answer in answers if not _is_loopback(answer.get("address", "127.0.0.1"))]
        store.set("reach/all", json.dumps([failed, others[:1]]))
    else:
        store.set(f"reach/{rank}", json.dumps(_reach(rank, int(store.get("reach/port")))))
        failed, others = json.loads(store.get("reach/all"))
        if failed:
            store.set(f"reach/{rank}/told", "")
    if failed:
        if rank == 0:  # whose end takes the store with it
            with contextlib.suppress(dist.DistError):
                store.wait([f"reach/{other}/told" for other in range(1, world_size)], timedelta(seconds=10))
        first, last = _ephemeral_ports()
        raise ConfigError(
            [*failed, f"hosts must reach each other on TCP ports {first}-{last} (net.ipv4.ip_local_port_range)"]
        )
    return others[0] if others else None


def _reach(rank: int, port: int) -> dict[str, str]:
    address = os.environ["MASTER_ADDR"]
    try:
        with socket.create_connection((address, port), timeout=REACH_TIMEOUT_SEC) as reached:
            return {"address": reached.getsockname()[0]}
    except OSError as error:
        return {
            "problem": f"rank {rank} on {socket.gethostname()} reaches {address} on port {os.environ['MASTER_PORT']} "
            f"(MASTER_PORT), but not on port {port}: {error}"
        }


def listen(backlog: int) -> socket.socket:
    """A socket for other hosts to connect to, on a port that the system chooses."""
    any_family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    return socket.create_server(("", 0), backlog=backlog, **any_family)


def _let_in(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


def _is_loopback(address: str) -> bool:
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def _ephemeral_ports() -> tuple[str, str]:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as file:
            first, last = file.read().split()
    except (OSError, ValueError):
        return "32768", "60999"
    return first, last


def _take_the_way_to(other_host: str) -> None:
    """Has gloo use the network interface that leads to rank 0, or from it to `other_host`, unless one is named.

    By itself it takes the one of this host's name, which is 127.0.1.1 on many systems: no other host reaches that.
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
    """The IPv4 address from which this host would speak to another; None for itself, or where there is no way."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing: only the way is looked up
        mine = probe.getsockname()[0]
        return None if _is_loopback(mine) else mine
    return None


def _refused(text: str) -> ConfigError:
    """The error. `main` says it for rank 0; this rank may be the only one that knows."""
    if os.environ.get("RANK", "0") != "0":
        say(f"[rank {os.environ['RANK']}] {text}", error=True)
    return ConfigError([text])
