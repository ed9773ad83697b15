"""The loader: batches are built ahead, and only a little ahead."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling

from higgs_ds.batching import loader
from higgs_ds.batching.batch_plan import MicroBatch, StepPlan
from higgs_ds.batching.loader import load_steps
from higgs_ds.distributed.stop import STOP_SIGNALS
from tests.conftest import ROOT


class Echo(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, micro_batch):
        return torch.tensor(micro_batch.rows)


def plans_of(steps: int) -> list[StepPlan]:
    return [StepPlan(i, 0.0, (MicroBatch((i,)),)) for i in range(steps)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_without_end_is_drawn_as_it_is_needed(num_workers):
    drawn = []

    def plans():
        for step in itertools.count(1):
            drawn.append(step)
            yield StepPlan(step, 0.0, tuple(MicroBatch((step, i)) for i in range(step % 3 + 1)))

    with load_steps(Echo(), plans(), num_workers=num_workers) as loaded:
        for step, (plan, batches) in enumerate(itertools.islice(loaded, 20), start=1):
            assert plan.step == step
            assert [batch.tolist() for batch in batches] == [[step, i] for i in range(step % 3 + 1)]
    assert len(drawn) <= 20 + 4 * num_workers + 1


class Tokenized(Echo):
    """Every item is tokenized by several threads, where they are not forbidden."""

    def __init__(self):
        from tokenizers import Tokenizer, models

        self.tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        self.tokenizer.encode_batch(["a b"] * 64)

    def __getitem__(self, micro_batch):
        return torch.tensor([len(self.tokenizer.encode_batch(["a b"] * 64))])


def test_workers_say_nothing_and_end_with_a_rank_that_fails_although_they_outlive_a_stop_signal():
    code = (
        "from higgs_ds.batching.loader import load_steps\n"
        "import os; from tests.batching.test_loader import Tokenized, plans_of\n"
        "del os.environ['TOKENIZERS_PARALLELISM']\n"  # which the tests set
        "with load_steps(Tokenized(), plans_of(99), num_workers=2) as loaded:\n"
        "    for plan, _ in loaded:\n"
        "        if plan.step == 2:\n"
        "            raise SystemExit(3)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (3, "", "")


def test_a_stop_signal_that_comes_as_a_worker_begins_does_not_end_it(monkeypatch):
    """torchrun passes its own on to every process of a rank, at whatever moment that is of theirs."""
    set_handlers = signal_handling._set_worker_signal_handlers

    def begin():
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        set_handlers()
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", begin)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with load_steps(Echo(), plans_of(3), num_workers=2) as loaded:
        assert [batch.tolist() for _, (batch,) in loaded] == [[0], [1], [2]]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


class Stuck(Echo):
    """One worker is suspended, another never returns, the third goes on."""

    def __init__(self):
        super().__init__()
        self.never_returns = multiprocessing.Event()

    def __getitem__(self, micro_batch):
        if micro_batch.rows == (1,):
            os.kill(os.getpid(), signal.SIGSTOP)
        if micro_batch.rows == (2,):
            self.never_returns.set()
            time.sleep(3600)
        return super().__getitem__(micro_batch)


def is_suspended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_workers_that_do_not_go_hold_nothing_up(monkeypatch):
    """`process.leave_now` kills them, see tests/test_faults.py."""
    monkeypatch.setattr(loader, "WORKERS_END_SEC", 1.0)
    stuck = Stuck()
    with load_steps(stuck, plans_of(99), num_workers=3) as loaded:
        assert next(loaded)[1][0].tolist() == [0]
        workers = multiprocessing.active_children()
        assert stuck.never_returns.wait(60)  # before it does, a worker would still go
        while not any(is_suspended(worker.pid) for worker in workers):
            time.sleep(0.01)
        started = time.monotonic()
    assert time.monotonic() - started < 3
    ending = [thread for thread in threading.enumerate() if thread.daemon and "shutdown_workers" in thread.name]
    for thread in ending:  # torch gives each of them up in five seconds
        thread.join(60)
    assert len(ending) == 1 and len(multiprocessing.active_children()) == 2
    for worker in workers:
        worker.kill()


def test_a_worker_that_is_killed_while_it_is_needed_is_an_error_at_once():
    """Which torch's handler of SIGCHLD raises for registered workers: the test above would see it."""
    with load_steps(Stuck(), plans_of(99), num_workers=3) as loaded:
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(RuntimeError, match="DataLoader worker .* is killed by signal: Killed"):
            time.sleep(10)
        del loaded
