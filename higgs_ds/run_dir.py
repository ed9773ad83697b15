"""The files of a run's folder, written atomically."""

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

RESULTS = ("adapter", "adapter-best")
RUN_FILES = ("config.yaml", "metrics.jsonl", *RESULTS, "checkpoints")
STOPPED = "stopped.json"
# What a run writes there beside its name, and then renames.
_OTHER_FILES = ("ds_config.json", STOPPED, "faults.jsonl", "loss.png", "wandb_run.json")
REPLACED = (*RESULTS, "adapter_before_failure", "config.yaml", *_OTHER_FILES)


def refuse_a_run(output_dir: Path) -> None:
    """Raises ConfigError for a folder that holds a run, which a fresh one would write over."""
    if held := [name for name in RUN_FILES if os.path.exists(output_dir / name)]:
        found = f"{output_dir} holds a run already ({', '.join(held)})"
        raise ConfigError([f"--output_dir: {found}; --resume auto goes on with it, or name another folder"])


def refuse_a_result(output_dir: Path) -> None:
    """Raises ConfigError for a folder with an adapter, where `--resume auto` found no checkpoint to go on from."""
    if held := [name for name in RESULTS if os.path.exists(output_dir / name)]:
        names, adapter = " and ".join(held), output_dir / held[0]
        raise ConfigError(
            [
                f"--resume auto: {output_dir} holds {names}, but no intact checkpoint to go on from, and a fresh start "
                f"would write over it. Name another --output_dir; or another one and --init_adapter {adapter}, to "
                f"train on from there; or move {names} away, to begin again here"
            ]
        )


def prepare_run_dir(output_dir: Path) -> None:
    """Makes the run's folder. Raises ConfigError for one that cannot be written to, or that no checkpoint fits in."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_writable(output_dir)
    except OSError as error:
        raise ConfigError([f"--output_dir: {output_dir} cannot be written to: {reason_of(error)}"]) from None
    checkpoints = output_dir / "checkpoints"
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise ConfigError([f"--output_dir: {checkpoints} is no folder, and a run's checkpoints go there; move it away"])


def lock_run_dir(output_dir: Path, *, wait_sec: float = 60.0) -> contextlib.AbstractContextManager:
    """Keeps a second run out of the folder for as long as the context lasts; a killed run lets go of it.

    What a killed run was writing is removed. A context without effect where the file system has no locks.

    Raises:
        ConfigError: another run has had it for `wait_sec`, which is long enough for the ranks of a killed one to end.
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
    """`stopped.json`, for a queue whose launcher does not let the exit code through; a run that goes on removes it.

    A folder that takes nothing any more is left as it is: what ended the run has been said.

    Args:
        command: that goes on with the run.
    """
    saved = list_checkpoints(output_dir / "checkpoints")
    step = step_of(saved[-1]) if saved else 0
    details = {"reason": reason, "exit_code": int(exit_code), "saved_step": step, "command": command}
    with contextlib.suppress(OSError):
        write_text(output_dir / STOPPED, json.dumps(details, indent=2, ensure_ascii=False) + "\n")


def forget_stopped(output_dir: Path) -> None:
    """`stopped.json` is of an earlier part of the run."""
    with contextlib.suppress(OSError):
        (output_dir / STOPPED).unlink(missing_ok=True)


def write_resolved(output_dir: Path, config: dict, ds_config: dict) -> None:
    """`config.yaml` and `ds_config.json`, as the run uses them; both can be given back as flags' files."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    write_text(
        output_dir / "config.yaml", f"# python train_ds.py --config {output_dir / 'config.yaml'} --output_dir …\n{text}"
    )
    write_text(output_dir / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")


def listen_command(config: TrainConfig, adapter: Path, device: torch.device) -> str:
    """The command to hear the adapter."""
    on_cpu = "DS_ACCELERATOR=cpu " if device.type == "cpu" else ""
    named = (
        ("base", config.model.base_ckpt, config.model.base_revision),
        ("codec", config.data.codec, config.data.codec_revision),
    )
    # The pinned ones are what the flags mean anyway.
    revisions = [f"--{what}_revision {at} " for what, name, at in named if at not in (None, revision_of(name, None))]
    return (
        f"{on_cpu}python -m higgs_ds generate --base_ckpt {config.model.base_ckpt} --adapter {adapter} "
        f"--codec {config.data.codec} {''.join(revisions)}--text '…' --output_file speech.wav"
    )
