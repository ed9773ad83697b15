"""Shared by the tests: a tiny base checkpoint, the sample codec on the shipped speech, and a launcher of real ranks."""

import fcntl
import os
import subprocess
import sys
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
        """Of `train_ds.py`; None leaves one out, a list is several words."""
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
        given = {name: value for name, value in (settings | changes).items() if value is not None}
        words = ((f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in given.items())
        return [str(word) for flag in words for word in flag]

    return flags


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> tuple[Path, str]:
    """The main job as a user starts it, under ZeRO-2, once for all processes of the tests: (folder, output)."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "quickstart"
    log = folder.with_suffix(".log")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            command = ["bash", "launch/quickstart.sh", "--ranks", "2", "--output_dir", folder]
            env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
            env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
            both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            ran = subprocess.run(command, cwd=ROOT, env=env, text=True, timeout=600, **both)
            assert ran.returncode == 0, ran.stdout[-5000:]
            log.write_text(ran.stdout)  # there once it has ended well
    return folder, log.read_text()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Real ranks of `train_ds.py` that start in a second."""
    from tests.support.forks import Forks

    starter = Forks(tmp_path_factory.mktemp("forks"))
    yield starter
    starter.close()
