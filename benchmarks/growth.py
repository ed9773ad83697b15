"""How a step's cost grows with length, tokens a micro-batch and ranks; what activation checkpointing costs and saves.

Ours alone, the same pass over the same rows as in step.py. Nothing here has a bar.

usage: python benchmarks/growth.py [--stage 2] [--rows 64] [--repeats 3] [--hidden 256] [--layers 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from benchmarks.step import measure  # noqa: E402

CASES = {
    "clips of 2 s": ["--seconds", "2"],
    "clips of 5 s": ["--seconds", "5"],
    "clips of 10 s": ["--seconds", "10"],
    "clips of 20 s": ["--seconds", "20"],
    "512 tokens a micro-batch": ["--seconds", "5", "--max_tokens", "512"],
    "1024 tokens": ["--seconds", "5", "--max_tokens", "1024"],
    "2048 tokens": ["--seconds", "5", "--max_tokens", "2048"],
    "4096 tokens": ["--seconds", "5", "--max_tokens", "4096"],
    "1 rank": ["--seconds", "5", "--ranks", "1"],
    "2 ranks": ["--seconds", "5", "--ranks", "2"],
    "4 ranks": ["--seconds", "5", "--ranks", "4"],
    "no checkpointing": ["--seconds", "10", "--max_tokens", "4096"],
    "every 2nd layer": ["--seconds", "10", "--max_tokens", "4096", "--activation_checkpointing", "2"],
    "every layer": ["--seconds", "10", "--max_tokens", "4096", "--activation_checkpointing", "1"],
}
COLUMNS = ("rows", "seconds a pass", "tokens/s", "peak memory, GB", "of which the model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("stage", 2), ("rows", 64), ("repeats", 3), ("hidden", 256), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shared = ["--no_naive", "--vocabulary", "16384"]
    for name in ("stage", "repeats", "hidden", "layers"):
        shared += [f"--{name}", str(getattr(args, name))]
    rows = []
    for case, words in CASES.items():
        # As many tokens in every case, so that passes compare.
        seconds = float(words[1])
        count = max(16, round(args.rows * 5 / seconds))
        (row,) = measure([*shared, "--rows", str(count), "--max_tokens", "2048", *words])
        rows.append({"": case} | {column: row[column] for column in COLUMNS})
        print(rows[-1], flush=True)
    tokens = {row[""]: row["tokens/s"] for row in rows}
    figure = {
        "tokens/s of 20 s clips, of 2 s clips'": tokens["clips of 20 s"] / tokens["clips of 2 s"],
        "seconds a token with every layer checkpointed": tokens["no checkpointing"] / tokens["every layer"],
    }
    report("how a step's cost grows", rows, figure=figure, bar={}, holds=True, json_file=args.json)


if __name__ == "__main__":
    main()
