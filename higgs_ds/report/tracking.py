"""Sinks of a run's metrics: JSONL files, a plot, the console, and Weights & Biases. Used on rank 0 only."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, first_of, reading
from .console import Console
from .curves import draw_history
from .history import RESUMED, History
from .jsonl import Kept, append_rows, cut, read_rows, rows_until
from .page import PAGE, read_run, write_page
from .samples import FOLDER, Spoken, folder_of, write_lists
from .wandb_run import WandbChoice, WandbRun

METRICS_FILE = "metrics.jsonl"
FAILURES_FILE = "guard_failures.jsonl"
PLOT_FILE = "loss.png"
VALIDATED, JUDGED = "eval/loss", "eval/stops"  # metrics present in every validation, and in all judged samples

FIRST_PLOT_SEC = 10.0
PLOT_INTERVAL_SEC = 30.0
PLOTS_SHARE = 1 / 200  # largest share of the run's time spent on plots
# Tables and charts are sent whole each time, so they cost more as the run goes on.
TABLE_INTERVAL_SEC = 30.0
TABLE_ROWS = 1000  # newest failures in the table
CATCH_UP_VALUES = 500_000  # sent again to W&B by a resumed run, in about ten seconds
FIRST_CHART_SEC, CHART_GROWTH = 60.0, 1.5


def open_tracker(
    output_dir: Path,
    *,
    config: dict,
    total_steps: int,
    run_name: str | None,
    wandb_project: str | None,
    wandb: WandbChoice,
    first_step: int = 0,
) -> Tracker:
    """Opens every sink of a run.

    Args:
        output_dir: folder for metrics.jsonl, loss.png, guard_failures.jsonl, wandb/ and wandb_run.json; created if
            missing.
        config: resolved config, shown in W&B after `redact`.
        total_steps: optimizer steps of the whole run, including those before `first_step`.
        run_name: title in W&B and of the plot; None means WANDB_NAME, or else the name of `output_dir`.
        wandb_project: None means WANDB_PROJECT, or else "higgs-ds".
        first_step: optimizer steps already done. If above 0, the files of `output_dir` and the W&B run are continued,
            and rows of later steps are dropped from the files. At 0 they are replaced.

    Raises:
        ConfigError: wandb does not start and --wandb_mode is online; the metrics.jsonl to continue is damaged or
            cannot be read.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    title = run_name or os.environ.get("WANDB_NAME") or output_dir.resolve().name
    earlier = Earlier(first_step)
    with reading("--resume"):
        for row in rows_until(output_dir / METRICS_FILE, first_step, earlier.metrics):
            earlier.history.add(row)
            earlier.evaluated |= dict.fromkeys(earlier.evaluated.keys() & row.keys(), row["global_step"])
        earlier.failure_rows.extend(rows_until(output_dir / FAILURES_FILE, first_step, earlier.failures))
    # Files are truncated last, so that an earlier run's stay intact if W&B does not start.
    wandb_run, no_wandb = None, ""
    if wandb.mode != "disabled":
        try:
            wandb_run = WandbRun(
                output_dir, config, run_name=title, project=wandb_project, choice=wandb, resumed=first_step > 0
            )
        except RuntimeError as error:
            if wandb.mode == "online" and not wandb.may_fall_back:
                raise ConfigError([str(error)]) from error
            no_wandb = str(error)
    tracker = Tracker(output_dir, title, Console(total_steps, first_step), wandb_run, earlier)
    if no_wandb:
        tracker.leave_out("W&B", no_wandb)
    return tracker


@dataclass
class Earlier:
    """The part of a run before this start, read from its files."""

    first_step: int
    history: History = field(default_factory=History)
    failure_rows: deque[dict] = field(default_factory=lambda: deque(maxlen=TABLE_ROWS))
    evaluated: dict[str, int] = field(default_factory=lambda: {VALIDATED: -1, JUDGED: -1})  # last step by metric
    metrics: Kept = field(default_factory=Kept)
    failures: Kept = field(default_factory=Kept)


class Tracker:
    """Sinks of one run; made by `open_tracker`, used as a context manager.

    A sink that fails (full disk, dead process, lost network) never ends the run. The failure is reported, the sink is
    disabled, and a message at the end names it again.

    An exception from the `with` block closes the tracker with exit code 1, SystemExit with its own code.
    """

    def __init__(self, output_dir: Path, title: str, console: Console, wandb_run: WandbRun | None, earlier: Earlier):
        """Truncates the files to the earlier part, and sends W&B the steps missing there."""
        self.metrics_path = output_dir / METRICS_FILE
        self.failures_path = output_dir / FAILURES_FILE
        self.plot_path = output_dir / PLOT_FILE
        self._title = title
        self._console = console
        self._wandb_run = wandb_run
        self._first_step = self._global_step = earlier.first_step
        self._mark_resume = earlier.first_step > 0
        self._evaluated = earlier.evaluated
        self._history = earlier.history
        self._failure_rows = earlier.failure_rows
        now = time.monotonic()
        self._drawn = False
        self._next_plot_time = now + FIRST_PLOT_SEC
        self._chart_after_sec = FIRST_CHART_SEC
        self._next_chart_time = now + FIRST_CHART_SEC
        self._last_table_time = -math.inf
        self._table_is_stale = False
        self._closed = False
        self._failed: dict[str, str] = {}  # reason by disabled sink
        self._sink(METRICS_FILE, cut, self.metrics_path, earlier.metrics.end)
        self._sink(FAILURES_FILE, cut, self.failures_path, earlier.failures.end)
        if wandb_run and wandb_run.note:
            self.message(wandb_run.note)
        if wandb_run and wandb_run.is_behind(self._first_step):
            self._sink("W&B", self._catch_up, wandb_run, earlier.metrics.rows)

    def _catch_up(self, wandb_run: WandbRun, rows: int) -> None:
        """Sends W&B the missing steps; of very many, all evaluations and every n-th other row."""
        stride = 1
        for number, row in enumerate(read_rows(self.metrics_path)):
            if number == 0:
                values = sum(len(value) if isinstance(value, list) else 1 for value in row.values())
                stride = math.ceil(rows * values / CATCH_UP_VALUES)
            step = row.pop("global_step")
            if number % stride == 0 or any(name.startswith("eval/") for name in row):
                metrics = {name: value for name, value in row.items() if name not in (RESUMED, "time")}
                wandb_run.log(metrics, step)
        wandb_run.has_caught_up()

    def _sink(self, name: str, action: Callable[..., object], *args: object) -> None:
        """Calls `action(*args)` unless the sink is disabled, and disables it on failure."""
        if name in self._failed:
            return
        try:
            action(*args)
        except Exception as error:  # any error of the sink's library
            self.leave_out(name, f"{type(error).__name__}: {error}")

    def leave_out(self, name: str, reason: str) -> None:
        """Disables a failed sink and prints a warning, repeated at the end of the run."""
        self._failed[name] = reason
        self.message(f"WARNING: {name} failed and is disabled for the rest of the run: {reason}")

    def log(self, metrics: Mapping[str, float | list], step: int) -> None:
        """Sends metrics to every sink: those of optimizer step `step`, or over the steps since the last call.

        The JSONL line is {"global_step", *metrics, "time" in unix seconds}. The first line of a resumed run also has
        "resumed_after", the step it continues from. A list has one value per rank, None for a rank without one.
        """
        # Already logged by an earlier part, killed between this evaluation and its checkpoint.
        if any(step <= last for name, last in self._evaluated.items() if name in metrics):
            return
        self._global_step = step
        row = {"global_step": step, **metrics}
        if self._mark_resume:
            row[RESUMED], self._mark_resume = self._first_step, False
        row["time"] = round(time.time(), 3)
        self._sink(METRICS_FILE, append_rows, self.metrics_path, [row])
        self._history.add(row)
        wandb_run = self._wandb_run
        if wandb_run:
            # A run resumed after `first_step` may repeat that step's interrupted validation.
            owed = step == self._first_step
            self._sink("W&B", lambda: wandb_run.log(metrics, step, owed=owed))
        now = time.monotonic()
        if now >= self._next_plot_time:
            self._draw()
        if now >= self._next_chart_time:
            self._send_rank_losses()

    def progress(self, step: int, **figures: float | str) -> None:
        """Shows that optimizer step `step` is done; without figures the previous ones stay visible."""
        self._console.progress(step, figures)

    def message(self, text: str) -> None:
        """Prints a line above the progress bar, on stderr."""
        self._console.message(text)

    def alert(self, title: str, text: str) -> None:
        """Prints a warning and sends it as a W&B alert (mail or Slack, by the user's settings there)."""
        self._console.message(f"ALERT {title}: {text}")
        if self._wandb_run:
            self._sink("W&B", self._wandb_run.alert, title, text)

    def failures(self, rows: list[dict]) -> None:
        """Records failures of the loss guard; a row without "step" gets the last logged step.

        Rows are appended to guard_failures.jsonl at once, and to W&B's table guard/failures within 30 s.
        """
        rows = [{"global_step": row.get("step", self._global_step), **row} for row in rows]
        self._sink(FAILURES_FILE, append_rows, self.failures_path, rows)
        self._failure_rows += rows
        self._table_is_stale = True
        if time.monotonic() - self._last_table_time >= TABLE_INTERVAL_SEC:
            self._send_failures()

    def samples(self, spoken: Spoken, step: int) -> None:
        """Records and prints a step's samples and the judges' results; W&B gets a table with audio."""
        samples = spoken.samples
        problems = [f"{sample.name}: {sample.problem}" for sample in samples if sample.problem]
        count = sum(sample.file is not None for sample in samples)
        ended = sum(sample.ended for sample in samples if sample.file)
        folder = folder_of(self.metrics_path.parent / FOLDER, step)
        if samples:
            self._sink("samples", write_lists, spoken, folder)
            about = f"{ended} ended by the model; {spoken.seconds:.1f} s"
            self.message(f"step {step}: {count} samples in {folder} ({about})")
        if problems:
            self.message("\n".join(f"WARNING: sample {problem}" for problem in first_of(problems)))
        if spoken.lines:
            figures = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in spoken.figures.items())
            self.message(f"step {step}: samples judged  {figures}  ({spoken.judging_sec:.1f} s)")
            errors = [f"{line['file']}: {why}" for line in spoken.lines for why in line.get("failed", {}).values()]
            if errors:
                self.message("\n".join(f"WARNING: judging {error}" for error in first_of(errors)))
        for judge, reason in spoken.failed.items():
            if (name := "judging" if judge == "all" else f"judging of {judge}") not in self._failed:
                self.leave_out(name, reason)
        if spoken.figures:
            self.log(spoken.figures, step)
        if self._wandb_run and count and step > self._evaluated[JUDGED if spoken.figures else VALIDATED]:
            self._sink("W&B", self._wandb_run.log_samples, spoken, folder, step)

    def close(self, exit_code: int = 0) -> None:
        """Draws the plot, ends progress bar and W&B run, prints the paths of outputs. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._console.close()
        self._draw()
        self._send_rank_losses()
        self._send_failures()
        self._sink(PAGE, self._write_page)
        if self._wandb_run:
            self._sink("W&B", self._wandb_run.finish, exit_code)
        self._say_where_to_look()

    def _write_page(self) -> None:
        """Writes report.html from the files in the run's folder."""
        if self.metrics_path.exists():
            write_page([read_run(self.metrics_path.parent)], self.metrics_path.parent / PAGE)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if isinstance(exception, SystemExit) and isinstance(exception.code, (int, type(None))):
            self.close(exception.code or 0)
        else:
            self.close(0 if exception is None else 1)

    def _draw(self) -> None:
        began = time.monotonic()
        if self._history:
            self._sink(PLOT_FILE, draw_history, self._history, self.plot_path, self._title)
        now = time.monotonic()
        took = now - began if self._drawn else 0.0  # the first plot also imports matplotlib
        self._drawn = True
        self._next_plot_time = now + max(PLOT_INTERVAL_SEC, took / PLOTS_SHARE)

    def _send_rank_losses(self) -> None:
        by_rank = self._history.rank_losses()
        if self._wandb_run and len(by_rank) > 1 and self._wandb_run.takes_tables():
            self._sink("W&B's chart of rank losses", self._wandb_run.log_rank_losses, by_rank, self._global_step)
        self._chart_after_sec *= CHART_GROWTH
        self._next_chart_time = time.monotonic() + self._chart_after_sec

    def _send_failures(self) -> None:
        if self._wandb_run and self._table_is_stale and self._wandb_run.takes_tables():
            rows = list(self._failure_rows)
            self._sink("W&B's table of failures", self._wandb_run.log_table, "guard/failures", rows, self._global_step)
            self._table_is_stale = False
        self._last_table_time = time.monotonic()

    def _say_where_to_look(self) -> None:
        if self.metrics_path.exists():
            self.message(f"metrics: {self.metrics_path}")
        if self.plot_path.is_file():
            self.message(f"curves: {self.plot_path}")
        page = self.metrics_path.parent / PAGE
        if page.is_file():
            self.message(f"page: {page}")
        if self._failure_rows:
            self.message(f"guard failures: {self.failures_path} ({len(self._failure_rows)} rows)")
        wandb_run = self._wandb_run
        if wandb_run:
            self._sink("W&B", lambda: self.message(wandb_run.where_to_look()))
        for name, reason in self._failed.items():
            self.message(f"WARNING: {name} failed during the run and is incomplete: {reason}")
