"""What the ranks' watch finds out over real sockets; ranks are threads here, whole processes in test_faults.py."""

import contextlib
import json
import socket
import threading
import time

import pytest
import torch.distributed as dist

from higgs_ds.distributed import watch_sockets
from higgs_ds.distributed.rendezvous import connect
from higgs_ds.distributed.watch_sockets import Peers, RankState, Verdict, find_stalled


@pytest.fixture
def connected(monkeypatch):
    """Connects so many ranks, after `first(port)` was called by rank 1; (server, client…)."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(watch_sockets, "HEARTBEAT_SEC", 0.05)

    def connect_all(world_size: int, first=lambda port: None) -> list:
        store = dist.HashStore()
        sides: list = [None] * world_size

        def one(rank: int) -> None:
            if rank == 1:
                first(json.loads(store.get("reach/at"))[0])
            hosts, connections, _ = connect(store, rank, world_size)
            sides[rank] = Peers(rank, connections, [""] * world_size)
            sides[rank].close = lambda: connections[0].close()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return sides

    return connect_all


def state(rank: int, **values) -> RankState:
    return RankState(rank, **{"step": 7, "doing": "forward", "timed": True} | values)


@pytest.mark.parametrize("begun", [True, False])
def test_a_connection_that_closes_is_a_dead_rank_and_all_hear_of_it(begun, connected):
    server, one, two = connected(3)
    assert two.exchange(state(2), 60) is None
    if begun:
        assert one.exchange(state(1), 60) is None and server.exchange(state(0), 60) is None
    one.close()  # as the system does for a process that is killed
    wanted = Verdict(f"rank 1 died {'in step 7 (forward)' if begun else 'before the first step (starting)'}")
    assert server.exchange(state(0), 60) == wanted
    assert two.exchange(state(2), 60) == wanted


def test_a_rank_that_says_goodbye_is_not_missed(connected):
    server, one, two = connected(3)
    one.leave()
    assert server.exchange(state(0), 60) is None and server.exchange(state(0), 60) is None
    server.leave()
    assert two.exchange(state(2), 60) is None and two.exchange(state(2), 60) is None


def test_the_exit_code_of_a_failure_reaches_every_rank(connected):
    server, one, two = connected(3)
    failed = Verdict("rank 2 failed in step 7 (forward): out of memory", 3)
    two.send_verdict(failed)
    assert server.exchange(state(0), 60) == failed
    assert one.exchange(state(1), 60) == failed


def test_a_rank_that_falls_silent_is_named_unless_this_process_was_suspended_itself(connected, monkeypatch):
    monkeypatch.setattr(watch_sockets, "SILENCE_TIMEOUT_SEC", 0.3)
    server, one = connected(2)
    one.exchange(state(1), 60)
    server.exchange(state(0), 60)
    time.sleep(0.4)
    server.extend_deadlines(0.4)
    one.extend_deadlines(0.4)
    server._listen()
    assert server._find_silent() is None
    time.sleep(0.4)
    assert server._find_silent().text == "rank 1 has not been heard from for 0 s, in step 7 (forward)"
    while (verdict := one.exchange(state(1), 60)) is None:
        pass
    assert verdict.text == "rank 0 has not been heard from for 0 s, in step 7 (forward)"


def test_strangers_are_left_alone(connected):
    strangers = []

    def knock(port: int) -> None:
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b'\0\0\0\x0c["guess", 1]', b"\0\0\0\1[", b"\xff" * 100_000):
            strangers.append(socket.create_connection(("127.0.0.1", port)))
            with contextlib.suppress(OSError):  # rank 0 may have hung up on it by now
                strangers[-1].sendall(hello)
                strangers[-1].shutdown(socket.SHUT_WR)

    server, one = connected(2, knock)
    assert server.exchange(state(0), 60) is None
    one.send_verdict(Verdict("the end"))
    assert server.exchange(state(0), 60) == Verdict("the end")


def test_the_ranks_behind_are_those_that_hold_up_the_others():
    waiting = [state(rank, progress=9, no_progress_sec=11) for rank in range(4)]
    assert find_stalled(waiting, 12) is None
    assert find_stalled(waiting, 10).text.startswith("no rank has moved for 10 s (--stall_timeout_sec), in step 7")
    waiting[2] = state(2, progress=8, no_progress_sec=11, doing="reading")
    assert find_stalled(waiting, 10).text == "rank 2 has not moved for 10 s (--stall_timeout_sec), in step 7 (reading)"
    waiting[3] = state(3, progress=8, no_progress_sec=11)
    assert find_stalled(waiting, 10).text.startswith("ranks 2, 3 have not moved for 10 s")
    waiting[1] = state(1, progress=9, no_progress_sec=11, timed=False)
    assert find_stalled(waiting, 10) is None
    assert find_stalled([state(0, no_progress_sec=11)], 10).text.startswith("rank 0 has not moved")
