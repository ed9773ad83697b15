"""All that a run leaves: checkpoints, adapters, numbers."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from . import checkpoint, run_dir
from .batching.batch_plan import StepPlan
from .checkpoint import CheckpointWriter
from .distributed.engine import Engine, Ranks
from .files import first_free
from .load_data import Data
from .options.sections import TrainConfig
from .process import loss_text
from .report import wandb_run
from .report.tracking import Tracker, open_tracker
from .report.wandb_run import WandbChoice
from .setup import Setup

if TYPE_CHECKING:
    from .trainer import Trainer


def choose_wandb(config: TrainConfig, ranks: Ranks) -> WandbChoice:
    """Settles how rank 0 will use W&B, within seconds and before anything takes long; the other ranks do not.

    Raises:
        ConfigError: on all ranks; see `wandb_run.settle_mode`.
    """
    choice = ranks.each(
        lambda: (
            wandb_run.settle_mode(config.run.wandb_mode, config.run.wandb_project)
            if ranks.is_main
            else WandbChoice("disabled")
        )
    )
    if choice.note:
        ranks.say(choice.note)
    return choice


class Saver:
    """Everything that a run leaves: checkpoints, adapters, and the tracker's numbers."""

    def __init__(
        self, setup: Setup, data: Data, engine: Engine, ranks: Ranks, wandb: WandbChoice, writer: CheckpointWriter
    ):
        self.setup = setup
        self.data = data
        self.engine = engine
        self.ranks = ranks
        self.wandb = wandb
        self.writer = writer
        self._rescues: dict[str, list[Path]] = {}  # where an adapter goes that its folder does not take

    @classmethod
    def open(cls, setup: Setup, data: Data, engine: Engine, ranks: Ranks, wandb: WandbChoice) -> Saver:
        """For a run's folder, in which checkpoints after the one that is gone on with are set aside.

        Every rank must call it. Raises ConfigError on all ranks.
        """
        writer = CheckpointWriter(
            setup.output_dir / "checkpoints",
            keep_last=setup.config.run.keep_last,
            keep_best=setup.config.run.keep_best,
            lora=engine.lora_config,
        )
        for place in ranks.each(lambda: writer.clean(setup.first_step - 1) if ranks.is_main else []):
            ranks.say(f"checkpoints: not gone on with, kept as {place}")
        return cls(setup, data, engine, ranks, wandb, writer)

    def raise_if_failed(self) -> None:
        """Raises the OSError of a checkpoint that could not be written in the background."""
        self.writer.raise_if_failed()

    def open_tracker(self) -> contextlib.AbstractContextManager[Tracker | None]:
        """Metrics, curves and W&B on rank 0, and the resolved options in the run's folder; None elsewhere."""
        return self.ranks.each(self._open_tracker)

    def _open_tracker(self) -> contextlib.AbstractContextManager[Tracker | None]:
        if not self.ranks.is_main:
            return contextlib.nullcontext(None)
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
            run_dir.write_resolved(self.setup.output_dir, config.as_dict(), self.setup.ds_config)
        except OSError as error:
            tracker.message(f"WARNING: the resolved options are not in the run's folder: {error}")
        return tracker

    def save(self, step: StepPlan, trainer: Trainer) -> None:
        """A checkpoint after this step; every rank must call it."""
        progress = checkpoint.Progress(
            step=step.step,
            epoch=step.epoch,
            dropped_steps=trainer.dropped_steps,
            best_step=trainer.best.step,
            best_loss=trainer.best.loss,
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
        """The run's last step, on the disk when this returns: nothing stands between them; every rank must call it."""
        self.save_last(trainer)
        self.save(step, trainer)
        self.writer.wait()

    def save_adapter(self, name: str, details: dict[str, object], *, elsewhere: bool = True) -> Path | None:
        """The adapter under this name in the run's folder; every rank must call it.

        Args:
            name: of its folder.
            details: lines of its card.
            elsewhere: whether a folder that takes nothing, on a full disk say, makes it go to another; else None
                is returned.

        Raises:
            OSError: no place takes it.
        """
        data, output_dir = self.setup.config.data, self.setup.output_dir
        places = [output_dir / name]
        if elsewhere:
            if name not in self._rescues:  # the same ones when it is saved again
                rescued = f"{output_dir.resolve().name}-{name}"
                self._rescues[name] = [first_free(Path(at) / rescued) for at in (".", tempfile.gettempdir())]
            places += self._rescues[name]
        saved = run_dir.save_adapter(
            *(self.engine, places, self.ranks, details),
            layout=self.setup.base.layout,
            codec=data.codec,
            codec_revision=data.codec_revision,
            prompt_style=data.prompt_style,
        )
        if saved is None and elsewhere:
            raise OSError(f"the adapter could be written nowhere: neither to {', nor to '.join(map(str, places))}")
        return saved

    def save_best(self, step: int, trainer: Trainer) -> None:
        """`adapter-best/`, of the step just validated; every rank must call it."""
        validated = {name: loss for name, loss in trainer.last_losses.items() if name.startswith("validation ")}
        self.save_adapter("adapter-best", self.data.details() | {"optimizer steps": step} | validated, elsewhere=False)

    def save_last(self, trainer: Trainer) -> Path | None:
        """`adapter/`, of the run's last step; every rank must call it."""
        details = self.data.details() | {"optimizer steps": trainer.steps_done} | trainer.last_losses
        if trainer.best.loss is not None:
            details["lowest validation loss"] = f"{loss_text(trainer.best.loss)} at step {trainer.best.step}"
        return self.save_adapter("adapter", details)
