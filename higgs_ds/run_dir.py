"""Files of a run's folder, written atomically."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

import torch
import yaml

from .checkpoint import list_checkpoints, step_of
from .errors import ConfigError, reason_of
from .files import check_writable, remove_leftovers, write_text
from .options.sections import TrainConfig, revision_of
from .report.page import TRAINED_ON

RESULTS = ("adapter", "adapter-best")
RUN_FILES = ("config.yaml", "metrics.jsonl", *RESULTS, "checkpoints")
STOPPED = "stopped.json"
# Files that a run writes under a temporary name and renames.
_OTHER_FILES = ("ds_config.json", TRAINED_ON, STOPPED, "faults.jsonl", "loss.png", "wandb_run.json")
REPLACED = (*RESULTS, "adapter_before_failure", "config.yaml", *_OTHER_FILES)


def refuse_a_run(output_dir: Path) -> None:
    """Raises ConfigError for a folder that holds a run, which a fresh one would overwrite."""
    if held := [name for name in RUN_FILES if os.path.exists(output_dir / name)]:
        found = f"{output_dir} holds a run already ({', '.join(held)})"
        raise ConfigError([f"--output_dir: {found}; --resume auto continues it, or name another folder"])


def refuse_a_result(output_dir: Path) -> None:
    """Raises ConfigError for a folder with an adapter but no checkpoint for `--resume auto`."""
    if held := [name for name in RESULTS if os.path.exists(output_dir / name)]:
        names, adapter = " and ".join(held), output_dir / held[0]
        raise ConfigError(
            [
                f"--resume auto: {output_dir} holds {names}, but no intact checkpoint to continue, and a fresh start "
                f"would overwrite it. Name another --output_dir; or another one and --init_adapter {adapter}, to "
                f"train on from there; or move {names} away, to begin again here"
            ]
        )


def prepare_run_dir(output_dir: Path) -> None:
    """Creates the run's folder. Raises ConfigError if it is not writable, or if `checkpoints` is a file."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_writable(output_dir)
    except OSError as error:
        raise ConfigError([f"--output_dir: {output_dir} cannot be written to: {reason_of(error)}"]) from None
    checkpoints = output_dir / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise ConfigError([f"--output_dir: {checkpoints} is no folder, and a run's checkpoints go there; move it away"])


def lock_run_dir(output_dir: Path, *, wait_sec: float = 60.0) -> contextlib.AbstractContextManager:
    """Locks the folder against a second run; the lock ends with the context or the process.

    Removes temporary files of a killed run. On a file system without locks it has no effect.

    Raises:
        ConfigError: another run holds the lock for `wait_sec`, long enough for the ranks of a killed run to end.
    """
    until = time.monotonic() + wait_sec
    try:
        file = (output_dir / ".lock").open("w")
    except OSError as error:
        raise ConfigError([f"--output_dir: {output_dir}/.lock cannot be opened: {reason_of(error)}"]) from None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in REPLACED:
                remove_leftovers(output_dir / name)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise ConfigError([f"--output_dir: another run is writing to {output_dir}"]) from None
            time.sleep(0.2)
        except OSError:
            file.close()
            return contextlib.nullcontext()


def write_stopped(output_dir: Path, reason: str, exit_code: int, command: str) -> None:
    """Writes `stopped.json`, for queues whose launcher hides the exit code; a resumed run removes it.

    Write errors are ignored: the reason has been printed.

    Args:
        command: the command that resumes the run.
    """
    saved = list_checkpoints(output_dir / "checkpoints")
    step = step_of(saved[-1]) if saved else 0
    details = {"reason": reason, "exit_code": int(exit_code), "saved_step": step, "command": command}
    with contextlib.suppress(OSError):
        write_text(output_dir / STOPPED, json.dumps(details, indent=2, ensure_ascii=False) + "\n")


def forget_stopped(output_dir: Path) -> None:
    """Removes `stopped.json` of an earlier part of the run."""
    with contextlib.suppress(OSError):
        (output_dir / STOPPED).unlink(missing_ok=True)


def write_resolved(output_dir: Path, config: dict, ds_config: dict, trained_on: dict) -> None:
    """Writes `config.yaml` and `ds_config.json`, which can be passed to another run, and `trained_on.json`."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    write_text(
        output_dir / "config.yaml", f"# python train_ds.py --config {output_dir / 'config.yaml'} --output_dir …\n{text}"
    )
    for name, values in (("ds_config.json", ds_config), (TRAINED_ON, trained_on)):
        write_text(output_dir / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def listen_command(config: TrainConfig, adapter: Path, device: torch.device) -> str:
    """The command to hear the adapter."""
    on_cpu = "DS_ACCELERATOR=cpu " if device.type == "cpu" else ""
    named = (
        ("base", config.model.base_ckpt, config.model.base_revision),
        ("codec", config.data.codec, config.data.codec_revision),
    )
    # Pinned revisions are the defaults.
    revisions = [f"--{what}_revision {at} " for what, name, at in named if at not in (None, revision_of(name, None))]
    return (
        f"{on_cpu}python -m higgs_ds generate --base_ckpt {config.model.base_ckpt} --adapter {adapter} "
        f"--codec {config.data.codec} {''.join(revisions)}--text '…' --output_file speech.wav"
    )
