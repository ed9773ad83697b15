"""Changes to a rank before it runs, for failures that no input can cause. Each is named by tests."""

import ctypes
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import threading
import time
import weakref
from dataclasses import replace
from functools import partial

import torch

from higgs_ds import checkpoint, memory_check, trainer
from higgs_ds import load_data as data
from higgs_ds import setup as run_setup
from higgs_ds.batching import batch_index, collate
from higgs_ds.batching import loader as dataset
from higgs_ds.codec import boson_tokenizer
from higgs_ds.codec.sample import SampleCodec
from higgs_ds.distributed import agreement, engine, rank_watch, rendezvous, watch_sockets
from higgs_ds.judges import in_run
from higgs_ds.model import flops
from higgs_ds.model.higgs_v2 import reference
from higgs_ds.model.higgs_v2 import upstream as higgs
from higgs_ds.model.higgs_v2.family import HiggsV2
from higgs_ds.report.samples import Sampler
from tests.support.hosts import SHORT_SILENCE_SEC


def _at_step(step: int, action) -> None:
    _at_every_step(action, only=step)


def _at_every_step(action, *, only: int | None = None) -> None:
    original = trainer.Trainer.train_step

    def train_step(self, number, batches, lr):
        if only in (None, number):
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
    original_step, original_sync = trainer.Trainer.train_step, checkpoint.sync

    def train_step(self, number, batches, lr):
        time.sleep(step_seconds)
        return original_step(self, number, batches, lr)

    def sync(path):
        time.sleep(write_seconds)
        original_sync(path)

    trainer.Trainer.train_step, checkpoint.sync = train_step, sync


def minutes_a_step() -> None:
    """A step takes 3 s before its first move, and the watch sees every move as begun 298 s before it was."""
    original = rank_watch.Watch._current_state

    def current_state(self):
        state = original(self)
        return replace(state, no_progress_sec=state.no_progress_sec + 298)

    rank_watch.Watch._current_state = current_state
    slowly(3.0, 0.0)


def quota_from_step(step: int, size: int) -> None:
    """No file may grow beyond `size` bytes."""
    _at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)))


def count_codec_networks() -> None:
    """Says how many networks of Boson's codec were built, and are left, when the base model is to be loaded."""
    original_build, original_load = boson_tokenizer.build_tokenizer, HiggsV2.load_base
    built = []

    def build(*args):
        network = original_build(*args)
        built.append(weakref.ref(network))
        return network

    def load(*args, **options):
        left = sum(network() is not None for network in built)
        print(f"codec networks: {len(built)} built, {left} left", flush=True)
        return original_load(*args, **options)

    boson_tokenizer.build_tokenizer, HiggsV2.load_base = build, load


def count_reads() -> None:
    """Says how many bytes this process reads, those that it maps aside, to find its checkpoint and to open its codec;
    and counts networks."""
    count_codec_networks()

    def wrap(owner, name) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            before = _bytes_read()
            value = original(*args, **kwargs)
            print(f"{name}: {_bytes_read() - before} bytes read", flush=True)
            return value

        setattr(owner, name, call)

    wrap(run_setup, "find_together")
    wrap(data, "_agree_on_fingerprint")
    wrap(data, "CodeCache")


def _bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


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


def killed_in(phase: str, count: int) -> None:
    """kill -9 of this rank the `count`-th time that it begins a phase."""
    global _signal_all
    _signal_all = partial(os.kill, os.getpid(), signal.SIGKILL)
    signal_in(phase, count)


def fails_in(phase: str, count: int) -> None:
    """An error that nobody foresaw, the `count`-th time that this rank begins a phase."""
    global _signal_all
    _signal_all = partial(divmod, 1, 0)
    signal_in(phase, count)


def voice_fails() -> None:
    """The codec cannot decode what the voice speaks."""

    def decode(self, codes):
        raise RuntimeError("no such layer")

    SampleCodec.decode = decode


def judges_hang(call: int, seconds: float) -> None:
    """The judges' process is suspended when it judges for the `call`-th time, counted after the base."""
    in_run.CLIP_SEC = seconds
    original, calls = in_run.RunJudges.judge, []

    def judge(self, *args):
        calls.append(1)
        if len(calls) > call:
            os.kill(self._process.pid, signal.SIGSTOP)
        return original(self, *args)

    in_run.RunJudges.judge = judge


def killed_speaking() -> None:
    """This rank is killed while it speaks, when the others have heard that it does."""

    def generating(self, empty):
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGKILL)

    engine.Engine.generating = generating


def stopped_speaking() -> None:
    """SIGTERM to this rank while it speaks the first clip after a step."""
    original = Sampler.speak
    answer = SampleCodec.decode

    def speak(self, step):
        def decode(codec, codes):
            if step == 1:
                _signal_all()
            return answer(codec, codes)

        SampleCodec.decode = decode
        return original(self, step)

    Sampler.speak = speak


def stuck_workers(how: str, step: int, then: list | None) -> None:
    """Data workers that do not go: suspended in a step, or "lingering" in a thread. `then` is another patch."""
    dataset.WORKERS_END_SEC = 1.0
    if then:
        globals()[then[0]](*then[1:])
    if how == "suspended":
        _at_step(step, lambda: [os.kill(worker.pid, signal.SIGSTOP) for worker in multiprocessing.active_children()])
        return
    begin = dataset._outlive_stop_signals

    def begin_and_linger(worker: int) -> None:
        begin(worker)
        threading.Thread(target=time.sleep, args=[3600]).start()

    dataset._outlive_stop_signals = begin_and_linger


def dead_console() -> None:
    """A closed terminal, or `| tee` that ended by the same Ctrl-C: every write fails."""
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)


def as_on_a_gpu() -> None:
    """A memory check, and the peak of a known card."""
    memory_check.CHECKED_ON = ("cpu",)
    flops.card_name = lambda device: "NVIDIA H100 80GB HBM3"


def out_of_memory(phase: str) -> None:
    """The memory check's forward or backward asks for more than there is."""
    as_on_a_gpu()

    def call(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated …")

    setattr(engine.Engine, phase, call)


def count_exchanges() -> None:
    """Says by which exchanges of host values the ranks meet in each step, logging included."""
    met: list[str] = []
    for name in ("sum", "table", "gather", "each", "barrier"):
        original = getattr(engine.Ranks, name)

        def call(self, *args, name=name, original=original):
            met.append(name)
            return original(self, *args)

        setattr(engine.Ranks, name, call)
    log = trainer.Trainer._log
    _at_every_step(met.clear)

    def _log(self, plan, *args):
        log(self, plan, *args)
        print(f"step {plan.step} met by: {' '.join(met)}", flush=True)

    trainer.Trainer._log = _log


def on_host(name: str, instead: dict[str, str], then: list | None) -> None:
    """Puts this rank on a host of tests/support/hosts.py: network, its name, and other folders in the place of some.

    Waiting that a test would not wait for is cut short. `then` is another patch.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_names = 0x00020000, 0x04000000  # CLONE_NEWNS, CLONE_NEWUTS
    with open(f"/run/netns/{name}") as network:
        assert libc.setns(network.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
    assert libc.unshare(new_mounts | new_names) == 0, os.strerror(ctypes.get_errno())
    socket.sethostname(name)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for place, folder in instead.items():
        subprocess.run(["mount", "--bind", folder, place], check=True)
    agreement.PATIENCE_SEC, rendezvous.REACH_TIMEOUT_SEC = 2.0, 3.0
    watch_sockets.SILENCE_TIMEOUT_SEC = SHORT_SILENCE_SEC
    if then:
        globals()[then[0]](*then[1:])


def code_out_of_range() -> None:
    """Every batch holds a code that no codebook has."""
    original = collate.Collator.__call__

    def call(self, samples, filler=False):
        batch = original(self, samples, filler)
        batch.audio_out_ids[0, 1] = 5000
        return batch

    collate.Collator.__call__ = call


def lost_audio() -> None:
    """The trainer that started this project: audio_out_ids filtered away on the way to the model."""
    original = higgs.HiggsAudioForTraining.forward

    def call(self, *args, **kwargs):
        if "index" in kwargs:
            return original(self, *args, **{**kwargs, "audio_out_ids": None})
        outputs = original(self, *args, **kwargs)
        outputs.audio_logits = outputs.audio_logits[:0] + outputs.audio_logits.sum() * 0
        return outputs

    higgs.HiggsAudioForTraining.forward = call


def lost_audio_from(step: int) -> None:
    """The same, from a step on."""
    _at_step(step, lost_audio)


def unshifted_audio() -> None:
    """Progress t is asked for its own code: the loss falls, and the model is silent."""
    reference.audio_targets = batch_index.audio_targets = lambda label_audio_ids: label_audio_ids.t()


def no_expanded_labels() -> None:
    """Upstream's forward does not say where its labels went."""
    original = higgs.HiggsAudioForTraining.forward

    def call(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        outputs.expanded_labels = None
        return outputs

    higgs.HiggsAudioForTraining.forward = call


PHASES = {
    "join": (torch.distributed, "init_process_group"),
    "load": (HiggsV2, "load_base"),
    "data": (dataset.MicroBatches, "__getitem__"),
    "forward": (engine.Engine, "forward"),
    "backward": (engine.Engine, "backward"),
    "validate": (trainer.Trainer, "evaluate"),
    "save": (engine.Engine, "gather_state"),
    "write": (checkpoint, "sync"),
}
