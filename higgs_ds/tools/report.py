"""`python -m higgs_ds report`: writes runs as one self-contained page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from ..files import writing
from ..process import say
from ..report.page import PAGE, read_run, write_page
from . import flag_types


def add_report(verbs) -> None:
    """Adds the verb `report`."""
    about = "write runs as one HTML page: curves, guard, settings, clips to play"
    parser = verbs.add_parser("report", help=about)
    add = parser.add_argument
    add(
        "runs",
        type=flag_types.path,
        nargs="+",
        metavar="RUN",
        help="output folder of a run, also while it trains",
    )
    add("--output_file", type=flag_types.path, metavar="FILE", help=f"page (default: {PAGE} in the first run)")
    parser.set_defaults(verb=run_report)


def run_report(args: argparse.Namespace) -> int:
    """Writes the page; returns the exit code. Raises ConfigError."""
    missing = [f"{folder}: has no metrics.jsonl" for folder in args.runs if not (folder / "metrics.jsonl").is_file()]
    if missing:
        raise ConfigError(missing)
    output: Path = args.output_file or args.runs[0] / PAGE
    runs = [read_run(folder, len(args.runs)) for folder in args.runs]
    with writing(f"--output_file: {output}"):
        write_page(runs, output)
    say(f"open {output} ({output.stat().st_size / 1e6:.1f} MB)")
    return 0
