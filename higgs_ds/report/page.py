"""One or several runs as a self-contained HTML file: settings, curves, guard, and clips to play.

Curves are drawn by plotly. Content of a run's files is treated as data: text is escaped, numbers are embedded as JSON,
and the page's Content-Security-Policy forbids all requests.
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
from ..judges.summary import CODEC, RECORDINGS, bootstrap_of, compared, table
from . import samples
from .history import CODEBOOK_METRICS, Series
from .jsonl import read_rows

PAGE, METRICS, RANK_LOSS = "report.html", "metrics.jsonl", "rank/loss"
JUDGED, TRAINED_ON = "judged.jsonl", "trained_on.json"
# Limits of a page, shared by its runs: with plotly's 4.8 MB it stays below 10 MB.
MOST_SOUND = 3_200_000  # characters of MP3 in base64: about 160 clips of two seconds
MOST_POINTS = 1024  # per curve
MOST_ROWS = 160  # per table of clips
MOST_STEPS = 6  # columns in the table of judged samples
LONGEST_CLIP_SEC = 30.0
COLOURS = ("#c8550a", "#1f77b4", "#2a7f3f", "#8450a8", "#b8860b", "#444444")

# Charts by section: heading, unit of the y axis, and the metrics with their names in the legend.
Chart = tuple[str, str, dict[str, str]]
SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Loss": (
        ("Audio loss", "nats", {"train/audio_loss": "train", "eval/audio_loss": "validation"}),
        ("Text loss", "nats", {"train/text_loss": "train", "eval/text_loss": "validation"}),
        ("Audio loss by codebook", "nats", {name: str(k) for k, name in enumerate(CODEBOOK_METRICS)}),
        ("Loss of each rank: lowest and highest", "nats", {"rank/lowest": "lowest", "rank/highest": "highest"}),
    ),
    "Words, voice, endings": (
        ("Error rate of the samples", "", {"eval/wer": "words", "eval/cer": "characters"}),
        ("Similarity of the samples to their speaker", "", {"eval/similarity": "similarity"}),
        ("Share of samples ended by the model", "", {"eval/stops": "ended"}),
    ),
    "Learning": (
        ("Gradient norm", "", {"train/grad_norm": "gradient norm"}),
        ("Learning rate", "", {"train/learning_rate": "learning rate"}),
    ),
    "Speed and memory": (
        ("Tokens per second", "", {"perf/tokens_per_sec": "tokens per second"}),
        ("Step and data time", "s", {"perf/step_sec": "step", "perf/data_sec": "waiting for data"}),
        ("Highest peak memory of a rank", "GiB", {"memory/peak_gib": "peak", "memory/reserved_gib": "reserved"}),
    ),
}
WANTED = {metric for charts in SECTIONS.values() for _, _, lines in charts for metric in lines}
HEADLINES = ("train/loss", "train/audio_loss", "eval/loss", "eval/audio_loss", "eval/wer", "eval/similarity")

Table = list[tuple[str, list[str]]]  # rows: a name, and a cell for each column


@dataclass
class Sounds:
    """Encodes clips as MP3 in base64, up to a total size."""

    room: int = 0  # remaining characters

    def of(self, path: Path | None) -> str:
        """Encodes a clip; returns "" if the file is missing or there is no room left."""
        if path is None or not path.is_file() or self.room <= 0:
            return ""
        waveform, rate = soundfile.read(path, frames=round(LONGEST_CLIP_SEC * 48000), dtype="float32", always_2d=True)
        out = io.BytesIO()
        soundfile.write(out, np.clip(waveform.mean(1), -1, 1), rate, format="MP3")
        sound = base64.b64encode(out.getvalue()).decode()
        self.room -= len(sound)
        return sound if self.room >= 0 else ""


@dataclass
class Clips:
    """Clips with their recordings, worst first, and figures over all clips."""

    heading: str
    rows: list[dict[str, str]]
    left_out: int
    figures: Table = field(default_factory=list)  # the first row names the columns
    notes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """Content of one `--output_dir` for the page."""

    name: str
    series: dict[str, Series]
    last: dict[str, Any]  # latest value of each metric
    settings: dict[str, Any]
    failures: list[dict] = field(default_factory=list)
    stopped: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)  # one per text, with its clips by step
    sample_figures: Table = field(default_factory=list)
    clips: list[Clips] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, str]:
        """Key facts of the run: steps, losses, failed loss checks, speed, reason of a stop."""
        last = self.last
        lines = {"steps": f"{last.get('global_step', 0):,}"}
        for name in HEADLINES:
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


def read_run(folder: Path, runs: int = 1) -> Run:
    """Reads a run's folder, also while the run is in progress.

    Args:
        runs: number of runs on the page, which share its limits.

    Raises:
        ConfigError: metrics.jsonl is missing, or a file is damaged.
    """
    series = {name: Series(MOST_POINTS // 2 // runs) for name in WANTED | {"eval/loss"}}
    last: dict[str, Any] = {}
    sounds, most = Sounds(), MOST_ROWS // runs
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
            _json(folder / TRAINED_ON),
        )
        judged, recitals = sorted(folder.glob(f"*/{JUDGED}")), sorted(folder.glob("*/recital.json"))
        share = MOST_SOUND // runs // (1 + bool(judged) + bool(recitals))
        sounds.room += share
        run.samples, run.sample_figures = _samples(folder / samples.FOLDER, most, sounds)
        for paths, clips_of in ((judged, _judged), (recitals, _recited)):
            sounds.room = max(0, sounds.room) + share * bool(paths)
            run.clips += [clips_of(folder, path, most, sounds) for path in paths]
    return run


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Writes the page of these runs atomically. Raises OSError."""
    from plotly.offline import get_plotlyjs

    sections = [
        (title, [{"title": heading, "figure": figure} for heading, figure in _figures(runs, charts)])
        for title, charts in SECTIONS.items()
    ]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("run.html.j2")
    page = template.render(
        title=" · ".join(run.name for run in runs),
        runs=runs,
        colours=COLOURS,
        sections=[(title, charts) for title, charts in sections if charts],
        trained_on=_compared([run.trained_on for run in runs]),
        settings=_compared([run.settings for run in runs]),
        plotly=get_plotlyjs(),
    )
    write_text(path, page)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _figures(runs: Sequence[Run], charts: Sequence[Chart]) -> Iterator[tuple[str, dict]]:
    """Yields heading and plotly figure of each chart with data. Runs share a chart, with one colour each."""
    for heading, unit, lines in charts:
        traces = []
        for number, run in enumerate(runs):
            for place, (metric, label) in enumerate(lines.items()):
                steps, values = run.series[metric].points()
                points = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
                if not points:
                    continue
                has_colour = len(runs) > 1 or (len(lines) < 3 and not place)
                dash = "dot" if place and (metric.startswith("eval/") or len(lines) == 2 <= len(runs)) else "solid"
                traces.append(
                    {
                        "x": [step for step, _ in points],
                        "y": [float(f"{value:.6g}") for _, value in points],
                        "name": f"{run.name}: {label}" if len(runs) > 1 else label,
                        "mode": "lines+markers" if len(points) < 10 or metric.startswith("eval/") else "lines",
                        "line": {"dash": dash, "width": 1.5}
                        | ({"color": COLOURS[number % len(COLOURS)]} if has_colour else {}),
                    }
                )
        if traces:
            yield heading, {"data": traces, "unit": unit}


def _compared(of_runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Compares the runs' values by name; returns (name, value in each run, True if they differ), differences first."""
    rows = []
    for name in dict.fromkeys(name for of_run in of_runs for name in of_run):
        values = [_shown(of_run.get(name)) for of_run in of_runs]
        rows.append((name, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value in (None, "null") else str(value)


def _samples(folder: Path, most: int, sounds: Sounds) -> tuple[list[dict[str, Any]], Table]:
    """Reads the samples: each text with its recording and its clips at the first, the last and some steps between.

    Judged samples are sorted worst first, by the last step; the table has the figures of some steps.
    """
    steps = [(path.parent, list(read_rows(path))) for path in sorted(folder.glob(f"step-*/{samples.LIST}"))]
    if not steps:
        return [], []
    texts: dict[str, dict[str, Any]] = {}
    sets: dict[Any, list] = {}  # by step; reference sets by name
    shown = _spread(steps, most // max(1, len(steps[0][1])))
    for at, rows in [shown[-1], *shown[:-1]]:  # the last step first, while there is room for its clips
        lines = list(read_rows(at / JUDGED)) if (at / JUDGED).exists() else []
        of_row = {line["row"]: line for line in lines if line["set"] not in (RECORDINGS, CODEC)}
        step = int(at.name.removeprefix("step-"))
        for row in rows:
            name, line = os.path.basename(row["name"]), of_row.get(row["origin"], {})
            text = texts.setdefault(name, {"text": str(row["text"]), "origin": str(row["origin"]), "steps": []})
            if not text["steps"]:
                text["recording"] = sounds.of(folder / samples.RECORDINGS / f"{name}.wav")
                text["badness"] = _badness(line)
            clip = {"step": step, "sound": sounds.of(at / f"{name}.wav") if row["file"] else ""}
            text["steps"].append(clip | {"ended": bool(row["ended"]), "measured": _measured(line)})
        for line in lines:
            sets.setdefault(line["set"] if line["set"] in (RECORDINGS, CODEC) else step, []).append(_unit_and(line))
    for text in texts.values():
        text["steps"].sort(key=lambda clip: clip["step"])
    ceilings = {  # equal at all steps
        name: list({line["row"]: (unit, line) for unit, line in sets.pop(name)}.values())
        for name in (RECORDINGS, CODEC)
        if name in sets
    }
    of_steps = {f"step {step:,}": sets[step] for step in _spread(sorted(sets), MOST_STEPS)}
    return sorted(texts.values(), key=lambda text: text["badness"]), _figures_of(ceilings | of_steps)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Selects at most max(2, most) items, evenly spaced, including the first and the last."""
    places = np.linspace(0, len(items) - 1, min(max(2, most), len(items))).round().astype(int)
    return [items[place] for place in np.unique(places).tolist()]


def _judged(folder: Path, path: Path, most: int, sounds: Sounds) -> Clips:
    """Reads the clips and figures that `judge` wrote into a folder of the run."""
    sets: dict[str, list] = {}
    lines = list(read_rows(path))
    for line in lines:
        sets.setdefault(str(line["set"]), []).append(_unit_and(line))
    recordings = {line["row"]: line["file"] for line in lines if line["set"] == RECORDINGS}
    spoken = sorted((line for line in lines if line["set"] not in (RECORDINGS, CODEC)), key=_badness)
    rows = [
        {
            "text": str(line["text"]),
            "origin": f"{line['set']}; {line['row']}",
            "measured": _measured(line),
            "heard": str(line.get("heard", "")),
            "spoken": sounds.of(_within(folder, line["file"])),
            "original": sounds.of(_within(folder, recordings.get(line["row"], ""))),
        }
        for line in spoken[:most]
    ]
    notes = compared(sets, bootstrap_of(sets)) if sets else []
    return Clips(f"{path.parent.name}: judged clips", rows, len(spoken) - len(rows), _figures_of(sets), notes)


def _unit_and(line: dict[str, Any]) -> tuple[tuple[Any, Any], dict[str, Any]]:
    return (line.get("speaker"), line.get("text")), line  # an unreadable clip has neither


def _figures_of(sets: dict[str, list]) -> Table:
    return [("", list(sets)), *table(sets, bootstrap_of(sets))] if sets else []


def _badness(line: dict[str, Any]) -> tuple[float, float]:
    """Sort key: highest error rate first, then the lowest similarity."""
    errors = line["cer"] if line.get("wer") is None and "cer" in line else line.get("wer", 0.0)
    return -float(errors), float(line.get("similarity", 1.0))


def _measured(line: dict[str, Any]) -> str:
    names = {"wer": "WER", "cer": "CER", "similarity": "similarity", "length": "length"}
    return ", ".join(f"{names[key]} {line[key]:.2f}" for key in names if line.get(key) is not None)


def _within(folder: Path, file: str) -> Path | None:
    """Finds a file by the longest suffix of its path that exists in the run's folder, which may have been moved."""
    parts = [part for part in Path(file).parts if part not in ("..", os.sep)]
    paths = (folder.joinpath(*parts[first:]) for first in range(len(parts)))
    return next((path for path in paths if path.is_file()), None)


def _recited(folder: Path, path: Path, most: int, sounds: Sounds) -> Clips:
    """Reads the clips that `reproduce` wrote into a folder of the run."""
    recited = sorted(json.loads(path.read_text(encoding="utf-8")), key=lambda row: row["share"])
    rows = []
    for row in recited[:most]:
        spoken = os.path.basename(row["file"])  # never a path outside this folder
        original = spoken.replace(".spoken.", ".original.")
        found = {"text": str(row["text"]), "origin": str(row["origin"]), "heard": ""}
        found["measured"] = f"{100 * float(row['share']):.1f} % of the codes reproduced"
        sides = {side: sounds.of(path.parent / name) for side, name in (("spoken", spoken), ("original", original))}
        rows.append(found | sides)
    return Clips(f"{path.parent.name}: training rows reproduced", rows, len(recited) - len(rows))
