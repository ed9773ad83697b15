"""One Weights & Biases run, continued by a resumed run.

This is the only file that imports wandb, and only if W&B is enabled.

The run's id is stored in its folder (wandb_run.json), so that a resumed run continues the same W&B run. W&B's step is
the optimizer step; W&B accepts each step once, in order.

Online, the server knows its last step. Later steps, lost when a process was killed, are sent again from metrics.jsonl;
steps trained again are not sent twice.

Offline, wandb cannot resume: each start writes its own folder, and `wandb sync` uploads a folder as the start of the
run. A resumed run therefore logs all earlier steps to its new folder and moves the older folders away. One folder then
holds the whole run, and can be synced any number of times.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, reading
from ..files import write_text
from .jsonl import strict
from .redact import redact
from .samples import RECORDINGS, Spoken

WANDB_MODES = ("auto", "online", "offline", "disabled")
DEFAULT_WANDB_PROJECT = "higgs-ds"
IDENTITY_FILE = "wandb_run.json"
EARLIER_PARTS = "earlier-parts"
# W&B's section by the first part of a metric's name; losses are in a_loss.
SECTIONS = {"eval": "b_speech", "samples": "b_speech", "train": "c_learning", "data": "c_learning", "guard": "d_guard"}
SECTIONS |= {"perf": "e_speed", "memory": "e_speed"}
PROBE_SEC = 5.0  # timeout for the server's answer, including name resolution
TABLE_PROBE_SEC = 2.0
AUTO_INIT_SEC = 30.0  # timeout for a server that answers but does not open the run
FINISH_SEC = 20.0  # interval between checks that the server still answers


@dataclass(frozen=True)
class WandbChoice:
    """The settled W&B mode."""

    mode: str  # online, offline or disabled
    may_fall_back: bool = False  # to offline, if the server does not open the run
    note: str = ""  # message for the user


def settle_mode(wandb_mode: str, project: str | None = None) -> WandbChoice:
    """Settles --wandb_mode within seconds.

    "auto" follows the environment variable WANDB_MODE. If that is unset, it means online if there is an API key and the
    server answers, otherwise offline.

    Raises:
        ConfigError: unknown mode; "online" without an API key or a server; wandb is not installed or does not start;
            W&B rejects the project or id.
    """
    mode = wandb_mode
    if wandb_mode == "auto":
        mode = os.environ.get("WANDB_MODE") or "auto"
    if mode not in WANDB_MODES:
        source = "--wandb_mode" if wandb_mode != "auto" else "the environment variable WANDB_MODE"
        raise ConfigError([f"{source} is {mode!r}; use one of {', '.join(WANDB_MODES)}"])
    if mode == "disabled":
        return WandbChoice(mode)
    try:
        wandb = _set_up()
        with reading("--wandb_project"):
            wandb.Settings(project=project)
        if mode == "offline":
            return WandbChoice(mode)
        with _wandb_errors("start"):
            has_key = bool(wandb.api.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
            settings = wandb.setup().settings
    except RuntimeError as error:
        raise ConfigError([str(error)]) from error
    if not has_key and mode == "auto":
        return WandbChoice("offline")
    if not has_key:  # wandb would prompt for one on the terminal while the other ranks wait
        ways = "run `wandb login`, set WANDB_API_KEY, or use --wandb_mode offline or disabled"
        raise ConfigError([f"--wandb_mode online found no W&B API key; {ways}"])
    if answers(settings.base_url, _proxies(settings), PROBE_SEC):
        return WandbChoice("online", may_fall_back=mode == "auto")
    silent = f"{settings.base_url} does not answer within {PROBE_SEC:.0f} s"
    if mode == "online":
        raise ConfigError([f"--wandb_mode online: {silent}; use --wandb_mode offline or auto"])
    return WandbChoice("offline", note=f"W&B: {silent}; this run is logged offline")


def _proxies(settings) -> dict[str, str]:
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    return {scheme: proxy for scheme, proxy in proxies.items() if proxy}


def answers(url: str, proxies: dict[str, str], within_sec: float) -> bool:
    """Checks that a server gives any response at this address."""
    import requests

    heard = threading.Event()

    def ask() -> None:
        with contextlib.suppress(requests.RequestException, OSError, ValueError):
            # An unknown certificate counts as an answer: wandb verifies it with its own settings.
            with contextlib.suppress(requests.exceptions.SSLError):
                options: dict[str, Any] = {"timeout": within_sec, "proxies": proxies or None}
                requests.get(url, allow_redirects=False, stream=True, **options).close()
            heard.set()

    # In a thread, since name resolution has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(within_sec)
    return heard.is_set()


class WandbRun:
    """One W&B run, online or offline. If W&B fails, methods raise RuntimeError with advice."""

    def __init__(
        self, output_dir: Path, config: dict, *, run_name: str, project: str | None, choice: WandbChoice, resumed: bool
    ) -> None:
        """Opens the run; `self.note` then has a message for the user, or "".

        `project` None means WANDB_PROJECT, or else "higgs-ds". wandb itself reads WANDB_ENTITY and WANDB_RUN_ID.
        """
        self._wandb = _set_up()
        self._output_dir = output_dir
        self.mode, self.note = choice.mode, ""
        kept = _read_identity(output_dir) if resumed else {}
        run_id = os.environ.get("WANDB_RUN_ID") or kept.get("id")
        self._resumed = bool(resumed and run_id)
        settings = self._wandb.setup().settings
        self._server = settings.base_url, _proxies(settings)
        options = {
            "project": project or os.environ.get("WANDB_PROJECT") or DEFAULT_WANDB_PROJECT,
            "name": run_name,
            "dir": output_dir,
            "config": redact(config),
            "id": run_id,
        }
        if self.mode == "online":
            try:
                with _wandb_errors("start"):
                    limit = AUTO_INIT_SEC if choice.may_fall_back else None
                    self._run = self._open(options, resume="allow" if self._resumed else None, init_sec=limit)
            except RuntimeError as error:
                if not choice.may_fall_back:
                    raise
                self.mode, self.note = "offline", f"{error}; this run is logged offline"
        if self.mode == "offline":
            with _wandb_errors("start"):
                self._run = self._open(options)
        with _wandb_errors("start"):
            self._run.define_metric("*", step_metric="global_step")
        self._defined: set[str] = set()
        # The last step on the server; a new offline folder has none.
        self._had = self.last_step = self._run.step - 1 if self.mode == "online" else -1
        try:
            identity = {"id": self._run.id, "project": self._run.project}
            write_text(output_dir / IDENTITY_FILE, json.dumps(identity) + "\n")
        except OSError as error:
            self.note += f"cannot write {IDENTITY_FILE} ({error}); if resumed, this run becomes a new W&B run"

    def _open(self, options: dict, *, resume: str | None = None, init_sec: float | None = None):
        settings = self._wandb.Settings(
            console="off",
            quiet=True,
            # Keeps remote and author of the working directory's repository private.
            disable_git=True,
            disable_code=True,
            save_code=False,
            # With W&B's default of 20 retries an unreachable server blocks the exit for many minutes.
            x_graphql_retry_max=4,
            **({"init_timeout": init_sec} if init_sec else {}),
        )
        return self._wandb.init(**options, mode=self.mode, settings=settings, resume=resume)

    def is_behind(self, step: int) -> bool:
        """Checks if steps up to this one are missing in W&B."""
        return self._resumed and self._had < step

    def has_caught_up(self) -> None:
        """Moves the folders of earlier offline parts to wandb/earlier-parts; this run has all their steps."""
        own = Path(self._run.dir).parent
        for folder in self._output_dir.glob(f"wandb/offline-run-*-{self._run.id}"):
            if folder.name != own.name and not folder.is_symlink():
                earlier = folder.parent / EARLIER_PARTS
                earlier.mkdir(exist_ok=True)
                folder.rename(earlier / folder.name)

    def log(self, row: Mapping[str, Any], step: int, *, owed: bool = False) -> None:
        """Logs a step's metrics, a list as one series per rank; skips steps that W&B has from an earlier part.

        `owed` metrics of such a step were never logged; they are logged with W&B's next step.
        """
        if step <= self._had:
            if not owed:
                return
            step = self._had + 1
        self.last_step = step
        series = {shown_as(name): value for name, value in _series(row).items()}
        with _wandb_errors("log metrics"):
            for name in series.keys() - self._defined:
                if "/rank/" in name:  # shown in one chart, see `log_rank_losses`
                    self._run.define_metric(name, step_metric="global_step", hidden=True)
            self._defined |= series.keys()
            self._run.log({"global_step": step, **series}, step=step)

    def takes_tables(self) -> bool:
        """Checks that the server answers: to send a table or chart, wandb waits minutes for a dead one."""
        return self.mode == "offline" or answers(*self._server, TABLE_PROBE_SEC)

    def log_table(self, name: str, rows: list[dict], step: int) -> None:
        """Logs a table of all rows so far; it replaces the previous one, since W&B tables cannot grow."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[_table_cell(row.get(column)) for column in columns] for row in rows]
        with _wandb_errors("log a table"):
            self._log_late(name, self._wandb.Table(columns=columns, data=data, allow_mixed_types=True), step)

    def log_samples(self, spoken: Spoken, folder: Path, step: int) -> None:
        """Logs a table of a step's samples: audio of voice and recording, and the judges' figures."""
        if step <= self._had or not self.takes_tables():
            return

        def sound(path: Path) -> Any:
            return self._wandb.Audio(str(path)) if path.exists() else None

        judged, measures = {line["row"]: line for line in spoken.lines}, ("heard", "wer", "similarity", "dnsmos")
        shown = [name for name in measures if any(name in line for line in spoken.lines)]
        rows = [
            [s.text, sound(folder / s.file), sound(folder.parent / RECORDINGS / s.file), s.seconds, s.ended]
            + [judged.get(s.origin, {}).get(name) for name in shown]
            for s in spoken.samples
            if s.file
        ]
        with _wandb_errors("log samples"):
            columns = ["text", "voice", "recording", "seconds", "ended by itself", *shown]
            self._log_late("samples/voice", self._wandb.Table(columns=columns, data=rows), step)

    def log_rank_losses(self, by_rank: list[tuple[list[int], list[float]]], step: int) -> None:
        """Logs one chart with a line per rank, given as (steps, losses); it replaces the previous one."""
        with _wandb_errors("log a chart"):
            chart = self._wandb.plot.line_series(
                xs=[steps for steps, _ in by_rank],
                ys=[losses for _, losses in by_rank],
                keys=[f"rank {rank}" for rank in range(len(by_rank))],
                title="loss by rank",
                xname="global_step",
                split_table=True,
            )
            self._log_late("rank/losses", chart, step)

    def _log_late(self, name: str, value: Any, step: int) -> None:
        """Logs a value of the whole run, at W&B's current step if that is later than `step`."""
        self.last_step = max(step, self.last_step)
        self._run.log({"global_step": self.last_step, shown_as(name): value}, step=self.last_step)

    def alert(self, title: str, text: str) -> None:
        with _wandb_errors("send an alert"):
            self._run.alert(title, text, level=self._wandb.AlertLevel.WARN)

    def finish(self, exit_code: int) -> None:
        """Ends the run; waits for uploads as long as the server answers."""
        with _wandb_errors("finish"):
            failed: list[Exception] = []
            thread = threading.Thread(target=_keep_error, args=(failed, self._run.finish, exit_code), daemon=True)
            thread.start()
            thread.join(FINISH_SEC)
            while thread.is_alive():
                if not self.takes_tables():
                    # wandb's exit handler would wait for hours as well; `teardown` removes it before it waits itself.
                    threading.Thread(target=self._wandb.teardown, args=(exit_code,), daemon=True).start()
                    folder = shlex.quote(str(Path(self._run.dir).parent))
                    later = f"its files are in {folder}" if self._resumed else f"later: wandb sync {folder}"
                    raise ConnectionError(f"{self._server[0]} does not answer; {later}")
                thread.join(FINISH_SEC)
            if failed:
                raise failed[0]

    def where_to_look(self) -> str:
        """Returns the run's URL, or the commands to upload or view it."""
        if self.mode == "online":
            return f"W&B: {self._run.url}"
        folder = shlex.quote(str(Path(self._run.dir).parent))
        return f"W&B, to upload:  wandb sync {folder}\nW&B, to view in the terminal:  wandb beta leet {folder}"


def shown_as(name: str) -> str:
    """Returns a metric's name in W&B; the prefix puts the sections, which W&B sorts by name, in order of interest."""
    first = name.split("/")[0]
    is_loss = first == "rank" or (first in ("train", "eval") and "loss" in name)
    return f"{'a_loss' if is_loss else SECTIONS.get(first, first)}/{name}"


def _keep_error(errors: list[Exception], action, *args) -> None:
    try:
        action(*args)
    except Exception as error:  # any error of wandb
        errors.append(error)


def _series(row: Mapping[str, Any]) -> dict[str, float]:
    """Splits lists, one value per rank, into one series per rank; guard checks only for ranks with failures."""
    series: dict[str, float] = {}
    for name, value in row.items():
        if not isinstance(value, list):
            series[name] = value
            continue
        section, rest = name.split("/", 1)
        for rank, item in enumerate(value):
            if section == "rank" and item is not None:
                series[f"rank/{rank}/{rest}"] = item
            elif section != "rank" and item:
                series[f"{name}/rank_{rank}"] = item
    return series


def _read_identity(output_dir: Path) -> dict:
    """Reads `wandb_run.json`; {} if it is missing or damaged."""
    try:
        kept = json.loads((output_dir / IDENTITY_FILE).read_text(encoding="utf-8"))
        return kept if isinstance(kept["id"], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _set_up():
    """Imports wandb without its notices, which would break the progress bar; warnings and errors are still shown."""
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(f"cannot import wandb ({error}); pip install wandb, or --wandb_mode disabled") from error
    with _wandb_errors("start"):
        wandb.setup(settings=wandb.Settings(show_info=False))
    return wandb


@contextlib.contextmanager
def _wandb_errors(action: str) -> Iterator[None]:
    """Turns any error into a RuntimeError with advice."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"W&B could not {action} ({type(error).__name__}: {error}); "
            "use --wandb_mode offline to keep the run in output_dir/wandb, or --wandb_mode disabled"
        ) from error


def _table_cell(value: Any) -> Any:
    """Converts a value for a W&B table; lists and dicts become JSON text."""
    value = strict(value)
    return value if isinstance(value, (str, int, float, type(None))) else json.dumps(value)
