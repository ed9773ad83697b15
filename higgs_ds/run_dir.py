"""The files of a run's folder, written so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from safetensors import SafetensorError

from .checkpoint import list_checkpoints, step_of
from .distributed.engine import Engine, Ranks
from .errors import ConfigError, reason_of
from .files import check_writable, remove_leftovers, replacing, write_text
from .model.files.adapter_file import write_adapter
from .model.voice_record import VoiceRecord, write_record
from .options.sections import TrainConfig, revision_of
from .process import say
from .report.cards import adapter_card, pinned

RESULTS = ("adapter", "adapter-best")
RUN_FILES = ("config.yaml", "metrics.jsonl", *RESULTS, "checkpoints")
STOPPED = "stopped.json"
# What a run writes there beside its name, and then renames.
REPLACED = (
    *(*RESULTS, "adapter_before_failure", "config.yaml", "ds_config.json", STOPPED, "faults.jsonl", "loss.png"),
    "wandb_run.json",
)


def refuse_a_run(output_dir: Path) -> None:
    """Raises ConfigError for a folder that holds a run, which a fresh one would write over."""
    held = [name for name in RUN_FILES if os.path.exists(output_dir / name)]
    if held:
        raise ConfigError(
            [
                f"--output_dir: {output_dir} holds a run already ({', '.join(held)}); --resume auto goes on with it, "
                "or name another folder"
            ]
        )


def refuse_a_result(output_dir: Path) -> None:
    """Raises ConfigError for a folder with an adapter, where `--resume auto` found no checkpoint to go on from."""
    held = [name for name in RESULTS if os.path.exists(output_dir / name)]
    if held:
        adapter = output_dir / held[0]
        raise ConfigError(
            [
                f"--resume auto: {output_dir} holds {' and '.join(held)}, but no whole checkpoint to go on from, and a "
                f"fresh start would write over it. Name another --output_dir; or another one and --init_adapter "
                f"{adapter}, to train on from there; or move {' and '.join(held)} away, to begin again here"
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


def save_adapter(
    engine: Engine,
    places: list[Path],
    ranks: Ranks,
    details: dict[str, object],
    *,
    layout: str,
    codec: str,
    codec_revision: str | None,
    prompt_style: str,
) -> Path | None:
    """The adapter in PEFT's format, whole under every stage; every rank must call this, rank 0 writes.

    Args:
        places: folders for it; the first that takes it has it, and every other is named as a warning.
        details: lines of the model card.
        layout: of the base, and `codec` with its revision the audio tokenizer, for the card's commands.
        prompt_style: of the speech rows, which `generate` and `reproduce` then take.

    Returns:
        where it is, on every rank; None if no place takes it.

    Raises:
        ValueError: a weight is empty or not finite, so that the file would not hold what was trained.
    """
    weights, lora = engine.gather_trainable(), engine.lora_config
    saved = None
    if ranks.is_main:
        for name, value in weights.items():
            if value.numel() == 0 or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} has shape {tuple(value.shape)} or holds NaN: refusing to write this adapter")
        for folder in places:
            try:
                with replacing(folder) as beside:
                    beside.mkdir(parents=True)
                    write_adapter(beside, lora, weights)
                    write_record(
                        beside, VoiceRecord(prompt_style, {name: str(detail) for name, detail in details.items()})
                    )
                    origin = {"layout": layout, "codec": codec, "codec_revision": codec_revision}
                    card = _model_card(lora, details, folder, **origin)
                    (beside / "README.md").write_text(card, encoding="utf-8")
                saved = folder
                break
            except (OSError, SafetensorError) as error:  # a full disk is the one or the other, by which file it hits
                reason = reason_of(error)
                say(f"WARNING: the adapter could not be written to {folder}: {reason}", error=True)
    return ranks.gather(saved)[0]


def _model_card(lora: LoraConfig, details: dict[str, object], folder: Path, **origin: Any) -> str:
    base, revision = pinned(lora.base_model_name_or_path or "", lora.revision)
    table = {
        "base": f"`{base}`" + (f" at revision `{revision}`" if revision else ""),
        "LoRA rank / alpha / dropout": f"{lora.r} / {lora.lora_alpha:g} / {lora.lora_dropout:g}"
        + (", scaled by the root" if lora.use_rslora else ""),
        "layers": ", ".join(sorted(lora.target_modules or ())),
        **({"trained whole": ", ".join(lora.modules_to_save)} if lora.modules_to_save else {}),
        **details,
    }
    return adapter_card(table, base=base, revision=revision, folder=folder, **origin)
