"""The parts of a run, built by `higgs_ds.run` as `train_ds.py` has them built, for workers that look inside."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from higgs_ds import run as assembly
from higgs_ds.batching.batch_plan import Plan
from higgs_ds.batching.loader import MicroBatches
from higgs_ds.data.manifest import Row, read_manifest
from higgs_ds.distributed.engine import Engine
from higgs_ds.distributed.ranks import NoWatch, Ranks
from higgs_ds.files import write_text
from higgs_ds.guard import Guard
from higgs_ds.load_data import Data, load_data
from higgs_ds.loss import LossWeights
from higgs_ds.options.parse import parse_args
from higgs_ds.options.sections import PROJECT_ROOT
from higgs_ds.setup import open_setup
from higgs_ds.trainer import Trainer

SPEECH = PROJECT_ROOT / "examples/speech"


def speech_rows(count: int) -> list[Row]:
    rows, faults = read_manifest(PROJECT_ROOT / "examples/speech/manifest.jsonl")
    assert not faults
    return rows[:count]


def without_text_labels(batch):
    """The same batch where nothing of the text is learned."""
    batch = dataclasses.replace(batch, label_ids=torch.full_like(batch.label_ids, -100))
    if batch.index is not None:
        index = batch.index
        rows = index.head_rows[len(index.text_targets) :]
        batch.index = dataclasses.replace(index, head_rows=rows, text_targets=index.text_targets[:0])
    return batch


def with_lora_b(model):
    """LoRA with B drawn at random: B is zero at the start, where A would get no gradient."""
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


@dataclass
class Run:
    ranks: Ranks
    plan: Plan
    data: Data
    dataset: MicroBatches
    engine: Engine
    guard: Guard
    trainer: Trainer
    weights: LossWeights
    broken: str | None = None

    def batches(self, *, last_step: int, first_step: int = 1):
        with self.data.steps(first_step, last_step) as steps:
            yield from steps


def build(
    ranks: Ranks,
    base_dir: Path,
    codec_dir: Path,
    cache_dir: Path,
    count: int,
    *,
    stage: int = 2,
    total_steps: int = 3,
    ds_file: str | None = None,
    wrap_model=None,
    **flags,
) -> Run:
    """A run over the first `count` rows of the shipped speech, at a constant learning rate, without dropout.

    `flags` are those of `train_ds.py`.
    """
    manifest = cache_dir / f"first-{count}.jsonl"
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()[:count]]
    lines = [json.dumps(row | {"audio": str(SPEECH / row["audio"])}) + "\n" for row in rows]
    write_text(manifest, "".join(lines))  # by every rank, the same
    settings = {
        "train_manifest": manifest,
        "output_dir": cache_dir,
        "base_ckpt": base_dir,
        "codec": codec_dir,
        "num_workers": 0,
        "batch_size": 1,
        "max_steps": total_steps,
        "epochs": 1000,
        "dtype": "fp32",
        "lr": 1e-2,
        "lr_scheduler": "constant",
        "warmup_ratio": 0,
        "lora_r": 8,
        "lora_dropout": 0.0,
        "weight_decay": 0.01,
    }
    config = parse_args([word for name, value in (settings | flags).items() for word in (f"--{name}", str(value))])
    raw = json.loads((PROJECT_ROOT / (ds_file or f"ds_configs/zero{stage}.json")).read_text())
    watch = NoWatch()
    setup = open_setup(config, raw, ranks, watch)
    data = load_data(setup, ranks, watch)
    engine = assembly.load_model(setup, ranks, watch, **({"wrap": wrap_model} if wrap_model else {}))
    trainer = assembly.make_trainer(setup, data, engine, ranks, watch)
    trainer.eval_every = 10**9
    dataset = data.dataset(data.corpus.train_rows)
    return Run(ranks, data.plan, data, dataset, engine, trainer.guard, trainer, setup.weights)
