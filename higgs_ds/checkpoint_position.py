"""A checkpoint's place in its run, as its `state.json` says it, and a check that any run can stand there."""

from __future__ import annotations

import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from .errors import shown
from .options.sections import OPTIONS, SHAPE_OPTIONS, TRAJECTORY_OPTIONS

NAME = re.compile(r"step-[0-9]+")
# What older runs had, whose checkpoints do not name these options.
OLDER = {"lora_rslora": False, "train_audio_embeddings": False, "train_heads": "none", "base_dtype": None}
READ_OPTIONS = (*SHAPE_OPTIONS, *TRAJECTORY_OPTIONS, "batch_size", "lr_schedule_steps")


@dataclass
class Position:
    """A checkpoint's place in the run; with the seed, that fixes every batch to come."""

    step: int  # optimizer steps done
    epoch: float
    dropped_steps: int
    rows_per_step: int  # of a global batch; 0 where it is cut by a token budget
    num_rows: int
    world_size: int
    config: dict
    adam_steps: int = 0  # updates made; fewer than `step` where steps were dropped
    micro_batches_per_step: int = 0  # of a global batch, over all ranks; 0 in checkpoints that did not count them
    best_step: int = 0  # of the lowest validation loss; 0 before the first validation
    best_loss: float | None = None
    validations_since_best: int = 0
    owes_validation: bool = False  # a stop came before this step's validation
    manifest_rows: list[int] = field(default_factory=list)  # usable ones of each training manifest


class CheckpointError(ValueError):
    """A checkpoint that is incomplete or damaged; says which file and how."""


def step_of(folder: Path) -> int:
    """The number in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def read_position(folder: Path) -> Position:
    """A checkpoint's `state.json`.

    Raises:
        CheckpointError: it cannot be read, or holds a place that no run can stand at.
    """
    state = folder / "state.json"
    try:
        position = Position(**json.loads(state.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{state} cannot be read: {error}") from error
    fault = _fault(position)
    if fault is None and NAME.fullmatch(folder.name) and position.step != step_of(folder):
        fault = f"step is {position.step}, the folder says {step_of(folder)}"
    if fault:
        raise CheckpointError(f"{state}: {fault}")
    return position


def _fault(at: Position) -> str | None:
    """A value that cannot be in it, in words; None where there is none."""
    counts = {
        **{name: getattr(at, name) for name in ("step", "dropped_steps", "rows_per_step", "num_rows", "world_size")},
        **{name: getattr(at, name) for name in ("adam_steps", "micro_batches_per_step", "best_step")},
        "validations_since_best": at.validations_since_best,
    }
    for name, value in counts.items():
        if not _is_count(value, least=name in ("step", "world_size")):
            return f"{name} is {shown(value)}, no count"
    if not isinstance(at.manifest_rows, list) or not all(map(_is_count, at.manifest_rows)):
        return f"manifest_rows is {shown(at.manifest_rows)}, no list of counts"
    if type(at.epoch) not in (int, float) or not 0 <= at.epoch < math.inf:
        return f"epoch is {shown(at.epoch)}, no number from 0 on"
    if at.best_loss is not None and (type(at.best_loss) not in (int, float) or not abs(at.best_loss) < math.inf):
        return f"best_loss is {shown(at.best_loss)}, no number"
    if (at.best_loss is None) != (at.best_step == 0):
        return f"best_loss is {at.best_loss} at best_step {at.best_step}"
    if type(at.owes_validation) is not bool:
        return f"owes_validation is {shown(at.owes_validation)}, neither true nor false"
    if at.adam_steps + at.dropped_steps != at.step:  # a step is an update or is dropped
        return f"{at.adam_steps} updates and {at.dropped_steps} dropped steps in {at.step} steps cannot be"
    if at.best_step > at.step:
        return f"best_step is {at.best_step} after {at.step} steps"
    return _settings_fault(at.config)


def _settings_fault(settings: object) -> str | None:
    """A setting that a run that goes on could not read; what older runs did not write yet may be missing."""
    if not isinstance(settings, dict):
        return f"config is {type(settings).__name__}, not the settings by name"
    missing = [name for name in SHAPE_OPTIONS if name not in settings and name not in OLDER]
    if missing:
        return f"config lacks {', '.join(missing)}"
    for name in [name for name in READ_OPTIONS if name in settings]:
        value, hint = settings[name], OPTIONS[name].hint
        if name == "train_manifest" and isinstance(value, str):  # as older runs wrote it
            continue
        if not _is_of(hint, value):
            return f"config: {name} is {shown(value)}, which no run can have"
    if "warmup_ratio" in settings and settings["warmup_ratio"] is None and settings.get("warmup_steps") is None:
        return "config: warmup_ratio and warmup_steps are both null"
    return None


def _is_count(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**53


def _is_of(hint: object, value: object) -> bool:
    """True if a value of JSON is of an option's type, and a number of any use."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(arm, value) for arm in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(typing.get_args(hint)[0], item) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, float)) and type(value) in (int, hint) and abs(value) < 2.0**64
    return type(value) is hint
