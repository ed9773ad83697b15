"""Plot and page of `describe`: histograms, and the oddest clips to play, in one self-contained file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
import numpy as np
import soundfile

from ..data.audio import AudioError, read_audio
from ..files import replacing
from .describe import Described, oddest

PLAYED_SEC = 30.0


def write_page(folder: Path, found: Described, said: list[str]) -> Path:
    """Writes describe.png and describe.html to a folder; returns the page's path. Raises OSError."""
    png = draw_histograms(found)
    with replacing(folder / "describe.png") as beside:
        beside.write_bytes(png)
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("describe.html.j2")
    page = template.render(
        title=found.speech.file,
        said="\n".join(said),
        image=base64.b64encode(png).decode(),
        clips=[_played(found, i) for i in oddest(found)],
    )
    path = folder / "describe.html"
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8", errors="replace")
    return path


def draw_histograms(found: Described) -> bytes:
    """Draws a PNG of 1400 x 500 pixels: clip lengths on the left, characters per second on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    speaks = found.speech.seconds > 0
    seconds = found.speech.seconds[speaks]
    pace = found.speech.stats["chars"][speaks] / seconds
    figure = Figure(figsize=(14, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    shown = ((seconds, "clip length", "seconds"), (pace, "speaking rate", "characters per second"))
    for panel, (values, title, unit) in zip(panels, shown, strict=True):
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


def _played(found: Described, i: int) -> dict[str, str]:
    """Makes a row of the page's table."""
    speech, row = found.speech, found.rows[i]
    said = row.target()
    assert said is not None, "`oddest` returns only rows with a clip"
    text, clip = said
    numbers = f"{int(speech.stats['chars'][i])} characters in {speech.seconds[i]:.2f} s"
    shown = {"origin": row.origin, "numbers": numbers, "text": text}
    try:
        waveform, sample_rate = read_audio(row.audio_refs[clip][1])
    except AudioError as error:
        return shown | {"problem": str(error)}
    out = io.BytesIO()
    part = np.clip(waveform[: round(PLAYED_SEC * sample_rate)], -1, 1)
    soundfile.write(out, part, sample_rate, format="WAV", subtype="PCM_16")
    return shown | {"sound": base64.b64encode(out.getvalue()).decode()}
