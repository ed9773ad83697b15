"""A run, or several, as one HTML file that opens without a network: settings, curves, guard, clips to play.

Curves are plotly's. Whatever comes from a run's files is data to the page: text is escaped, numbers travel as JSON, and
the page's own policy (Content-Security-Policy) allows no request to anywhere.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
import yaml

from ..errors import reading
from ..files import write_text
from .history import NUM_CODEBOOKS, Series
from .jsonl import read_rows
from .samples import FOLDER, LIST, RECORDINGS

PAGE, METRICS, RANK_LOSS = "report.html", "metrics.jsonl", "rank/loss"
MOST_CLIPS = 160  # about 3 MB of MP3
LONGEST_CLIP_SEC = 30.0
COLOURS = ("#c8550a", "#1f77b4", "#2a7f3f", "#8450a8", "#b8860b", "#444444")

CODEBOOKS = tuple((f"train/codebook_loss/{k}", str(k)) for k in range(NUM_CODEBOOKS))

# Charts of a section: heading, unit of the y axis, and the metrics with their names in the legend.
Chart = tuple[str, str, tuple[tuple[str, str], ...]]
SECTIONS: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "Loss",
        (
            ("Audio loss", "nats", (("train/audio_loss", "train"), ("eval/audio_loss", "validation"))),
            ("Text loss", "nats", (("train/text_loss", "train"), ("eval/text_loss", "validation"))),
            (
                "Audio loss by codebook",
                "nats",
                tuple((f"train/codebook_loss/{k}", str(k)) for k in range(NUM_CODEBOOKS)),
            ),
            ("Loss of each rank: lowest and highest", "nats", (("rank/lowest", "lowest"), ("rank/highest", "highest"))),
        ),
    ),
    (
        "Learning",
        (
            ("Gradient norm", "", (("train/grad_norm", "gradient norm"),)),
            ("Learning rate", "", (("train/learning_rate", "learning rate"),)),
        ),
    ),
    (
        "Speed and memory",
        (
            ("Tokens per second", "", (("perf/tokens_per_sec", "tokens per second"),)),
            ("Step and data time", "s", (("perf/step_sec", "step"), ("perf/data_sec", "waiting for data"))),
            (
                "Peak memory of the fullest rank",
                "GiB",
                (("memory/peak_gib", "peak"), ("memory/reserved_gib", "reserved")),
            ),
        ),
    ),
)
WANTED = {metric for _, charts in SECTIONS for _, _, lines in charts for metric, _ in lines}


@dataclass
class Run:
    """The files of one `--output_dir`, as far as the page shows them."""

    name: str
    series: dict[str, Series]
    last: dict[str, Any]  # the newest value of every metric
    settings: dict[str, Any]
    failures: list[dict] = field(default_factory=list)
    stopped: dict[str, Any] = field(default_factory=dict)
    clips: list[dict[str, str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)  # a text each, with its clips by step
    clips_left_out: int = 0

    @property
    def summary(self) -> dict[str, str]:
        """The first lines that a reader wants: how far the run came, its losses, whether every loss was real."""
        last = self.last
        lines = {"steps": f"{last.get('global_step', 0):,}"}
        for name in ("train/loss", "train/audio_loss", "eval/loss", "eval/audio_loss"):
            if name in last:
                lines[name] = f"{float(last[name]):.4f}"
        best = min((v for v in self.series["eval/loss"].points()[1] if math.isfinite(v)), default=None)
        if best is not None:
            lines["lowest validation loss"] = f"{best:.4f}"
        lines["failed loss checks"] = f"{int(last.get('guard/failed_checks', 0)):,}"
        if "perf/tokens_per_sec" in last:
            lines["tokens per second"] = f"{float(last['perf/tokens_per_sec']):,.0f}"
        if self.stopped:
            lines["stopped"] = str(self.stopped.get("reason", ""))
        return lines


def read_run(folder: Path, clips: int = MOST_CLIPS) -> Run:
    """Reads a run's folder; a training that still goes on is shown as far as it is.

    Args:
        clips: at most so many are embedded, the worst first.

    Raises:
        ConfigError: no metrics.jsonl, or a file that is damaged.
    """
    series = {name: Series() for name in WANTED | {"eval/loss"}}
    last: dict[str, Any] = {}
    with reading(str(folder)):
        for row in read_rows(folder / METRICS):
            last |= row
            losses = [float(loss) for loss in row.get(RANK_LOSS, ()) if loss is not None]
            if losses:
                row |= {"rank/lowest": min(losses), "rank/highest": max(losses)}
            for name in series.keys() & row.keys():
                series[name].add(row["global_step"], float(row[name]))
        settings = folder / "config.yaml"
        run = Run(
            os.path.basename(folder.resolve()),
            series,
            last,
            yaml.load(settings.read_text(encoding="utf-8"), yaml.BaseLoader) if settings.exists() else {},
            list(read_rows(folder / "guard_failures.jsonl")) if (folder / "guard_failures.jsonl").exists() else [],
            _json(folder / "stopped.json"),
        )
        run.samples = _samples(folder / FOLDER, clips)
        rows = sorted(_recitals(folder), key=lambda row: row["share"])
        run.clips = [_clip(row) for row in rows[:clips]]
        run.clips_left_out = len(rows) - len(run.clips)
    return run


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Writes the page of these runs, complete or not at all. Raises OSError."""
    from plotly.offline import get_plotlyjs

    sections = [
        (title, [{"title": heading, "figure": figure} for heading, figure in _figures(runs, charts)])
        for title, charts in SECTIONS
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("run.html.j2")
    page = template.render(
        title=" · ".join(run.name for run in runs),
        runs=runs,
        colours=COLOURS,
        sections=[(title, charts) for title, charts in sections if charts],
        settings=_settings(runs),
        plotly=get_plotlyjs(),
    )
    write_text(path, page)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _figures(runs: Sequence[Run], charts: Sequence[Chart]) -> Iterator[tuple[str, dict]]:
    """Heading and plotly figure of each chart that has a point. Several runs share a chart, a colour a run."""
    for heading, unit, lines in charts:
        traces = []
        for number, run in enumerate(runs):
            for place, (metric, label) in enumerate(lines):
                steps, values = run.series[metric].points()
                points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
                if not points:
                    continue
                colour = COLOURS[number % len(COLOURS)] if len(runs) > 1 or len(lines) < 3 else None
                dash = "dot" if place and metric.startswith("eval/") else "solid"
                traces.append(
                    {
                        "x": [step for step, _ in points],
                        "y": [float(f"{value:.6g}") for _, value in points],
                        "name": f"{run.name}: {label}" if len(runs) > 1 else label,
                        "mode": "lines+markers" if len(points) < 10 or metric.startswith("eval/") else "lines",
                        "line": {"dash": dash, "width": 1.5} | ({"color": colour} if colour and not place else {}),
                    }
                )
        if traces:
            yield heading, {"data": traces, "unit": unit}


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(option, its value in each run, whether the runs differ), the differences first."""
    names = {name: None for run in runs for name in run.settings}
    rows = []
    for name in names:
        values = [_shown(run.settings.get(name)) for run in runs]
        rows.append((name, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value in (None, "null") else str(value)


def _samples(folder: Path, most: int) -> list[dict[str, Any]]:
    """Each sampled text with its recording and its clips, by step: the first, the last, and what has room between."""
    lists = sorted(folder.glob(f"step-*/{LIST}"))
    texts: dict[str, dict[str, Any]] = {}
    lines = [[row | {"folder": path.parent} for row in read_rows(path)] for path in lists]
    if not lines:
        return []
    room = max(2, most // max(1, len(lines[0])))
    shown = np.unique(np.linspace(0, len(lines) - 1, min(room, len(lines))).round().astype(int)).tolist()
    for row in (row for place in shown for row in lines[place]):
        name = os.path.basename(row["name"])
        text = texts.setdefault(name, {"text": str(row["text"]), "origin": str(row["origin"]), "steps": []})
        if "recording" not in text:
            text["recording"] = _sound(folder / RECORDINGS / f"{name}.wav")
        sound = _sound(row["folder"] / f"{name}.wav") if row["file"] else ""
        text["steps"].append({"step": f"{int(row['global_step']):,}", "sound": sound, "ended": bool(row["ended"])})
    return list(texts.values())


def _recitals(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of every recital.json in the run's folder, with the folder that its clips lie in."""
    for path in sorted(folder.glob("*/recital.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            yield row | {"folder": path.parent}


def _clip(row: dict[str, Any]) -> dict[str, str]:
    """A reproduced row as the page shows it: what was said, and both sounds as MP3."""
    spoken = os.path.basename(row["file"])  # a name in this folder, never a path out of it
    original = spoken.replace(".spoken.", ".original.")
    return {
        "text": str(row["text"]),
        "origin": str(row["origin"]),
        "share": f"{100 * float(row['share']):.1f} %",
        "spoken": _sound(row["folder"] / spoken),
        "original": _sound(row["folder"] / original),
    }


def _sound(path: Path) -> str:
    """A clip as base64 of an MP3; empty where the file is gone."""
    if not path.is_file():
        return ""
    waveform, rate = soundfile.read(path, frames=round(LONGEST_CLIP_SEC * 48000), dtype="float32", always_2d=True)
    out = io.BytesIO()
    soundfile.write(out, np.clip(waveform.mean(1), -1, 1), rate, format="MP3")
    return base64.b64encode(out.getvalue()).decode()
