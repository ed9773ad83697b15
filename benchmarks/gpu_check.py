"""Runs the stages of gpu_stages.py, each with a limit, within ten minutes; ends with a table of all they found.

usage: python benchmarks/gpu_check.py [--stages right,program,…] [--minutes 10] [--output_dir runs/gpu_check]
       exits with 1 where something does not hold; gpu.json has the table, STAGE.log what a stage said
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Seconds that a stage may take of ten minutes, in the order of what a new machine is asked first.
LIMITS = {"right": 90, "program": 150, "speed": 210, "profile": 75, "voice": 120, "kernels": 75, "compiled": 150}
HOLDS, FAILS = "HOLDS", "DOES NOT HOLD"
COLUMNS = ("stage", "what", "found", "limit", "verdict")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(LIMITS), help="by ,")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu_check"))
    return parser.parse_args()


def run_stage(command: list[str], limit: float, log: Path) -> str | None:
    """Ends a stage's process at its limit with all that it started; says what went wrong with it, None for nothing."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, text=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"[:160]


def found_by(stage: str, file: Path, problem: str | None) -> list[dict[str, str]]:
    """A stage's rows of the table: what it has checked before it ended, and its end where that was not well."""
    rows = [{"stage": stage, **row} for row in json.loads(file.read_text("utf-8"))] if file.exists() else []
    if problem is None and not rows:
        problem = "nothing was checked"
    if problem is not None:
        rows.append({"stage": stage, "what": "the stage", "found": problem, "limit": "", "verdict": FAILS})
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """All rows, and which stages hold."""
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]
    widths = [max(len(line[column]) for line in lines) for column in COLUMNS]
    text = ["  ".join(line[c].ljust(w) for c, w in zip(COLUMNS, widths, strict=True)).rstrip() for line in lines]
    failed = list(dict.fromkeys(row["stage"] for row in rows if row["verdict"] == FAILS))
    return "\n".join([*text, "", f"{FAILS}: {', '.join(failed)}" if failed else HOLDS])


def main() -> int:
    args = parse()
    stages = args.stages.split(",")
    if unknown := [stage for stage in stages if stage not in LIMITS]:
        sys.exit(f"--stages: {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    folder = args.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started, rows, took = time.monotonic(), [], {}
    for stage in stages:
        at = time.monotonic() - started
        print(f"== {stage} ({at:.0f} s)", flush=True)
        file = folder / f"{stage}.json"
        file.unlink(missing_ok=True)
        limit = min(LIMITS[stage] * args.minutes / 10, 60 * args.minutes - at)
        command = [sys.executable, str(ROOT / "benchmarks/gpu_stages.py"), stage, str(folder)]
        problem = run_stage(command, limit, file.with_suffix(".log")) if limit > 0 else "not begun: the time was up"
        rows += found_by(stage, file, problem)
        took[stage] = round(time.monotonic() - started - at, 1)
    from benchmarks.report import device_name, measuring_device

    measuring_device()
    print(f"\n{device_name()}, {time.monotonic() - started:.0f} s\n\n{table(rows)}")
    holds = all(row["verdict"] != FAILS for row in rows)
    result = {"device": device_name(), "holds": holds, "seconds": took, "rows": rows}
    (folder / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"kept: {folder / 'gpu.json'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
