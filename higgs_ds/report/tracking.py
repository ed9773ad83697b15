"""Where a run's numbers go: JSON lines, a plot, the console, and Weights & Biases. Used on rank 0 only.

This is the only file that imports wandb, and it does so only when a W&B run is opened.
"""

import contextlib
import json
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .console import Console
from .curves import History, draw_history, remember
from .jsonl import append_rows, keep_only, rows_until, strict

WANDB_MODES = ("auto", "online", "offline", "disabled")
DEFAULT_WANDB_PROJECT = "higgs-ds"

METRICS_FILE = "metrics.jsonl"
FAILURES_FILE = "guard_failures.jsonl"
PLOT_FILE = "loss.png"

# Both redraw or resend everything so far, so their cost grows with the run.
PLOT_INTERVAL_SEC = 30.0
TABLE_INTERVAL_SEC = 30.0

SECRET_KEY = re.compile(r"api[_-]?key|access[_-]?key|private[_-]?key|secret|password|credential|token$", re.IGNORECASE)
# Keys such as eos_token or audio_out_token name an entry of the vocabulary.
VOCABULARY_KEY = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|text|audio|in|out)_token$", re.IGNORECASE)


def open_tracker(
    output_dir: Path,
    *,
    config: dict,
    total_steps: int,
    run_name: str | None,
    wandb_project: str | None,
    wandb_mode: str,
    first_step: int = 0,
) -> "Tracker":
    """Open every sink of a run. Call it on rank 0 only.

    Args:
        output_dir: receives metrics.jsonl, loss.png, guard_failures.jsonl and wandb/; made if absent.
        config: the resolved config, shown in W&B after `redact`.
        total_steps: optimizer steps of the whole run, those before `first_step` included.
        run_name: shown in W&B and over the plot; None takes the name of `output_dir`.
        wandb_project: None means "higgs-ds".
        wandb_mode: "auto", "online", "offline" or "disabled". "auto" follows the environment variable WANDB_MODE;
            without it, it is online where an API key is present and offline elsewhere.
        first_step: optimizer steps already done. Above 0 the files of `output_dir` are continued and what they hold
            of later steps is dropped; at 0 they are replaced.

    Raises:
        ConfigError: unknown `wandb_mode`; "online" without an API key; wandb is not installed or does not start;
            a metrics.jsonl to continue that is damaged or cannot be read.
    """
    requested_mode = wandb_mode
    if wandb_mode == "auto":
        wandb_mode = os.environ.get("WANDB_MODE", "auto")
    if wandb_mode not in WANDB_MODES:
        source = "--wandb_mode" if wandb_mode == requested_mode else "the environment variable WANDB_MODE"
        raise ConfigError([f"{source} is {wandb_mode!r}; use one of {', '.join(WANDB_MODES)}"])

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    title = run_name or output_dir.resolve().name
    try:
        kept = {name: rows_until(output_dir / name, first_step) for name in (METRICS_FILE, FAILURES_FILE)}
    except (OSError, ValueError) as error:
        raise ConfigError([f"--resume: {error}"]) from None
    # Files are cut last: if W&B does not start, those of an earlier run in output_dir are still whole.
    wandb_run = None
    if wandb_mode != "disabled":
        try:
            wandb_run = _WandbRun(output_dir, config, title, wandb_project or DEFAULT_WANDB_PROJECT, wandb_mode)
        except RuntimeError as error:
            raise ConfigError([str(error)]) from error
    console = Console(total_steps, first_step)
    for name, rows in kept.items():
        keep_only(output_dir / name, rows)
    return Tracker(output_dir, title=title, console=console, wandb_run=wandb_run, first_step=first_step, kept=kept)


class Tracker:
    """The sinks of one run; made by `open_tracker`, used as a context manager.

    A sink that fails (a full disk, a process that died, a network that is gone) says so once, is left out from there on
    and named again at the end. It never ends the run: nothing that a plot or a server does is worth an adapter.

    An exception that leaves the `with` block closes the tracker with exit code 1, SystemExit with its own code.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        title: str,
        console: Console,
        wandb_run: "_WandbRun | None",
        first_step: int,
        kept: dict[str, list[dict]],
    ) -> None:
        """`kept` has the rows of the files of an earlier part of the run, by file."""
        self.metrics_path = output_dir / METRICS_FILE
        self.failures_path = output_dir / FAILURES_FILE
        self.plot_path = output_dir / PLOT_FILE
        self._title = title
        self._console = console
        self._wandb_run = wandb_run
        self._global_step = first_step
        self._history: History = {}
        for row in kept[METRICS_FILE]:
            remember(self._history, row)
        self._failure_rows = kept[FAILURES_FILE]
        self._last_plot_time = -math.inf
        self._last_table_time = -math.inf
        self._table_is_stale = False
        self._closed = False
        self._failed: dict[str, str] = {}  # sinks that are left out, and why

    def _sink(self, name: str, action: Callable[..., object], *args: object) -> None:
        """`action(*args)`, once more a sink that has not failed yet."""
        if name in self._failed:
            return
        try:
            action(*args)
        except Exception as error:  # whatever a sink's library raises
            self._failed[name] = f"{type(error).__name__}: {error}"
            self.message(f"WARNING: {name} failed and is left out from here on: {self._failed[name]}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of optimizer step `step` to every sink.

        The JSONL line is {"global_step", *metrics, "time" in unix seconds}. NaN and infinities are logged as such.

        Raises:
            TypeError: a value is not a Python number, for instance a tensor.
        """
        assert not metrics.keys() & {"global_step", "time"}, "global_step and time are added by the tracker"
        for name, value in metrics.items():
            if not isinstance(value, (int, float)):
                raise TypeError(f"metric {name} is a {type(value).__name__}; log a Python number, e.g. tensor.item()")
        self._global_step = step
        row = {"global_step": step, **metrics, "time": round(time.time(), 3)}
        self._sink(METRICS_FILE, append_rows, self.metrics_path, [row])
        remember(self._history, row)
        if self._wandb_run:
            self._sink("W&B", self._wandb_run.log, {"global_step": step, **metrics})
        has_validation = any(name.startswith("eval/") for name in metrics)
        if has_validation and time.monotonic() - self._last_plot_time >= PLOT_INTERVAL_SEC:
            self._draw()

    def progress(self, step: int, **figures: float | str) -> None:
        """Show that optimizer step `step` is done, with figures such as loss=5.12, lr=1e-4, tok_per_sec=1234.

        A call without figures leaves those of the call before on show.
        """
        self._console.progress(step, figures)

    def message(self, text: str) -> None:
        """Print a line above the progress bar, on stderr."""
        self._console.message(text)

    def alert(self, title: str, text: str) -> None:
        """Print a warning and send it as a W&B alert (mail or Slack, as the user set it up there)."""
        self._console.message(f"ALERT {title}: {text}")
        if self._wandb_run:
            self._sink("W&B", self._wandb_run.alert, title, text)

    def failures(self, rows: list[dict]) -> None:
        """Record failures that the loss guard found; they accumulate over the run.

        Each row becomes a line of guard_failures.jsonl at once, and a row of the W&B table guard/failures within
        30 s or at close. "global_step" is the row's own "step", or else the step last logged.
        """
        rows = [{"global_step": row.get("step", self._global_step), **row} for row in rows]
        self._sink(FAILURES_FILE, append_rows, self.failures_path, rows)
        self._failure_rows += rows
        self._table_is_stale = True
        if time.monotonic() - self._last_table_time >= TABLE_INTERVAL_SEC:
            self._send_failures()

    def close(self, exit_code: int = 0) -> None:
        """Draw the plot, end the progress bar and the W&B run, say where to look. A second call does nothing.

        Args:
            exit_code: shown by W&B; anything but 0 marks the run as failed.
        """
        if self._closed:
            return
        self._closed = True
        self._console.close()
        self._draw()
        self._send_failures()
        if self._wandb_run:
            self._sink("W&B", self._wandb_run.finish, exit_code)
        self._say_where_to_look()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.close(_exit_code(exception))

    def _draw(self) -> None:
        if self._history:
            self._sink(PLOT_FILE, draw_history, self._history, self.plot_path, self._title)
        self._last_plot_time = time.monotonic()

    def _send_failures(self) -> None:
        if self._wandb_run and self._table_is_stale:
            self._sink("W&B", self._wandb_run.log_table, "guard/failures", self._failure_rows, self._global_step)
        self._table_is_stale = False
        self._last_table_time = time.monotonic()

    def _say_where_to_look(self) -> None:
        if self.metrics_path.exists():
            self.message(f"metrics: {self.metrics_path}")
        if self.plot_path.is_file():
            self.message(f"curves: {self.plot_path}")
        if self._failure_rows:
            self.message(f"guard failures: {self.failures_path} ({len(self._failure_rows)} rows)")
        if self._wandb_run:
            self._sink("W&B", lambda: self.message(self._wandb_run.where_to_look()))
        for name, reason in self._failed.items():
            self.message(f"WARNING: {name} failed during the run and is not complete: {reason}")


def redact(config: dict) -> dict:
    """Return a copy of `config` with "[redacted]" for every value whose key names a key, token, secret or password.

    Counts and vocabulary entries (max_tokens_per_batch, text_tokens, eos_token) are kept, as are None and booleans.
    """
    return {key: _redact_value(str(key), value) for key, value in config.items()}


def _redact_value(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redact_value(key, item) for item in value]
    is_secret = SECRET_KEY.search(key) and not VOCABULARY_KEY.search(key)
    return "[redacted]" if is_secret and value is not None and not isinstance(value, bool) else value


def _exit_code(exception: BaseException | None) -> int:
    """What W&B is told of how the run ended: 0, or 1 for an exception, or SystemExit's own code."""
    if exception is None:
        return 0
    if isinstance(exception, SystemExit) and isinstance(exception.code, (int, type(None))):
        return exception.code or 0
    return 1


class _WandbRun:
    """One Weights & Biases run. The mode is "auto", "online" or "offline"."""

    def __init__(self, output_dir: Path, config: dict, run_name: str, project: str, mode: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(f"cannot import wandb ({error}); pip install wandb, or --wandb_mode disabled") from error
        self._wandb = wandb
        with _wandb_errors("start"):
            # Its notices would break the progress bar; warnings and errors are still shown.
            wandb.setup(settings=wandb.Settings(show_info=False))
            has_key = bool(wandb.api.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
        if mode == "auto":
            mode = "online" if has_key else "offline"
        if mode == "online" and not has_key:
            # Without this check wandb would ask for a key on the terminal while the other ranks wait.
            raise ConfigError(
                [
                    "--wandb_mode online found no W&B API key; run `wandb login`, set WANDB_API_KEY, "
                    "or use --wandb_mode offline or disabled"
                ]
            )
        self.mode = mode
        settings = wandb.Settings(
            console="off",
            quiet=True,
            # The checkout that the user happens to stand in, with its remote and author, is not W&B's business.
            disable_git=True,
            disable_code=True,
            save_code=False,
            # With W&B's own 20 retries a server that cannot be reached holds the process for many minutes at exit.
            x_graphql_retry_max=4,
        )
        with _wandb_errors("start"):
            self._run = wandb.init(
                project=project, name=run_name, dir=output_dir, config=redact(config), mode=mode, settings=settings
            )
            self._run.define_metric("*", step_metric="global_step")

    def log(self, row: dict) -> None:
        with _wandb_errors("log metrics"):
            self._run.log(row)

    def log_table(self, name: str, rows: list[dict], step: int) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[_table_cell(row.get(column)) for column in columns] for row in rows]
        with _wandb_errors("log a table"):
            # A W&B table cannot grow once logged, so a new one with all rows takes its place.
            table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
            self._run.log({"global_step": step, name: table})

    def alert(self, title: str, text: str) -> None:
        with _wandb_errors("send an alert"):
            self._run.alert(title, text, level=self._wandb.AlertLevel.WARN)

    def finish(self, exit_code: int) -> None:
        with _wandb_errors("finish"):
            self._run.finish(exit_code=exit_code)

    def where_to_look(self) -> str:
        if self.mode == "online":
            return f"W&B: {self._run.url}"
        run_dir = shlex.quote(str(Path(self._run.dir).parent))
        return f"W&B, to upload:  wandb sync {run_dir}\nW&B, to look at in the terminal:  wandb beta leet {run_dir}"


@contextlib.contextmanager
def _wandb_errors(action: str) -> Iterator[None]:
    """Say which sink failed and what to do. wandb raises its own errors as well as ConnectionError and others."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"W&B could not {action} ({type(error).__name__}: {error}); "
            "use --wandb_mode offline to keep the run in output_dir/wandb, or --wandb_mode disabled"
        ) from error


def _table_cell(value: Any) -> Any:
    """A value that a W&B table holds without conversion; lists and dicts as JSON text."""
    value = strict(value)
    return value if isinstance(value, (str, int, float, type(None))) else json.dumps(value)
