"""Two hosts on one machine: network namespaces with addresses of their own, a cable between them, and a firewall."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

RENDEZVOUS_PORT = 29511
SHORT_SILENCE_SEC = 20.0  # of ranks on these hosts, in the place of watch_sockets.SILENCE_TIMEOUT_SEC
COLLECTIVES = (40000, 40199)  # as net.ipv4.ip_local_port_range on both hosts


@dataclass(frozen=True)
class Host:
    """One of them."""

    name: str
    address: str
    device: str  # its end of the cable

    def run(self, *command: str) -> None:
        """A command of the system, in the host's network; skips the test where it may not be run."""
        ran = subprocess.run(["ip", "netns", "exec", self.name, *command], capture_output=True, text=True)
        if ran.returncode:
            pytest.skip(f"{' '.join(command[:4])}: {ran.stderr.strip()}")

    def cut_off(self) -> None:
        """Nothing comes from the host or goes to it any more."""
        self.run("ip", "link", "set", self.device, "down")

    def open_only(self, first: int, last: int) -> None:
        """Lets in TCP to the meeting place and to the ports from `first` to `last`, and no other IPv4."""
        self.run("tc", "qdisc", "replace", "dev", self.device, "clsact")
        self.run("tc", "filter", "del", "dev", self.device, "ingress")
        words = ",".join(" ".join(map(str, one)) for one in firewall(RENDEZVOUS_PORT, first, last))
        count = words.count(",") + 1
        program = ["bpf", "direct-action", "bytecode", f"{count},{words}"]
        self.run("tc", "filter", "add", "dev", self.device, "ingress", "protocol", "all", *program)


def firewall(port: int, first: int, last: int) -> list[tuple[int, int, int, int]]:
    """Classic BPF over an Ethernet frame: (operation, steps to skip if true, if false, constant) each."""
    dropped, let_in = 2, 0  # TC_ACT_SHOT, TC_ACT_OK
    return [
        (0x28, 0, 0, 12),  # what kind of frame
        (0x15, 0, 9, 0x0800),  # other than IPv4 (ARP): let in
        (0x30, 0, 0, 23),  # which protocol
        (0x15, 0, 6, 6),  # other than TCP: dropped
        (0xB1, 0, 0, 14),  # length of the IP header
        (0x48, 0, 0, 16),  # port that it goes to
        (0x15, 4, 0, port),
        (0x35, 0, 2, first),
        (0x25, 1, 0, last),
        (0x05, 0, 0, 1),
        (0x06, 0, 0, dropped),
        (0x06, 0, 0, let_in),
    ]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """With the ports open that docs/many-machines.md names; skips, with the reason, where there can be none."""
    if not all(map(shutil.which, ("ip", "tc"))):
        pytest.skip("no iproute2 on this machine, which makes network namespaces")
    hosts = tuple(
        Host(f"higgs{os.getpid()}{letter}", f"10.77.0.{number}", f"cable{letter}")
        for number, letter in enumerate("ab", start=1)
    )
    with contextlib.ExitStack() as made:
        for host in hosts:
            ran = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if ran.returncode:
                pytest.skip(f"network namespaces may not be made here: {ran.stderr.strip()}")
            made.callback(subprocess.run, ["ip", "netns", "del", host.name], check=True)
        one, other = hosts
        ends = ["name", one.device, "netns", one.name], ["name", other.device, "netns", other.name]
        one.run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", host.device)
            host.run("ip", "link", "set", "lo", "up")
            host.run("ip", "link", "set", host.device, "up")
            host.run("sysctl", "-q", "-w", f"net.ipv4.ip_local_port_range={COLLECTIVES[0]} {COLLECTIVES[1]}")
            host.open_only(*COLLECTIVES)
        yield one, other
