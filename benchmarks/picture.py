"""One picture of what the benchmarks measured: ours beside what users pick instead.

usage: python benchmarks/picture.py STEP_ZERO2.json STEP_ZERO3.json LOSS.json PICTURE.png
(as `step.py`, `step.py --stage 3` and `loss.py` write them with --json)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAIVE, OURS = "#b8b8b8", "#d95f02"


def main(step2: str, step3: str, loss: str, png: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    result = [json.loads(Path(name).read_text(encoding="utf-8")) for name in (step2, step3, loss)]
    if len({part["device"] for part in result}) != 1:
        raise SystemExit("the files were measured on different devices; one picture shows one")
    of2, of3 = (part["rows"] for part in result[:2])
    heads = [row for row in result[2]["rows"] if row["dtype"] == "fp32"]
    panels = [
        ("a whole step, ZeRO-2\nlearned tokens a second", *(row["learned tokens/s"] for row in of2)),
        ("a whole step, ZeRO-3\nlearned tokens a second", *(row["learned tokens/s"] for row in of3)),
        ("peak memory of a rank, ZeRO-2\nGB, less is better", *(row["peak memory, GB"] for row in of2)),
        ("loss of both heads, real size\nseconds, less is better", *(row["seconds"] for row in heads)),
    ]
    figure = Figure(figsize=(15, 4.5), dpi=100)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.03, right=0.985, bottom=0.19, top=0.74, wspace=0.18)
    figure.suptitle("The same rows and the same weights, each pair in one run", fontsize=16, fontweight="bold", y=0.97)
    for axes, (title, naive, ours) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.bar([0, 1], [naive, ours], color=[NAIVE, OURS], width=0.72)
        for x, value in enumerate((naive, ours)):
            axes.text(x, value, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", ha="center", va="bottom", size=12)
        factor = ours / naive if ours > naive else naive / ours
        axes.text(1 if ours < naive else 0, max(naive, ours) * 0.6, f"{factor:.1f} ×", ha="center", size=24, color=OURS)
        axes.set_title(title, fontsize=12)
        axes.set_xticks([0, 1], ["upstream's forward,\nplain loss", "higgs_ds"], fontsize=11)
        axes.set_yticks([])
        axes.margins(y=0.14)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.text(0.985, 0.02, result[0]["device"], ha="right", fontsize=9, color="#777777")
    figure.savefig(png)
    print(png)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
