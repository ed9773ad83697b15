"""One Weights & Biases run, continued by a resumed run.

This is the only file that imports wandb, and it does so only where a run is wanted.

A run's identity is kept in its folder (wandb_run.json), so that a resumed run goes on in the same W&B run. W&B's own
step is the optimizer step; it takes a step once and in order only.

Online the server says which steps it has. Those that it lacks, because a process was killed, are given to it again from
metrics.jsonl; those that it has and that are trained again are not sent.

Offline wandb cannot resume: each start writes a folder of its own, and `wandb sync` puts what a folder holds at the
begin of the run. So a resumed run's new folder is given all steps so far, and the folders before it are moved out of
`wandb sync`'s way: one folder is the run, and may be synced as often as one likes.
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
# Of W&B's page, by the first part of a metric's name; of losses it is a_loss.
SECTIONS = {"eval": "b_speech", "samples": "b_speech", "train": "c_learning", "data": "c_learning", "guard": "d_guard"}
SECTIONS |= {"perf": "e_speed", "memory": "e_speed"}
PROBE_SEC = 5.0  # for the server's answer, a name that does not resolve included
TABLE_PROBE_SEC = 2.0
AUTO_INIT_SEC = 30.0  # for a server that answers but does not open the run
FINISH_SEC = 20.0  # then the server is asked whether it is still there


@dataclass(frozen=True)
class WandbChoice:
    """A run's use of W&B, once the environment was asked."""

    mode: str  # online, offline or disabled
    may_fall_back: bool = False  # to offline, where the server does not open the run
    note: str = ""  # what the user should read


def settle_mode(wandb_mode: str, project: str | None = None) -> WandbChoice:
    """Settles --wandb_mode within seconds: "auto" follows the environment variable WANDB_MODE; without it, it is online
    where an API key is present and the server answers, and offline elsewhere.

    Raises:
        ConfigError: an unknown mode; "online" without an API key or a server; wandb is not installed or does not start;
            a project or id that W&B does not take.
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
    if not has_key:  # wandb would ask for one on the terminal while the other ranks wait
        ways = "run `wandb login`, set WANDB_API_KEY, or use --wandb_mode offline or disabled"
        raise ConfigError([f"--wandb_mode online found no W&B API key; {ways}"])
    if answers(settings.base_url, _proxies(settings), PROBE_SEC):
        return WandbChoice("online", may_fall_back=mode == "auto")
    silent = f"{settings.base_url} does not answer within {PROBE_SEC:.0f} s"
    if mode == "online":
        raise ConfigError([f"--wandb_mode online: {silent}; use --wandb_mode offline or auto"])
    return WandbChoice("offline", note=f"W&B: {silent}: this run is kept offline")


def _proxies(settings) -> dict[str, str]:
    proxies = {"http": settings.http_proxy, "https": settings.https_proxy}
    return {scheme: proxy for scheme, proxy in proxies.items() if proxy}


def answers(url: str, proxies: dict[str, str], within_sec: float) -> bool:
    """True if a server says anything at all at this address."""
    import requests

    heard = threading.Event()

    def ask() -> None:
        with contextlib.suppress(requests.RequestException, OSError, ValueError):
            # Whether its certificate is one that Python knows is wandb's to judge, which reads other settings.
            with contextlib.suppress(requests.exceptions.SSLError):
                options: dict[str, Any] = {"timeout": within_sec, "proxies": proxies or None}
                requests.get(url, allow_redirects=False, stream=True, **options).close()
            heard.set()

    # A thread, because nothing bounds the time that a name takes to be resolved.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(within_sec)
    return heard.is_set()


class WandbRun:
    """One W&B run, online or offline. Every method raises RuntimeError with what to do where W&B fails."""

    def __init__(
        self, output_dir: Path, config: dict, *, run_name: str, project: str | None, choice: WandbChoice, resumed: bool
    ) -> None:
        """`project` None means WANDB_PROJECT, or else "higgs-ds". WANDB_ENTITY and WANDB_RUN_ID are wandb's to read.

        `note` has what the user should read once.
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
                self.mode, self.note = "offline", f"{error}: this run is kept offline"
        if self.mode == "offline":
            with _wandb_errors("start"):
                self._run = self._open(options)
        with _wandb_errors("start"):
            self._run.define_metric("*", step_metric="global_step")
        self._defined: set[str] = set()
        # What the server has of an earlier part; nothing of a folder that is new.
        self._had = self.last_step = self._run.step - 1 if self.mode == "online" else -1
        try:
            identity = {"id": self._run.id, "project": self._run.project}
            write_text(output_dir / IDENTITY_FILE, json.dumps(identity) + "\n")
        except OSError as error:
            self.note += f"{IDENTITY_FILE} cannot be written ({error}): resumed, this will be another W&B run"

    def _open(self, options: dict, *, resume: str | None = None, init_sec: float | None = None):
        settings = self._wandb.Settings(
            console="off",
            quiet=True,
            # The checkout that the user happens to stand in, with its remote and author, is not W&B's business.
            disable_git=True,
            disable_code=True,
            save_code=False,
            # With W&B's own 20 retries a server that cannot be reached holds the process for many minutes at exit.
            x_graphql_retry_max=4,
            **({"init_timeout": init_sec} if init_sec else {}),
        )
        return self._wandb.init(**options, mode=self.mode, settings=settings, resume=resume)

    def is_behind(self, step: int) -> bool:
        """True if this run lacks steps up to this one."""
        return self._resumed and self._had < step

    def has_caught_up(self) -> None:
        """This run has all steps of its earlier parts: offline ones are moved to wandb/earlier-parts."""
        own = Path(self._run.dir).parent
        for folder in self._output_dir.glob(f"wandb/offline-run-*-{self._run.id}"):
            if folder.name != own.name and not folder.is_symlink():
                earlier = folder.parent / EARLIER_PARTS
                earlier.mkdir(exist_ok=True)
                folder.rename(earlier / folder.name)

    def log(self, row: Mapping[str, Any], step: int, *, owed: bool = False) -> None:
        """The metrics of a step, a list as one series a rank; nothing of a step that W&B has from an earlier part.

        `owed`: they are of an earlier part's step, but were never logged; W&B gets them with its next step.
        """
        if step <= self._had:
            if not owed:
                return
            step = self._had + 1
        self.last_step = step
        series = {shown_as(name): value for name, value in _series(row).items()}
        with _wandb_errors("log metrics"):
            for name in series.keys() - self._defined:
                if "/rank/" in name:  # they share one chart, `log_rank_losses`
                    self._run.define_metric(name, step_metric="global_step", hidden=True)
            self._defined |= series.keys()
            self._run.log({"global_step": step, **series}, step=step)

    def takes_tables(self) -> bool:
        """True if a table or a chart can be sent now: wandb asks the server first, and waits minutes for a dead one."""
        return self.mode == "offline" or answers(*self._server, TABLE_PROBE_SEC)

    def log_table(self, name: str, rows: list[dict], step: int) -> None:
        """All rows so far: a W&B table cannot grow once logged, so a new one takes its place."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[_table_cell(row.get(column)) for column in columns] for row in rows]
        with _wandb_errors("log a table"):
            self._log_late(name, self._wandb.Table(columns=columns, data=data, allow_mixed_types=True), step)

    def log_samples(self, told: Spoken, folder: Path, step: int) -> None:
        """A table of what the voice spoke at a step, playable beside the recordings, with the judges' figures."""
        if step <= self._had or not self.takes_tables():
            return

        def sound(path: Path) -> Any:
            return self._wandb.Audio(str(path)) if path.exists() else None

        judged, measures = {line["row"]: line for line in told.lines}, ("heard", "wer", "similarity", "dnsmos")
        shown = [name for name in measures if any(name in line for line in told.lines)]
        rows = [
            [s.text, sound(folder / s.file), sound(folder.parent / RECORDINGS / s.file), s.seconds, s.ended]
            + [judged.get(s.origin, {}).get(name) for name in shown]
            for s in told.samples
            if s.file
        ]
        with _wandb_errors("log samples"):
            columns = ["text", "voice", "recording", "seconds", "ended by itself", *shown]
            self._log_late("samples/voice", self._wandb.Table(columns=columns, data=rows), step)

    def log_rank_losses(self, by_rank: list[tuple[list[int], list[float]]], step: int) -> None:
        """One chart with a line a rank, over (steps, losses) of each; it takes the place of the one before."""
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
        """Logs how things stand rather than what a step was: with the step that W&B is at, if that is later."""
        self.last_step = max(step, self.last_step)
        self._run.log({"global_step": self.last_step, shown_as(name): value}, step=self.last_step)

    def alert(self, title: str, text: str) -> None:
        with _wandb_errors("send an alert"):
            self._run.alert(title, text, level=self._wandb.AlertLevel.WARN)

    def finish(self, exit_code: int) -> None:
        """Waits for what has yet to be uploaded, as long as the server answers."""
        with _wandb_errors("finish"):
            failed: list[Exception] = []
            thread = threading.Thread(target=_keep_error, args=(failed, self._run.finish, exit_code), daemon=True)
            thread.start()
            thread.join(FINISH_SEC)
            while thread.is_alive():
                if not self.takes_tables():
                    # wandb would wait at the process's end too, for hours; `teardown` takes that back before it waits.
                    threading.Thread(target=self._wandb.teardown, args=(exit_code,), daemon=True).start()
                    folder = shlex.quote(str(Path(self._run.dir).parent))
                    later = f"its files are in {folder}" if self._resumed else f"later: wandb sync {folder}"
                    raise ConnectionError(f"{self._server[0]} does not answer; {later}")
                thread.join(FINISH_SEC)
            if failed:
                raise failed[0]

    def where_to_look(self) -> str:
        """The run's address, or how to upload it."""
        if self.mode == "online":
            return f"W&B: {self._run.url}"
        folder = shlex.quote(str(Path(self._run.dir).parent))
        return f"W&B, to upload:  wandb sync {folder}\nW&B, to look at in the terminal:  wandb beta leet {folder}"


def shown_as(name: str) -> str:
    """A metric's name in W&B, which sorts sections by the names' first parts: the sections as one looks at them."""
    first = name.split("/")[0]
    is_loss = first == "rank" or (first in ("train", "eval") and "loss" in name)
    return f"{'a_loss' if is_loss else SECTIONS.get(first, first)}/{name}"


def _keep_error(errors: list[Exception], action, *args) -> None:
    try:
        action(*args)
    except Exception as error:  # whatever wandb raises
        errors.append(error)


def _series(row: Mapping[str, Any]) -> dict[str, float]:
    """`row` with a list, which has a value a rank, as series of its own; of checks those ranks that ever failed one."""
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
    """The content of `wandb_run.json`; {} where it is not there or is no longer what was written."""
    try:
        kept = json.loads((output_dir / IDENTITY_FILE).read_text(encoding="utf-8"))
        return kept if isinstance(kept["id"], str) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _set_up():
    """The module wandb; warnings and errors alone are said, since its notices would break the progress bar."""
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(f"cannot import wandb ({error}); pip install wandb, or --wandb_mode disabled") from error
    with _wandb_errors("start"):
        wandb.setup(settings=wandb.Settings(show_info=False))
    return wandb


@contextlib.contextmanager
def _wandb_errors(action: str) -> Iterator[None]:
    """Says which sink failed and what to do."""
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
