"""How long training stands still for a checkpoint, and how large one is: 39.4 M trainable parameters, 2 CPU ranks.

usage: python benchmarks/checkpoint.py [--stage 2|3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from higgs_ds.model.higgs_v2.tiny import write_tiny  # noqa: E402
from higgs_ds.tools.cli import main as higgs_ds  # noqa: E402

SPEECH = ROOT / "examples/speech/manifest.jsonl"
STALL, SIZE = "training stands still for a save, s (median)", "bytes on disk a trainable parameter"
BARS = {STALL: 1.0, SIZE: 16.0}
RANK = 260  # of LoRA on 8 layers of 512: 39.4 M parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_tiny(work / "base", hidden_size=512, num_layers=8)
        higgs_ds(["sample-codec", "--train_manifest", str(SPEECH), "--output_dir", str(work / "codec")])
        flags = {
            "deepspeed_config": ROOT / f"ds_configs/zero{args.stage}.json",
            "train_manifest": SPEECH,
            "base_ckpt": work / "base",
            "codec": work / "codec",
            "output_dir": work / "run",
            "lora_r": RANK,
            "max_steps": 21,
            "save_every": 4,
            "epochs": 2,
            "dtype": "fp32",
            "num_workers": 0,
            "wandb_mode": "disabled",
        }
        words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train_ds.py")]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launch, *words], cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        rows = map(json.loads, (work / "run/metrics.jsonl").read_text().splitlines())
        stalls = [row["perf/save_stall_sec"] for row in rows if "perf/save_stall_sec" in row]
        newest = sorted((work / "run/checkpoints").glob("step-*"))[-1]
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        parameters = (newest / "adapter/adapter_model.safetensors").stat().st_size / 4
    figure = {STALL: statistics.median(stalls), SIZE: size / parameters}
    report(
        f"a checkpoint of {parameters / 1e6:.1f} M trainable parameters, 2 ranks, ZeRO-{args.stage}",
        [{"save": number, "stall, s": stall} for number, stall in enumerate(stalls, start=1)],
        figure=figure,
        bar=BARS,
        holds=all(figure[name] <= bar for name, bar in BARS.items()),
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
