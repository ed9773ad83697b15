"""The training loop, over objects built by `run.py`; independent of DeepSpeed and W&B."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .batching.batch_plan import StepPlan
from .batching.collate import Batch
from .distributed.engine import Engine
from .distributed.ranks import Ranks
from .guard import CHECKS, BadLossError, Failure, Guard, checklist
from .loss import HEADLINES, LossWeights, loss_scales
from .process import loss_text, say
from .report.metrics import StepClock, Window, guard_metrics, peak_memory_gib, reserved_memory_gib
from .step_stats import ForwardReport, LabelCounts, MicroBatchStats, RankStep, StepSums

if TYPE_CHECKING:
    from .model.flops import Utilisation
    from .report.samples import Sampler
    from .report.tracking import Tracker
    from .saver import Saver


@dataclass
class StepResult:
    """The outcome of an optimizer step, the same on every rank. With failures, the step was dropped."""

    ranks: list[RankStep]
    failures: list[Failure]
    grad_norm: float = float("nan")

    @property
    def stop(self) -> bool:
        """True if any rank was asked to stop."""
        return any(rank.stop for rank in self.ranks)


@dataclass
class Best:
    """The best step so far, by validation loss or by a judge's figure of its samples."""

    step: int = 0  # 0: none yet
    value: float | None = None
    since: int = 0  # evaluations since then, none better
    by: str = "loss"  # a value of --best_by

    def take(self, step: int, value: float) -> bool:
        """Records an evaluation; returns whether it is the best."""
        sign = -1 if self.by == "similarity" else 1  # higher is better
        better = self.value is None or sign * value < sign * self.value
        self.step, self.value, self.since = (step, value, 0) if better else (self.step, self.value, self.since + 1)
        return better


@dataclass
class Trainer:
    """Runs optimizer steps through the engine, under the guard. `tracker` is rank 0's, None elsewhere."""

    engine: Engine
    ranks: Ranks
    guard: Guard
    weights: LossWeights
    learning_rate: Callable[[int], float]
    on_bad_loss: str
    log_every: int
    total_steps: int
    eval_every: int
    first_step: int = 1
    validation: Callable[[], AbstractContextManager[Iterable[tuple[StepPlan, list[Batch]]]]] | None = None
    tracker: Tracker | None = None
    saver: Saver | None = None  # None: nothing is saved
    sampler: Sampler | None = None  # speaks samples of the voice; None: there are none
    sample_every: int | None = None  # also at validations
    save_every: int | None = None
    save_minutes: float = 0.0  # 0: not by the clock
    keep_best: bool = False
    early_stop: int | None = None  # stop after this many evaluations without improvement
    best: Best = field(default_factory=Best)
    owes_validation: bool = False  # the step before the first was not validated because of a stop
    resumed_from: StepPlan | None = None  # that step
    stop_requested: Callable[[], bool] = lambda: False
    at: Callable[[int, str], None] = lambda step, doing: None  # tells the watch, which finds hanging ranks
    dropped_steps: int = 0
    utilisation: Utilisation | None = None  # for MFU, on a known card
    last_losses: dict[str, float] = field(default_factory=dict)
    _clock: StepClock = field(default_factory=StepClock)
    _saved_at: float = field(default_factory=time.monotonic)
    _window: Window = field(default_factory=Window)
    _save_stall_sec: float | None = None
    _last: StepPlan | None = None
    _unlogged: tuple[StepPlan, StepResult, float] | None = None  # the last step, if not logged yet
    _said: set[str] = field(default_factory=set)
    _checklist_due: bool = True

    def train(self, steps: Iterable[tuple[StepPlan, list[Batch]]]) -> bool:
        """Runs the optimizer steps with validation and saving; False if stopped before the last one.

        The last step is saved before its validation; `save_end` then saves it again with the result, or for the first
        time if nothing is validated.

        Raises:
            BadLossError: on every rank, if a check failed on any rank and `on_bad_loss` is "raise".
        """
        self.engine.train()
        # A resumed run may still have to validate its last step, and may end by that.
        if self.owes_validation:
            if not self._validate(self.first_step - 1):
                return False
            self._speak(self.first_step - 1)
            self._last = self.resumed_from  # if no step follows, its checkpoint must record the validation
        if self.is_over():
            return True
        if self.first_step == 1:
            self._speak(0)  # the base, before training
        self._clock.begin()
        self.at(self.first_step, "reading its batches")
        for plan, batches in steps:
            self._clock.batches_read()
            lr = self.learning_rate(plan.step)
            # The previous checkpoint may still be in writing; if that failed, end the run before more work is at risk.
            if self.saver:
                self.saver.writer.raise_if_failed()
            result = self.train_step(plan.step, batches, lr)
            # A failed check ends the run, or with `on_bad_loss` "skip" drops the step.
            if result.failures:
                self._report(result.failures)
                self.dropped_steps += 1
            self._clock.end()
            # The step is done: log, validate if due, save if due.
            self._log(plan, result, lr)
            self._last = plan
            last = plan.step == self.total_steps
            if self.validation and (last or plan.step % self.eval_every == 0):
                if last and not result.stop and self.saver:
                    self.at(plan.step, "saving")
                    self.owes_validation = True
                    self.saver.save_before_validation(plan, self)
                speaks = self._validate(plan.step, stopped=result.stop)
                if not speaks:
                    self._log_rest()
                    return False
            else:
                due = self.sample_every is not None and (last or plan.step % self.sample_every == 0)
                speaks = due and not result.stop
            if speaks:
                self._speak(plan.step)
                if self.is_over():
                    self._log_rest()
                    return True
            if result.stop or last:
                return last  # saved by `save_end`
            # Save by step count, by rank 0's timer, or as the best: the same decision on all ranks.
            by_count = self.save_every and plan.step % self.save_every == 0
            if self.saver and (by_count or self.best_is(plan.step) or any(rank.save_due for rank in result.ranks)):
                self.at(plan.step, "saving")
                self._log_rest()  # a run resumed from here would not have these steps' metrics
                began = time.perf_counter()
                self.saver.save(plan, self)
                self._saved_at = time.monotonic()
                self._save_stall_sec = time.perf_counter() - began
            self._clock.begin()
            self.at(plan.step + 1, "reading its batches")
        return True

    @property
    def steps_done(self) -> int:
        """Optimizer steps done, of the whole run."""
        return self._last.step if self._last else self.first_step - 1

    def save_end(self) -> None:
        """Saves a checkpoint of the last completed step, if any; every rank must call it."""
        if self.saver and self._last is not None:
            self.at(self._last.step, "saving")
            self.saver.save(self._last, self)

    def is_over(self) -> bool:
        """True once `early_stop` evaluations brought no improvement."""
        return self.early_stop is not None and self.best.since >= self.early_stop

    def best_is(self, step: int) -> bool:
        """True if this step's checkpoint is kept as the best."""
        return self.keep_best and self.best.step == step

    def _validate(self, step: int, *, stopped: bool = False) -> bool:
        """Validates and keeps the best; False if a stop comes first, which leaves it to the resumed run."""
        self.owes_validation = stopped
        if not stopped:
            losses = self.evaluate(step)
            if self.owes_validation:
                return False
            if losses:
                self._evaluated(step, losses)
        return not stopped

    def _evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Keeps this step's adapter if it is the best."""
        value = figures.get(self.best.by)
        if value is not None and self.best.take(step, value) and self.saver and self.keep_best:
            self.at(step, "saving the best adapter")
            self.saver.save_best(step, self)

    def _speak(self, step: int) -> None:
        """Speaks samples with the current voice, if asked for; does not affect training."""
        if self.sampler is None or not self.sampler.is_on:
            return
        self.at(step, "speaking samples")
        spoken = self.sampler.speak(step)
        if self.tracker:
            self.tracker.samples(spoken, step)
        figures = {name.removeprefix("eval/"): value for name, value in spoken.figures.items()}
        self.last_losses |= {f"validation {name} of the samples": value for name, value in figures.items()}
        if step:  # step 0 is the base, which has no adapter
            self._evaluated(step, figures)

    def train_step(self, step: int, batches: list[Batch], lr: float) -> StepResult:
        """Runs one optimizer step over this rank's micro-batches; updates only if no rank reports a failure.

        The ranks exchange host values twice: label counts before the first forward, verdict and logged numbers after
        the last backward.
        """
        # 1. Before any forward: check the batches and count the labels of the whole step.
        self.at(step, "counting labels")
        books = len(self.weights.codebooks)
        sums = StepSums.empty(books)
        failures = [f for i, batch in enumerate(batches) for f in self.guard.check_batch(batch, step, i)]
        # First exchange: label counts, and the verdict on the batches.
        mine = LabelCounts.from_batches(batches, len(failures), books)
        counts = mine.unpack(self.ranks.sum(mine.pack()))
        if counts.failures:
            if self._checklist_due:
                self._checklist_due = False
                say("\n".join(f"FAIL [rank {f.rank}] {f.check}: {f.found}" for f in failures))
            return self._dropped(failures, sums)
        if not counts.text:
            self._say_once("text", f"step {step}: no text label on any rank; its loss is the audio term alone")
        if not any(counts.codebooks):
            self._say_once("audio", f"step {step}: no audio label on any rank; its loss is the text term alone")
        text_scale, scales = loss_scales(self.weights, counts.text, counts.codebooks, self.ranks.world_size)
        codebook_scales = torch.tensor(scales, device=self.ranks.device)

        # 2. Forward and backward of each micro-batch, without reading from the device, so that the host runs ahead.
        on_device: list[torch.Tensor] = []
        reports: list[ForwardReport] = []
        for i, batch in enumerate(batches):
            self.at(step, f"forward of micro-batch {i}")
            inputs = batch.model_inputs(self.ranks.device)
            loss, values, report = self.engine.forward(inputs, text_scale, codebook_scales)
            self.at(step, f"backward of micro-batch {i}")
            self.engine.backward(loss)
            on_device.append(values)
            reports.append(report)
        # 3. Copy the losses to the host once, and check them.
        self.at(step, "checking the losses")
        stats, found = self._check_results(step, batches, reports, on_device, sums)
        failures += found
        if self._checklist_due:
            self._say_checklist(batches[0], reports[0], stats[0], failures)
        # Second exchange: every rank's verdict. A failure anywhere drops the step everywhere.
        ranks = self._exchange(failures, sums)
        if any(rank.failures for rank in ranks):
            self.engine.drop_step()
            return StepResult(ranks, self._all_failures(failures))
        # Gradients in another order than on rank 0 were added to the wrong ones, see `Engine.gradient_order`.
        orders = [rank.gradients for rank in ranks]
        if orders.count(orders[0]) < len(orders):
            self.engine.drop_step()
            return self._dropped(self.guard.check_gradient_order(batches, orders, step), sums)
        self._warn_of_oddities(step, sums)
        # 4. The update; a non-finite norm means that it was skipped.
        self.at(step, "updating the weights")
        grad_norm = self.engine.step(lr)
        if not math.isfinite(grad_norm):
            if self.engine.overflows_by_design:
                self.dropped_steps += 1
            else:
                return self._dropped(self.guard.check_gradient(batches, grad_norm, step), sums)
        return StepResult(ranks, [], grad_norm)

    def _dropped(self, failures: list[Failure], sums: StepSums) -> StepResult:
        """The result of a dropped step; `failures` are this rank's."""
        return StepResult(self._exchange(failures, sums), self._all_failures(failures))

    def _check_results(
        self,
        step: int,
        batches: list[Batch],
        reports: list[ForwardReport],
        on_device: list[torch.Tensor],
        sums: StepSums,
    ) -> tuple[list[MicroBatchStats], list[Failure]]:
        """Reads the results of all forwards of a step, checks them, and adds them to `sums`."""
        empty = MicroBatchStats.empty(len(self.weights.codebooks))
        stats = [empty.unpack(values) for values in torch.stack(on_device).tolist()]  # the only copy to the host
        failures: list[Failure] = []
        for i, (batch, report, of_batch) in enumerate(zip(batches, reports, stats, strict=True)):
            failures += self.guard.check_result(batch, report, of_batch, step, i)
            sums.add(of_batch, tokens=batch.num_tokens, re_expanded=report.path == "re-expanded")
        return stats, failures

    def _exchange(self, failures: list[Failure], sums: StepSums) -> list[RankStep]:
        """Exchanges every rank's share of the step: one collective per step, and another after a failed gradient."""
        mine = RankStep(
            failures=len(failures),
            gradients=self.engine.gradient_order(),
            stop=self.stop_requested(),
            save_due=self.ranks.is_main and 0 < self.save_minutes * 60 <= time.monotonic() - self._saved_at,
            step_sec=self._clock.step_sec(),
            data_sec=self._clock.data_sec,
            peak_gib=peak_memory_gib(self.ranks.device),
            reserved_gib=reserved_memory_gib(self.ranks.device),
            honest_zeros=self.guard.honest_zeros,
            failed=[self.guard.failed[check] for check in CHECKS],
            sums=sums,
        )
        return [mine.unpack(row) for row in self.ranks.table(mine.pack())]

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Mean losses over the validation rows, logged as `eval/*`; every rank runs the same number of forwards.

        Empty if a check failed, or if a rank was asked to stop, which sets `owes_validation`.
        """
        self.engine.train(False)
        books = len(self.weights.codebooks)
        sums = StepSums.empty(books)
        ones = torch.ones(books, device=self.ranks.device)
        failures: list[Failure] = []
        assert self.validation is not None
        with self.validation() as steps:
            for _, batches in steps:
                failures += [f for i, batch in enumerate(batches) for f in self.guard.check_batch(batch, step, i)]
                # Before the forwards, so that all ranks leave the loop together.
                failed, stopped = self.ranks.sum([len(failures), self.stop_requested()])
                self.owes_validation = bool(stopped)
                if failed or stopped:
                    break
                on_device, reports = [], []
                for batch in batches:
                    self.at(step, "validating")
                    _, values, report = self.engine.forward(batch.model_inputs(self.ranks.device), 1.0, ones)
                    on_device.append(values)
                    reports.append(report)
                failures += self._check_results(step, batches, reports, on_device, sums)[1]
        self.engine.train()
        # All ranks' sums and failures.
        table = self.ranks.table([len(failures), *sums.pack()])
        if any(row[0] for row in table):
            self.owes_validation = False
            self._report(self._all_failures(failures))
            return {}
        if self.owes_validation:
            return {}
        total = StepSums.total([sums.unpack(row[1:]) for row in table])
        losses = total.losses(self.weights)
        metrics = {f"eval/{name}": value for name, value in losses.items()}
        self.last_losses |= {f"validation {name}": losses[name] for name in HEADLINES if name in losses}
        if self.tracker:
            self.tracker.log(metrics, step)
            line = "  ".join(f"{name} {loss_text(losses[name])}" for name in HEADLINES if name in losses)
            self.tracker.message(f"step {step}: validation  {line}")
        return losses

    def _all_failures(self, mine: list[Failure]) -> list[Failure]:
        return [failure for part in self.ranks.gather(mine) for failure in part]

    def _report(self, failures: list[Failure]) -> None:
        """Logs failures; raises BadLossError if they end the run."""
        if self.on_bad_loss == "raise":
            self._log_rest()
        if self.tracker:
            self.tracker.failures([failure.as_row() for failure in failures])
            self.tracker.alert(f"loss check failed at step {failures[0].step}", "\n".join(map(str, failures)))
        if self.on_bad_loss == "raise":
            raise BadLossError(failures)

    def _log(self, plan: StepPlan, result: StepResult, lr: float) -> None:
        if not self.tracker:
            return
        if not result.failures:
            self._window.add(result.ranks, result.grad_norm)
        due = plan.step % self.log_every == 0 or plan.step == self.total_steps or result.stop
        if due or result.failures:
            self._log_point(plan, result, lr)
        else:
            self._unlogged = plan, result, lr
            self.tracker.progress(plan.step)

    def _log_rest(self) -> None:
        """Logs steps that no point covers yet, when a run ends between two points."""
        if self._unlogged is not None:
            self._log_point(*self._unlogged)

    def _log_point(self, plan: StepPlan, result: StepResult, lr: float) -> None:
        self._unlogged = None
        if not self.tracker:
            return
        metrics: dict[str, Any] = self._window.take(
            self.weights, learning_rate=lr, epoch=plan.epoch, utilisation=self.utilisation
        )
        if not result.failures:
            metrics |= {f"data/share/{name}": share for name, share in plan.shares.items()}
        if self._save_stall_sec is not None:
            # Time that rank 0 spent in the save after the previous step.
            metrics["perf/save_stall_sec"], self._save_stall_sec = self._save_stall_sec, None
        metrics["train/dropped_steps"] = float(self.dropped_steps)
        metrics |= guard_metrics(result.ranks)
        self.tracker.log(metrics, plan.step)
        # Losses and speed for the progress bar; the last losses for the adapter's card.
        figures = {name: metrics[f"train/{name}"] for name in HEADLINES if f"train/{name}" in metrics}
        self.last_losses |= {f"training {name}": value for name, value in figures.items()}
        if "perf/tokens_per_sec" in metrics:
            figures["tokens_per_sec"] = metrics["perf/tokens_per_sec"]
        if "perf/mfu" in metrics:
            figures["mfu"] = f"{100 * metrics['perf/mfu']:.1f} %"
        self.tracker.progress(plan.step, **figures)

    def _say_once(self, key: str, text: str, *, of_this_rank: bool = False) -> None:
        """Prints a line once per run: on rank 0's console, or as a warning of this rank."""
        if key in self._said:
            return
        self._said.add(key)
        if of_this_rank:
            say(f"WARNING [rank {self.ranks.rank}] {text} (said once)")
        elif self.tracker:
            self.tracker.message(text)

    def _warn_of_oddities(self, step: int, sums: StepSums) -> None:
        if self.guard.honest_zeros:
            text = "a text loss of exactly 0.0 is honest: the margins of all labelled tokens are beyond float32"
            self._say_once("honest zero", f"step {step}: {text}", of_this_rank=True)
        if sums.re_expanded:
            text = "the model returned no expanded_labels; re-expanding them from the batch"
            self._say_once("re-expanded", f"step {step}: {text}", of_this_rank=True)

    def _say_checklist(
        self, batch: Batch, report: ForwardReport, stats: MicroBatchStats, failures: list[Failure]
    ) -> None:
        self._checklist_due = False
        failed = [f for f in failures if f.micro_batch == 0]
        lines = checklist(self.ranks.rank, batch, report, stats.losses(self.weights), failed)
        say("\n".join(f"{'ok  ' if ok else 'FAIL'} {text}" for ok, text in lines))
