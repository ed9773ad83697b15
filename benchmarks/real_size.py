"""A rehearsal at the real size, on a CPU: 5.8 B parameters through the same doors as a user's, one optimizer step.

The base checkpoint has Boson's names, shapes and config; its weights are zeros in sparse files, 11.5 GB that take no
disk. `train_ds.py` runs on it in bf16 as for anybody: header check, tokenizer, codec, LoRA, guard, engine, adapter.
With all weights zero both heads must answer with the logarithm of their number of classes: ln 128,256 for the text,
ln 1,026 in every codebook. Takes about a minute and 18 GB of memory a stage; Higgs TTS 3, of 4.0 B, 13 GB.

`--merge` merges the last adapter too, which writes as much as the base holds.

usage: python benchmarks/real_size.py [--family v3] [--stages 2 3] [--base_dtype nf4] [--merge] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPEECH = ROOT / "examples" / "speech"
ROWS = 4
MEMORY_BARS_GB = {("v2", None): 20.0, ("v2", "nf4"): 10.0, ("v3", None): 16.0, ("v3", "nf4"): 10.0}
MERGE_BAR_GB = 3.0
TEXT_LOSS, AUDIO_LOSS = {"v2": math.log(128_256), "v3": 0.0}, math.log(1026)
PARAMETERS = {"v2": 5.771, "v3": 4.043}
LORA = {"v2": (560, 39_452_672), "v3": (504, 33_030_144)}  # tensors, values
PLAN_BARS = {None: 0.15, "nf4": 0.25}  # quantizing takes host memory that no GPU rank needs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], choices=range(4))
    parser.add_argument("--family", choices=("v2", "v3"), default="v2")
    parser.add_argument("--base_dtype", choices=("nf4",))
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from benchmarks.report import report

    free, memory_bar = available_gb(), MEMORY_BARS_GB[args.family, args.base_dtype]
    if free < memory_bar:
        sys.exit(f"{free:.1f} GB of memory are free, a stage may take {memory_bar:g}: end something else first")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prepare(work, args.family)
        rows = [rehearse(work, stage, args.family, args.base_dtype) for stage in args.stages]
        worst = max(row["peak memory, GB"] for row in rows)
        figure = {"peak memory, GB": worst, "largest distance of a loss": max(row["off by"] for row in rows)}
        bar = {"peak memory, GB": memory_bar, "largest distance of a loss": 1e-3}
        figure["plan's distance from the peak"] = max(abs(r["planned, GB"] / r["peak memory, GB"] - 1) for r in rows)
        bar["plan's distance from the peak"] = PLAN_BARS[args.base_dtype]
        if args.merge:
            rows.append(merge(work, work / f"zero{args.stages[-1]}/adapter"))
            figure["peak memory of the merge, GB"] = rows[-1]["peak memory, GB"]
            bar["peak memory of the merge, GB"] = MERGE_BAR_GB
    holds = all(row.get("losses as expected", True) for row in rows) and all(figure[name] < bar[name] for name in bar)
    report(
        f"one optimizer step of train_ds.py on {PARAMETERS[args.family]} B parameters of zeros, "
        f"{args.base_dtype or 'bf16'}, one rank",
        rows,
        figure=figure,
        bar=bar,
        holds=holds,
        json_file=args.json,
    )
    sys.exit(not holds)


def prepare(work: Path, family: str) -> None:
    """The checkpoint of zeros, a manifest of the shortest shipped clips, the sample codec fitted on them."""
    from higgs_ds.codec.sample import SampleCodec
    from higgs_ds.data.audio import duration_sec, read_audio
    from higgs_ds.data.manifest import read_manifest
    from higgs_ds.model.higgs_v2 import tiny as v2
    from higgs_ds.model.higgs_v3 import tiny as v3

    {"v2": v2, "v3": v3}[family].write_zeros(work / "base")
    rows, _ = read_manifest(SPEECH / "manifest.jsonl")
    texts = [json.loads(line)["text"] for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    clips = [row.audio_refs[-1][1] for row in rows]
    shortest = sorted(range(len(rows)), key=lambda i: duration_sec(clips[i]))[:ROWS]
    lines = [json.dumps({"audio": str(clips[i].path), "text": texts[i]}) for i in shortest]
    (work / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    SampleCodec.fit([read_audio(clip) for clip in clips]).save(work / "codec")


def rehearse(work: Path, stage: int, family: str, base_dtype: str | None) -> dict:
    """One run of `train_ds.py`, watched from outside; what it took and what its losses were."""
    out = work / f"zero{stage}"
    words = {
        "train_manifest": work / "train.jsonl",
        "base_ckpt": work / "base",
        "codec": work / "codec",
        "codes_cache": work / "codes",
        "output_dir": out,
        "deepspeed_config": ROOT / f"ds_configs/zero{stage}.json",
        "dtype": "bf16",
        "base_dtype": base_dtype or "none",
        "batch_size": ROWS,
        "max_steps": 1,
        "num_workers": 0,
        "wandb_mode": "disabled",
    }
    flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    planned_gb = planned(flags)
    seconds, peak_gb = watched([str(ROOT / "train_ds.py"), *flags])
    metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    books = [metrics[f"train/codebook_loss/{k}"] for k in range(8)]
    text_loss = metrics.get("train/text_loss", 0.0)  # which Higgs TTS 3 does not have
    off = max(abs(text_loss - TEXT_LOSS[family]), *(abs(loss - AUDIO_LOSS) for loss in books))
    tensors, values = adapter_size(out / "adapter")
    return {
        "stage": f"ZeRO-{stage}",
        "seconds": seconds,
        "peak memory, GB": peak_gb,
        "planned, GB": planned_gb,
        "text loss": f"{text_loss:.3f}",
        "audio loss": f"{metrics['train/audio_loss']:.3f}",
        "off by": off,
        "LoRA tensors": tensors,
        "trained values": f"{values:,}",
        "losses as expected": off < 1e-3 and (tensors, values) == LORA[family],
    }


def planned(flags: list[str]) -> float:
    """GB by the arithmetic of `python -m higgs_ds plan`, all rows in one micro-batch."""
    from higgs_ds.distributed.ds_config import LayerSizes, read_deepspeed_config, resolve
    from higgs_ds.model.families import family_of, open_base
    from higgs_ds.model.memory import Load, RankMemory, Weights
    from higgs_ds.options.parse import parse_args
    from higgs_ds.tools.plan import read_rows

    config = parse_args(flags)
    base = open_base(config.model.base_ckpt)
    raw, layer = read_deepspeed_config(config.run.deepspeed_config), LayerSizes.from_spec(base.spec)
    ds_config = resolve(raw, config, world_size=1, on_cpu=True, layer=layer)
    _, tokens, learned, _ = read_rows(config, base)
    weights = Weights.of(family_of(base), base.config, config)
    load = Load(int(tokens.sum()), learned, len(tokens) * tokens.max() / tokens.sum())
    return RankMemory(config, base.spec, weights, ds_config, 1, on_gpu=False).total(load) / 1e9


def merge(work: Path, adapter: Path) -> dict:
    """The adapter merged into the base, written and read back."""
    family = [] if (work / "base/model.safetensors").exists() else ["--layout", "boson"]
    places = ["--base_ckpt", work / "base", "--adapter", adapter, "--output_dir", work / "merged", *family]
    seconds, peak_gb = watched(["-m", "higgs_ds", "merge", *map(str, places)])
    return {"stage": "merge", "seconds": seconds, "peak memory, GB": peak_gb}


def watched(words: list[str]) -> tuple[float, float]:
    """Seconds and peak memory, GB, of a command of Python's; one that fails ends everything."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(os.cpu_count())}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], env=env, cwd=ROOT)
    peak = Peak(process.pid)
    if process.wait() != 0:
        sys.exit(f"{' '.join(words)} ended with code {process.returncode}")
    return time.perf_counter() - started, peak.stop()


def adapter_size(folder: Path) -> tuple[int, int]:
    """Tensors and values of the adapter that a run left."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118 - no mapping
    return len(shapes), sum(math.prod(shape) for shape in shapes)


class Peak:
    """The most memory that a process has held: its own, and its share of the files that it has mapped."""

    def __init__(self, pid: int):
        self._file = Path(f"/proc/{pid}/smaps_rollup")
        self._most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            try:
                lines = self._file.read_text().splitlines()
            except OSError:
                return
            self._most = max(self._most, *(int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)

    def stop(self) -> float:
        """GB, decimal."""
        self._done.set()
        self._thread.join()
        return self._most * 1024 / 1e9


def available_gb() -> float:
    """Memory that could be had now, GB, decimal."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e9


if __name__ == "__main__":
    main()
