"""Where a run's numbers and checkpoints go."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from . import checkpoint, run_dir
from .batching.batch_plan import StepPlan
from .checkpoint import CheckpointWriter
from .data import Data
from .distributed.engine import Engine, Ranks
from .report.tracking import Tracker, open_tracker
from .run_setup import Setup


@dataclass
class Sinks:
    """Where a run's numbers and checkpoints go."""

    setup: Setup
    data: Data
    engine: Engine
    ranks: Ranks

    def __post_init__(self):
        self.writer = CheckpointWriter(
            self.setup.output_dir / "checkpoints",
            keep_last=self.setup.config.run.keep_last,
            lora=self.engine.lora_config,
        )
        aside = self.ranks.each(lambda: self.writer.clean(self.setup.first_step - 1) if self.ranks.is_main else [])
        for place in aside:
            self.ranks.say(f"checkpoints: not gone on with, kept as {place}")

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
            wandb_mode=config.run.wandb_mode,
        )
        run_dir.write_resolved(self.setup.output_dir, config.as_dict(), self.setup.ds_config)
        return tracker

    def save(self, step: StepPlan, dropped_steps: int) -> None:
        """A checkpoint after this step; every rank must call it."""
        position = checkpoint.Position(
            step=step.step,
            epoch=step.epoch,
            dropped_steps=dropped_steps,
            rows_per_step=self.data.plan.rows_per_step,
            micro_batches_per_step=self.data.plan.micro_batches_per_step,
            num_rows=len(self.data.corpus.train_rows),
            world_size=self.ranks.world_size,
            config=self.setup.config.as_dict(),
        )
        self.writer.save(position, self.engine, self.ranks)
