"""The check of a new GPU machine: its small form on a CPU, and what its table says of a stage that went wrong."""

import json
import os
import subprocess
import sys
import time

from benchmarks.gpu_check import found_by, run_stage, table
from tests.conftest import ROOT


def test_on_a_cpu_it_says_what_holds_and_what_needs_a_gpu(tmp_path):
    ran = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", "--stages", "right,kernels", "--minutes", "40", "--output_dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-2:] == ["HOLDS", f"kept: {tmp_path / 'gpu.json'}"]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["holds"] and result["seconds"].keys() == {"right", "kernels"}
    verdicts = {stage: [r["verdict"] for r in result["rows"] if r["stage"] == stage] for stage in result["seconds"]}
    assert verdicts["right"] == ["HOLDS"] * 14
    assert verdicts["kernels"].count("no GPU") == 4 and set(verdicts["kernels"]) == {"measured", "no GPU"}


def test_a_stage_that_fails_or_takes_too_long_does_not_hold(tmp_path):
    log, file = tmp_path / "speed.log", tmp_path / "speed.json"
    assert run_stage([sys.executable, "-c", "print('fine')"], 30, log) is None
    failed = run_stage([sys.executable, "-c", "import sys; print('no such kernel'); sys.exit(3)"], 30, log)
    assert failed == "exit code 3: no such kernel"
    # It starts another process, which goes with it, and neither minds SIGTERM.
    code = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.fork(), flush=True); time.sleep(60)"
    assert run_stage([sys.executable, "-c", code], 2, log) == "not done after 2 s"
    child = int(log.read_text().splitlines()[0])
    time.sleep(0.2)
    assert not alive(child)
    kept = {"what": "zero1: 8,192 tokens", "found": "9 tokens/s", "limit": "", "verdict": "HOLDS"}
    file.write_text(json.dumps([kept]))
    rows = [*found_by("speed", file, failed), *found_by("voice", tmp_path / "voice.json", None)]
    assert table(rows).splitlines() == [
        "stage  what                 found                        limit  verdict",
        "speed  zero1: 8,192 tokens  9 tokens/s                          HOLDS",
        "speed  the stage            exit code 3: no such kernel         DOES NOT HOLD",
        "voice  the stage            nothing was checked                 DOES NOT HOLD",
        "",
        "DOES NOT HOLD: speed, voice",
    ]
    assert table(found_by("speed", file, None)).endswith("\nHOLDS")


def alive(process: int) -> bool:
    """True if it runs; one that waits to be reaped does not."""
    try:
        status = open(f"/proc/{process}/stat").read()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
