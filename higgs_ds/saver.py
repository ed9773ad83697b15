"""Save a run: checkpoints, adapters, metrics."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors import SafetensorError

from . import checkpoint, run_dir
from .batching.batch_plan import StepPlan
from .checkpoint import CheckpointWriter
from .distributed.agreement import trained_with
from .distributed.engine import Engine
from .distributed.ranks import Ranks
from .errors import reason_of
from .files import first_free, replacing
from .load_data import Data
from .model.files.adapter_file import write_adapter
from .model.voice_record import VoiceRecord, write_record
from .options.sections import TrainConfig
from .process import loss_text, say
from .report.cards import adapter_card, pinned
from .report.tracking import Tracker, open_tracker
from .report.wandb_run import WandbChoice, settle_mode
from .setup import Setup

if TYPE_CHECKING:
    from .trainer import Trainer


def settle_wandb(config: TrainConfig, ranks: Ranks) -> WandbChoice:
    """Decides rank 0's W&B mode within seconds, before anything slow; other ranks do not use W&B.

    Raises:
        ConfigError: on all ranks; see `settle_mode`.
    """
    choice = ranks.on_main(lambda: settle_mode(config.run.wandb_mode, config.run.wandb_project))
    if choice is None:
        return WandbChoice("disabled")
    if choice.note:
        ranks.say(choice.note)
    return choice


class Saver:
    """Writes a run's checkpoints and adapters, and opens its tracker."""

    def __init__(self, setup: Setup, data: Data, engine: Engine, ranks: Ranks, wandb: WandbChoice):
        """Sets aside checkpoints newer than the resumed one; every rank must call it.

        Raises:
            ConfigError: on all ranks, if one cannot be renamed.
        """
        self.setup = setup
        self.data = data
        self.engine = engine
        self.ranks = ranks
        self.wandb = wandb
        self.writer = CheckpointWriter(
            setup.output_dir / "checkpoints",
            keep_last=setup.config.run.keep_last,
            keep_best=setup.config.run.keep_best,
            lora=engine.lora_config,
        )
        self._rescues: dict[str, list[Path]] = {}  # fallback paths for adapters
        for place in ranks.on_main(lambda: self.writer.clean(setup.first_step - 1)) or []:
            ranks.say(f"checkpoints: not continued, kept as {place}")

    def open_tracker(self) -> contextlib.AbstractContextManager[Tracker | None]:
        """Opens metrics, curves and W&B on rank 0 and writes the resolved options; None on other ranks."""
        return self.ranks.on_main(self._open_tracker) or contextlib.nullcontext()

    def _open_tracker(self) -> Tracker:
        config = self.setup.config
        tracker = open_tracker(
            self.setup.output_dir,
            config=config.as_dict() | {"world_size": self.ranks.world_size, "deepspeed": self.setup.ds_config},
            total_steps=self.data.total_steps,
            first_step=self.setup.first_step - 1,
            run_name=config.run.run_name,
            wandb_project=config.run.wandb_project,
            wandb=self.wandb,
        )
        run_dir.forget_stopped(self.setup.output_dir)
        try:
            trained_on = self.data.details() | trained_with(self.ranks)
            run_dir.write_resolved(self.setup.output_dir, config.as_dict(), self.setup.ds_config, trained_on)
        except OSError as error:
            tracker.message(f"WARNING: the resolved options are not in the run's folder: {error}")
        return tracker

    def save(self, step: StepPlan, trainer: Trainer) -> None:
        """Saves a checkpoint after this step; every rank must call it."""
        progress = checkpoint.Progress(
            step=step.step,
            epoch=step.epoch,
            dropped_steps=trainer.dropped_steps,
            best_step=trainer.best.step,
            best_loss=trainer.best.value if trainer.best.by == "loss" else None,
            best_by=trainer.best.by,
            best_value=trainer.best.value,
            validations_since_best=trainer.best.since,
            owes_validation=trainer.owes_validation,
            rows_per_step=self.data.plan.rows_per_step,
            micro_batches_per_step=self.data.plan.micro_batches_per_step,
            num_rows=len(self.data.corpus.train_rows),
            manifest_rows=self.data.corpus.train_rows.counts,
            world_size=self.ranks.world_size,
            config=self.setup.config.as_dict(),
        )
        self.writer.save(progress, self.engine, self.ranks)

    def save_before_validation(self, step: StepPlan, trainer: Trainer) -> None:
        """Saves adapter and checkpoint of the run's last step and waits for the disk; every rank must call it."""
        self.save_last(trainer)
        self.save(step, trainer)
        self.writer.wait()

    def save_adapter(self, name: str, details: dict[str, object], *, elsewhere: bool = True) -> Path | None:
        """Saves the adapter in PEFT's format under this name in the run's folder; every rank must call it.

        Args:
            details: rows of its card.
            elsewhere: on a write error, such as a full disk, try other folders; otherwise return None.

        Raises:
            OSError: no folder could be written.
            ValueError: a weight is empty or not finite.
        """
        output_dir, weights = self.setup.output_dir, self.engine.gather_trainable()
        places, saved = [output_dir / name], None
        if elsewhere:
            if name not in self._rescues:  # the same paths if it is saved again
                rescued = f"{output_dir.resolve().name}-{name}"
                self._rescues[name] = [first_free(Path(at) / rescued) for at in (".", tempfile.gettempdir())]
            places += self._rescues[name]
        if self.ranks.is_main:
            for key, value in weights.items():
                if value.numel() == 0 or not bool(torch.isfinite(value).all()):
                    raise ValueError(f"{key} is empty or holds NaN: refusing to write this adapter")
            saved = next((place for place in places if self._takes_adapter(place, weights, details)), None)
        saved = self.ranks.gather(saved)[0]
        if saved is None and elsewhere:
            raise OSError(f"the adapter could be written nowhere: neither to {', nor to '.join(map(str, places))}")
        return saved

    def _takes_adapter(self, folder: Path, weights: dict[str, torch.Tensor], details: dict[str, object]) -> bool:
        """Writes adapter, record and card; a write error is a warning and returns False."""
        data, lora = self.setup.config.data, self.engine.lora_config
        origin = {"layout": self.setup.base.layout, "codec": data.codec, "codec_revision": data.codec_revision}
        record = VoiceRecord(data.prompt_style, {name: str(detail) for name, detail in details.items()})
        try:
            with replacing(folder) as beside:
                beside.mkdir(parents=True)
                write_adapter(beside, lora, weights)
                write_record(beside, record)
                (beside / "README.md").write_text(model_card(lora, details, folder, **origin), encoding="utf-8")
        except (OSError, SafetensorError) as error:  # a full disk raises either
            say(f"WARNING: the adapter could not be written to {folder}: {reason_of(error)}", error=True)
            return False
        return True

    def save_best(self, step: int, trainer: Trainer) -> None:
        """Saves `adapter-best/` of the step just validated; every rank must call it."""
        validated = {name: loss for name, loss in trainer.last_losses.items() if name.startswith("validation ")}
        self.save_adapter("adapter-best", self.data.details() | {"optimizer steps": step} | validated, elsewhere=False)

    def save_after_failure(self, trainer: Trainer) -> Path | None:
        """Saves the adapter and a checkpoint from before the failed step; every rank must call it.

        A write error is printed, and the exit code stays the guard's.
        """
        details: dict[str, object] = {"stopped": "by the loss guard, before the failed step was trained"}
        saved = self.save_adapter("adapter_before_failure", details)
        try:
            trainer.save_end()
            self.writer.wait()
        except OSError as failed:
            say(str(failed), error=True)
        return saved

    def save_last(self, trainer: Trainer) -> Path | None:
        """Saves `adapter/` of the run's last step; every rank must call it."""
        details = self.data.details() | {"optimizer steps": trainer.steps_done} | trainer.last_losses
        best = trainer.best
        if best.value is not None:
            name = "lowest validation loss" if best.by == "loss" else f"best {best.by} of the samples"
            details[name] = f"{loss_text(best.value)} at step {best.step}"
        return self.save_adapter("adapter", details)


def model_card(lora: LoraConfig, details: dict[str, object], folder: Path, **origin: str | None) -> str:
    """An adapter's README.md; `origin` is passed on to `adapter_card`."""
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
