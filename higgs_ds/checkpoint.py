"""Checkpoints of a run: all training state, stored once, independent of ZeRO stage and world size.

`output_dir/checkpoints/step-000500/` holds `adapter/` (PEFT's format, float32), `optimizer.safetensors` (Adam's
moments), `rng.safetensors`, `state.json` and `checksums.json`; nothing is pickled. A checkpoint is written under a
temporary name, synced and renamed, so that a folder with the final name is complete, and checksums prove it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .distributed.engine import Engine, OptimizerState
from .distributed.ranks import Ranks
from .errors import ConfigError, reading, reason_of
from .files import first_free, sha256, stamp, sync, sync_folders
from .model.files.adapter_file import WEIGHTS, same_base, write_adapter
from .model.files.adapter_names import peft_key
from .model.voice_record import VoiceRecord, base_detail, write_record
from .options.sections import OPTIONS, SHAPE_OPTIONS, TRAJECTORY_OPTIONS, TrainConfig
from .process import say

CHECKSUMS = "checksums.json"
TENSOR_FILES = (f"adapter/{WEIGHTS}", "optimizer.safetensors", "rng.safetensors")
LAST_WRITE_SEC = 25.0
NAME = re.compile(r"step-[0-9]+")
# Values of options that did not exist yet when a checkpoint was written.
DEFAULTS = {name: option.field.default for name, option in OPTIONS.items()}


@dataclass
class Progress:
    """A checkpoint's position in the run; with the seed, it determines all later batches."""

    step: int  # optimizer steps done
    epoch: float
    dropped_steps: int
    rows_per_step: int  # of a global batch; 0 with a token budget
    num_rows: int
    world_size: int
    config: dict
    adam_steps: int = 0  # updates made; fewer than `step` where steps were dropped
    micro_batches_per_step: int = 0  # of a global batch, over all ranks
    best_step: int = 0  # 0 before the first evaluation
    best_loss: float | None = None
    best_by: str = "loss"  # --best_by, and the best of that measure
    best_value: float | None = None
    validations_since_best: int = 0
    owes_validation: bool = False  # stopped before this step's validation
    manifest_rows: list[int] = field(default_factory=list)  # usable rows of each training manifest


def step_of(folder: Path) -> int:
    """The number in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


@dataclass
class Checkpoint:
    """A checkpoint whose files match their checksums."""

    folder: Path
    progress: Progress
    state: OptimizerState
    rng: dict[str, torch.Tensor]
    seal: str = ""  # hash of all files; unique to this checkpoint
    stamps: dict[str, tuple] = field(default_factory=dict)  # of its files, when they were verified

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The weights under PEFT's keys."""
        return {peft_key(name): value for name, value in self.state.weights.items()}


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of this process's random generators, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng(rng: dict[str, torch.Tensor], ranks: Ranks, seed: int) -> None:
    """Restores this rank's generators, or seeds them if the checkpoint has none for it (other world size or device)."""
    wanted = {kind: f"{ranks.rank}.{kind}" for kind in ("cpu", ranks.device.type)}
    if not all(key in rng for key in wanted.values()):
        ranks.seed(seed)
        return
    torch.set_rng_state(rng[wanted["cpu"]])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(rng[wanted["cuda"]], ranks.device)


class CheckpointWriter:
    """Writes checkpoints in the background, on rank 0; an error surfaces at the next call."""

    def __init__(self, folder: Path, *, keep_last: int, keep_best: bool, lora: LoraConfig):
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.lora = lora
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def clean(self, steps_done: int) -> list[Path]:
        """Removes incomplete files of a killed run, and renames checkpoints beyond `steps_done` to `left-step-…`.

        Those are damaged, or newer than the one named by `--resume`. Left in place, the next `--resume auto` would take
        them, and rotation would delete this run's checkpoints first. Rank 0 calls this before the first save.

        Returns:
            the new paths of the renamed checkpoints.

        Raises:
            ConfigError: a checkpoint cannot be renamed.
        """
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside = []
        for later in [path for path in list_checkpoints(self.folder) if step_of(path) > steps_done]:
            try:
                aside.append(_put_aside(later))
            except OSError as error:
                raise ConfigError([f"--resume: {later} cannot be put aside: {reason_of(error)}"]) from None
        return aside

    def save(self, progress: Progress, engine: Engine, ranks: Ranks) -> None:
        """Gathers on all ranks, then writes in the background on rank 0; waits for the previous checkpoint first."""
        self.wait()
        put_together = engine.gather_state()
        rng = ranks.gather(rng_state(ranks.device))
        if put_together is not None:
            self._pending = self._pool.submit(lambda: self._write(progress, put_together(), rng))

    def raise_if_failed(self) -> None:
        """Raises the error of a background write that has failed."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            OSError: it could not be written; earlier checkpoints are intact.
        """
        if (pending := self._pending) is not None:
            try:
                pending.result()
            finally:
                self._pending = None  # only now: `finish`, in the watch's thread, needs it

    def finish(self, *_: object) -> None:
        """Like `wait`, but no longer than a queue waits before it kills; for a run that is ending anyway."""
        if (pending := self._pending) is not None:
            pending.result(timeout=LAST_WRITE_SEC)

    def _write(self, progress: Progress, state: OptimizerState, rng: list[dict[str, torch.Tensor]]) -> None:
        progress.adam_steps = state.adam_steps
        name = f"step-{progress.step:06d}"
        beside, final = self.folder / f".{name}.tmp", self.folder / name
        try:
            _make_room(beside)
            (beside / "adapter").mkdir(parents=True)
            write_adapter(beside / "adapter", self.lora, state.weights)
            if style := progress.config.get("prompt_style"):
                record = VoiceRecord(style, base_detail(progress.config.get("base_dtype")))
                write_record(beside / "adapter", record)
            moments = {f"{part}.{key}": value for part in ("exp_avg", "exp_avg_sq")
                       for key, value in getattr(state, part).items()}  # fmt: skip
            save_file(moments, beside / "optimizer.safetensors")
            generators = {f"{rank}.{kind}": value for rank, kinds in enumerate(rng) for kind, value in kinds.items()}
            save_file(generators, beside / "rng.safetensors")
            (beside / "state.json").write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
            files = sorted(path for path in beside.rglob("*") if path.is_file())
            sums = {str(path.relative_to(beside)): sha256(path) for path in files}
            (beside / CHECKSUMS).write_bytes(_sealed(sums))
            for path in (*files, beside / CHECKSUMS):
                sync(path)
            sync_folders(beside / "adapter", beside)
            before = self.folder / f".{name}.before.tmp"
            if (final / CHECKSUMS).is_file() and not final.is_symlink():  # saved again after its validation
                _make_room(before)
                os.replace(final, before)
            elif os.path.lexists(final):
                say(f"WARNING: {final} is no checkpoint of this run; kept as {_put_aside(final)}", error=True)
            os.replace(beside, final)
            sync_folders(self.folder)
            shutil.rmtree(before, ignore_errors=True)
        except (OSError, SafetensorError) as error:  # a full disk is the one or the other, by which file it hits
            shutil.rmtree(beside, ignore_errors=True)
            reason = reason_of(error)
            raise OSError(
                f"checkpoint {name} could not be written to {self.folder}: {reason}; the checkpoints before it are "
                "intact, --resume auto goes on from the last of them once this is mended"
            ) from error
        for old in list_checkpoints(self.folder)[: -self.keep_last]:
            if not (self.keep_best and step_of(old) == progress.best_step):
                shutil.rmtree(old, onerror=_say_not_removed)


def _make_room(path: Path) -> None:
    """Removes a killed run's leftover folder; anything else of that name is renamed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        _put_aside(path)


def _put_aside(path: Path) -> Path:
    """Renames a path to `left-…` and returns the new path."""
    place = first_free(path.with_name(f"left-{path.name.lstrip('.')}"))
    path.rename(place)
    return place


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders named `step-` and digits, by number; incomplete checkpoints have other names.

    Copies under other names (`step-best`) and links belong to the user: "auto" ignores them, rotation keeps them.
    """
    named = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def _say_not_removed(_: object, path: str, error: tuple) -> None:
    say(f"WARNING: {path} of an old checkpoint cannot be removed: {error[1]}", error=True)


def read_checkpoint(folder: Path, proven: dict[str, tuple] | None = None) -> Checkpoint:
    """Reads a checkpoint after verifying the checksum of every file.

    Args:
        proven: `stamps` from another rank; a file with the same stamp here is the same file, already verified.

    Raises:
        ConfigError: naming the file that is missing, cut short or changed.
    """
    with reading(f"--resume: {folder / CHECKSUMS}"):
        content = (folder / CHECKSUMS).read_bytes()
        sums = json.loads(content)["files"]
        if _sealed(sums) != content:
            raise ValueError("damaged: its content has changed")
    stamps = {}
    for name, wanted in sums.items():
        with reading(f"--resume: {folder / name}"):
            stamps[name] = stamp(folder / name)
            if stamps[name] != (proven or {}).get(name) and sha256(folder / name) != wanted:
                raise ValueError("damaged: its checksum differs")
    with reading(f"--resume: {folder}"):
        progress = Progress(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        if NAME.fullmatch(folder.name) and progress.step != step_of(folder):
            raise ValueError(f"renamed: state.json is of step {progress.step}")
        weights, moments, rng = (load_file(folder / name) for name in TENSOR_FILES)
        exp_avg, exp_avg_sq = (
            {key.removeprefix(f"{part}."): value for key, value in moments.items() if key.startswith(f"{part}.")}
            for part in ("exp_avg", "exp_avg_sq")
        )
        weights = {name: weights[peft_key(name)] for name in exp_avg}
    state = OptimizerState(weights, exp_avg, exp_avg_sq, progress.adam_steps)
    return Checkpoint(folder, progress, state, rng, hashlib.sha256(content).hexdigest(), stamps)


def find_checkpoint(resume: str, output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint selected by `--resume`, and a line for each that "auto" skipped.

    Raises:
        ConfigError: the named folder holds no intact checkpoint.
    """
    if resume == "none":
        return None, []
    if resume != "auto":
        return read_checkpoint(Path(resume)), []
    passed_over: list[str] = []
    for folder in reversed(list_checkpoints(output_dir / "checkpoints")):
        try:
            return read_checkpoint(folder), passed_over
        except ConfigError as error:
            passed_over.append(f"{error}; taking the checkpoint before it")
    return None, passed_over


def keep_global_batch(resumed: Checkpoint, config: TrainConfig, world_size: int) -> int:
    """The gradient accumulation that keeps the checkpoint's global batch at this world size.

    Raises:
        ConfigError: there is none, or LoRA's shape differs.
    """
    progress, saved = resumed.progress, DEFAULTS | resumed.progress.config
    problems = [
        f"--resume: --{name} is {config.get(name)}, the checkpoint has {saved[name]}; it cannot change"
        for name in SHAPE_OPTIONS
        if config.get(name) != saved[name]
    ]
    by_tokens = config.optim.max_tokens_per_batch is not None
    if by_tokens:
        global_batch, at_once = progress.micro_batches_per_step, world_size
        sizes = f"{global_batch} micro-batches is no multiple of {world_size} ranks"
    else:
        global_batch, at_once = progress.rows_per_step, (config.optim.batch_size or 1) * world_size
        sizes = f"{global_batch} rows is no multiple of --batch_size {config.optim.batch_size} × {world_size} ranks"
    if by_tokens != (saved["max_tokens_per_batch"] is not None):
        now, then = ("tokens", "rows") if by_tokens else ("rows", "tokens")
        problems.append(
            f"--resume: --max_tokens_per_batch is {config.optim.max_tokens_per_batch}, the checkpoint has "
            f"{saved['max_tokens_per_batch']}; batches sized by {now} cannot continue those sized by {then}"
        )
    elif not global_batch or global_batch % at_once:
        problems.append(f"--resume: the checkpoint's global batch of {sizes}")
    if problems:
        raise ConfigError(problems)
    return global_batch // at_once


def changed_settings(
    resumed: Checkpoint | None, config: dict, num_rows: int, manifest_rows: list[int] | None = None
) -> list[str]:
    """Lists settings that differ from the checkpoint's and change the trajectory."""
    if resumed is None:
        return []
    progress, saved = resumed.progress, DEFAULTS | resumed.progress.config
    changed = [
        f"--{name} is {config[name]}, the checkpoint has {saved[name]}"
        for name in TRAJECTORY_OPTIONS
        if config[name] != saved[name] and not (name == "base_ckpt" and same_base(config[name], saved[name]))
    ]
    if num_rows != progress.num_rows:
        changed.append(f"the manifest has {num_rows} usable rows, the checkpoint's had {progress.num_rows}")
    elif manifest_rows and manifest_rows != progress.manifest_rows:
        changed.append(f"the manifests have {manifest_rows} usable rows, the checkpoint's had {progress.manifest_rows}")
    return [f"WARNING: --resume with another setting: {line}" for line in changed]


def _sealed(sums: dict[str, str]) -> bytes:
    """Content of the checksum file, itself with a checksum, in canonical form."""
    seal = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"files": sums, "seal": seal}, indent=2, sort_keys=True) + "\n").encode()
