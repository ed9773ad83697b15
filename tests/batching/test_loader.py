"""The loader: batches are built ahead, and only a little ahead."""

import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling

from higgs_ds.batching.batch_plan import MicroBatch, StepPlan
from higgs_ds.batching.loader import load_steps
from higgs_ds.distributed.stop import STOP_SIGNALS
from tests.conftest import ROOT


class Echo(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, micro_batch):
        return torch.tensor(micro_batch.rows)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_without_end_is_drawn_as_it_is_needed(num_workers):
    drawn = []

    def plans():
        for step in itertools.count(1):
            drawn.append(step)
            yield StepPlan(step, 0.0, tuple(MicroBatch((step, i)) for i in range(step % 3 + 1)))

    loaded = load_steps(Echo(), plans(), num_workers=num_workers)
    for step, (plan, batches) in enumerate(itertools.islice(loaded, 20), start=1):
        assert plan.step == step
        assert [batch.tolist() for batch in batches] == [[step, i] for i in range(step % 3 + 1)]
    assert len(drawn) <= 20 + 4 * num_workers + 1


class Broken(Echo):
    def __getitem__(self, micro_batch):
        raise ValueError("what went wrong")


@pytest.mark.parametrize("dataset", ["Echo", "Broken"])
def test_a_rank_that_fails_ends_although_its_workers_outlive_a_stop_signal(dataset):
    code = (
        "from higgs_ds.batching.loader import load_steps\n"
        "from higgs_ds.batching.batch_plan import MicroBatch, StepPlan\n"
        f"from tests.batching.test_loader import {dataset} as Dataset\n"
        "loaded = load_steps(Dataset(), [StepPlan(i, 0.0, (MicroBatch((i,)),)) for i in range(99)], num_workers=1)\n"
        "for plan in loaded:\n"
        "    raise ValueError('what went wrong')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "what went wrong" in result.stderr


class Tokenized(Echo):
    """Every item is tokenized by several threads, where they are not forbidden."""

    def __init__(self):
        from tokenizers import Tokenizer, models

        self.tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        self.tokenizer.encode_batch(["a b"] * 64)

    def __getitem__(self, micro_batch):
        return torch.tensor([len(self.tokenizer.encode_batch(["a b"] * 64))])


def test_workers_say_nothing_while_they_run_nor_when_they_are_left_early():
    code = (
        "from higgs_ds.batching.loader import load_steps\n"
        "from higgs_ds.batching.batch_plan import MicroBatch, StepPlan\n"
        "import os; from tests.batching.test_loader import Tokenized\n"
        "del os.environ['TOKENIZERS_PARALLELISM']\n"  # which the tests set
        "plans = [StepPlan(i, 0.0, (MicroBatch((i,)),)) for i in range(4)]\n"
        "for plan, _ in load_steps(Tokenized(), plans, num_workers=2):\n"
        "    if plan.step == 2:\n"
        "        break\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_signal_that_comes_as_a_worker_begins_does_not_end_it(number, monkeypatch):
    """torchrun passes its own on to every process of a rank, at whatever moment that is of theirs."""
    set_handlers = signal_handling._set_worker_signal_handlers

    def begin():
        os.kill(os.getpid(), number)
        set_handlers()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", begin)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    plans = [StepPlan(i, 0.0, (MicroBatch((i,)),)) for i in range(3)]
    assert [batch.tolist() for _, (batch,) in load_steps(Echo(), plans, num_workers=2)] == [[0], [1], [2]]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
