"""Shared by the tests: a tiny base checkpoint, the sample codec on the shipped speech, and a launcher of real ranks."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from higgs_ds.model.higgs_v2.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[1]
SPEECH = ROOT / "examples" / "speech" / "manifest.jsonl"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A base checkpoint small enough for unit tests: hidden 64, 2 layers."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, seed=0, hidden_size=64, num_layers=2)
    return folder


@pytest.fixture(scope="session")
def codec_dir(tmp_path_factory) -> Path:
    """The sample codec, fitted on the shipped speech."""
    from higgs_ds.codec.sample import SampleCodec
    from higgs_ds.data.audio import read_audio
    from higgs_ds.data.manifest import read_manifest

    rows, faults = read_manifest(SPEECH)
    assert not faults
    folder = tmp_path_factory.mktemp("codec")
    SampleCodec.fit([read_audio(ref) for row in rows for _, ref in row.audio_refs]).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_dir):
    from higgs_ds.model.higgs_v2.config import read_checkpoint_config

    return read_checkpoint_config(tiny_dir)


@pytest.fixture(scope="session")
def tokenizer(tiny_dir):
    from higgs_ds.model.base import load_tokenizer

    return load_tokenizer(tiny_dir)


@pytest.fixture(scope="session")
def flags_of(tiny_dir, codec_dir):
    def flags(output_dir, **changes) -> list[str]:
        settings = {
            "train_manifest": SPEECH,
            "base_ckpt": tiny_dir,
            "codec": codec_dir,
            "output_dir": output_dir,
            "num_workers": 0,
            "wandb_mode": "disabled",
            "batch_size": 2,
            "lora_r": 8,
            "lr": 1e-2,
            "epochs": 10,
        }
        return [str(word) for name, value in (settings | changes).items() for word in (f"--{name}", value)]

    return flags


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all processes that the tests are divided among."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def quickstart_of(shared_folder):
    """The main job as a user starts it, once a ZeRO stage, whichever process needs it: stage -> (folder, output)."""

    def run(stage: int) -> tuple[Path, str]:
        folder = shared_folder / "quickstart" / f"stage{stage}"
        log = folder.with_suffix(".log")
        folder.parent.mkdir(exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not log.exists():
                run_quickstart(stage, folder, log)
        return folder, log.read_text()

    return run


def run_quickstart(stage: int, folder: Path, log: Path) -> None:
    """The log, with the seconds it took as its last line, is there once it has ended well."""
    command = ["bash", "launch/quickstart.sh", "--ranks", "2", "--stage", str(stage), "--output_dir", folder]
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
    started = time.monotonic()
    ran = subprocess.run(
        command, cwd=ROOT, env=env, text=True, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
    log.write_text(f"{ran.stdout}main job: {time.monotonic() - started:.0f} s\n")


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Real ranks of `train_ds.py` that start in a second."""
    from tests.support.forks import Forks

    starter = Forks(tmp_path_factory.mktemp("forks"))
    yield starter
    starter.close()
