"""What can be done to a rank before it runs, for failures that no input can cause. Each is named by tests."""

import multiprocessing
import os
import resource
import signal
import time
import weakref

from higgs_ds import boson_tokenizer, checkpoint, dataset, engine, model, trainer


def _at_step(step: int, action) -> None:
    original = trainer.Trainer.train_step

    def train_step(self, number, batches, lr):
        if number == step:
            action()
        return original(self, number, batches, lr)

    trainer.Trainer.train_step = train_step


def hang(step: int) -> None:
    """Stands still in a step, for good."""
    _at_step(step, lambda: time.sleep(3600))


def fail(step: int) -> None:
    """An error that nobody foresaw."""
    _at_step(step, lambda: 1 / 0)


def slowly(step_seconds: float, write_seconds: float) -> None:
    """Each step takes longer, and each file of a checkpoint until it has reached the disk, as with a large model."""
    original_step, original_sync = trainer.Trainer.train_step, checkpoint._sync

    def train_step(self, number, batches, lr):
        time.sleep(step_seconds)
        return original_step(self, number, batches, lr)

    def sync(path):
        time.sleep(write_seconds)
        original_sync(path)

    trainer.Trainer.train_step, checkpoint._sync = train_step, sync


def quota_from_step(step: int, size: int) -> None:
    """No file may grow beyond `size` bytes."""
    _at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


def count_codec_networks() -> None:
    """Says how many networks of Boson's codec were built, and are left, when the base model is to be loaded."""
    original_build, original_load = boson_tokenizer.build_tokenizer, model.load_base
    built = []

    def build(*args):
        network = original_build(*args)
        built.append(weakref.ref(network))
        return network

    def load(*args):
        left = sum(network() is not None for network in built)
        print(f"codec networks: {len(built)} built, {left} left", flush=True)
        return original_load(*args)

    boson_tokenizer.build_tokenizer, model.load_base = build, load


def _signal_all() -> None:
    for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
        os.kill(process.pid, signal.SIGTERM)


def signal_at_step(step: int) -> None:
    """SIGTERM to this rank and its data workers in a step, as a queue does."""
    _at_step(step, _signal_all)


def signal_in(phase: str, count: int) -> None:
    """SIGTERM to this rank and its data workers the `count`-th time that it is in the middle of a phase."""
    calls = 0

    def wrap(owner, name) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == count:
                _signal_all()
            return original(*args, **kwargs)

        setattr(owner, name, call)

    wrap(*PHASES[phase])


PHASES = {
    "data": (dataset.MicroBatches, "__getitem__"),
    "forward": (engine.Engine, "forward"),
    "backward": (engine.Engine, "backward"),
    "save": (engine.Engine, "gather_state"),
    "write": (checkpoint, "_sync"),
}
