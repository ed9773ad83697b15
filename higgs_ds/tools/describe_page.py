"""The picture and the page of `describe`: histograms, and the oddest clips to listen to, all in one file."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
import soundfile

from ..data.audio import AudioError, read_audio
from ..files import replacing
from .described import Described, oddest

PLAYED_SEC = 30.0
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "td{border-top:1px solid #ccc;padding:.4em;vertical-align:top}pre{white-space:pre-wrap}"
)


def write_page(folder: Path, found: Described, said: list[str]) -> Path:
    """describe.png and describe.html in a folder; the page's path. Raises OSError where they cannot be written."""
    png = draw_histograms(found)
    with replacing(folder / "describe.png") as beside:
        beside.write_bytes(png)
    image = base64.b64encode(png).decode()
    title = html.escape(found.spoken.file)
    rows = "\n".join(_played(found, i) for i in oddest(found))
    page = (
        f"<!doctype html>\n<meta charset=utf-8>\n<title>{title}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{title}</h1>\n<pre>{html.escape(chr(10).join(said))}</pre>\n"
        f'<img alt="Histograms of clip lengths and of characters a second" src="data:image/png;base64,{image}">\n'
        f"<h2>The oddest clips</h2>\n<p>Those spoken the fastest or the slowest for their texts.</p>\n"
        f"<table>\n{rows}\n</table>\n"
    )
    path = folder / "describe.html"
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8", errors="replace")
    return path


def draw_histograms(found: Described) -> bytes:
    """PNG of 1400 x 500 pixels: lengths of clips on the left, characters a second on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    speaks = found.spoken.seconds > 0
    seconds = found.spoken.seconds[speaks]
    pace = found.spoken.facts["chars"][speaks] / seconds
    figure = Figure(figsize=(14, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for panel, values, title, unit in zip(
        panels,
        (seconds, pace),
        ("length of the clips", "how fast they are spoken"),
        ("seconds", "characters a second"),
        strict=True,
    ):
        if len(values):
            top = max(float(np.quantile(values, 0.999)) * 1.05, 1e-3)
            panel.hist(np.minimum(values, top), bins=60, color="#1f77b4")
            panel.axvline(float(np.median(values)), color="#222222", linewidth=1)
        panel.set_title(f"{title} ({len(values):,} clips, median {np.median(values) if len(values) else 0:.2f})")
        panel.set_xlabel(unit)
        panel.set_ylabel("clips")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _played(found: Described, i: int) -> str:
    """A row of the page's table."""
    spoken, row = found.spoken, found.rows[i]
    text, clip = row.spoken() or ("", 0)  # never: only rows that speak are counted
    numbers = f"{int(spoken.facts['chars'][i])} characters in {spoken.seconds[i]:.2f} s"
    try:
        waveform, sample_rate = read_audio(row.audio_refs[clip][1])
        out = io.BytesIO()
        part = np.clip(waveform[: round(PLAYED_SEC * sample_rate)], -1, 1)
        soundfile.write(out, part, sample_rate, format="WAV", subtype="PCM_16")
        sound = f'<audio controls src="data:audio/wav;base64,{base64.b64encode(out.getvalue()).decode()}"></audio>'
    except AudioError as error:
        sound = html.escape(str(error))
    cells = (html.escape(row.origin), numbers, html.escape(text), sound)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
