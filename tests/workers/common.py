"""The parts of a run, built as `train_ds.py` builds them, for workers that look inside."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from higgs_ds.batching.batch_plan import Plan
from higgs_ds.batching.collate import Collator
from higgs_ds.batching.loader import MicroBatches, load_windows
from higgs_ds.codec.base import load_codec
from higgs_ds.config import PROJECT_ROOT
from higgs_ds.corpus.code_cache import CodeCache
from higgs_ds.corpus.manifest import Row, read_manifest
from higgs_ds.distributed.ds_config import resolve
from higgs_ds.distributed.engine import Engine, Ranks, loading
from higgs_ds.guard import Guard
from higgs_ds.loss import LossWeights
from higgs_ds.model import base as model
from higgs_ds.model.forward import training_forward
from higgs_ds.parse import parse_args
from higgs_ds.schedule import learning_rate
from higgs_ds.trainer import Trainer


def speech_rows(count: int) -> list[Row]:
    rows, faults = read_manifest(PROJECT_ROOT / "examples/speech/manifest.jsonl")
    assert not faults
    return rows[:count]


def without_text_labels(batch):
    """The same batch where nothing of the text is learned."""
    batch = dataclasses.replace(batch, label_ids=torch.full_like(batch.label_ids, -100))
    if batch.layout is not None:
        layout = batch.layout
        rows = layout.head_rows[len(layout.text_targets) :]
        batch.layout = dataclasses.replace(layout, head_rows=rows, text_targets=layout.text_targets[:0])
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
    dataset: MicroBatches
    engine: Engine
    guard: Guard
    trainer: Trainer
    weights: LossWeights
    broken: str | None = None

    def batches(self, *, last_step: int, first_step: int = 1):
        windows = list(self.plan.windows(self.ranks.rank, first_step, last_step))
        return load_windows(self.dataset, windows, num_workers=0)


def build(
    ranks: Ranks,
    base_dir: Path,
    codec_dir: Path,
    cache_dir: Path,
    rows: list[Row],
    *,
    stage: int,
    batch_size: int = 1,
    grad_accum: int = 1,
    total_steps: int = 3,
    dtype: str = "fp32",
    on_bad_loss: str = "raise",
    lr: float = 1e-2,
    ds_file: str | None = None,
    wrap_model=None,
    forward_impl: str = "padding_free",
    loss_impl: str = "fused",
    checkpoint_every: int = 0,
) -> Run:
    flags = {
        "train_manifest": "unused",
        "output_dir": cache_dir,
        "batch_size": batch_size,
        "grad_accum": grad_accum,
        "dtype": dtype,
        "lr": lr,
        "lora_r": 8,
        "lora_dropout": 0.0,
        "weight_decay": 0.01,
    }
    config = parse_args([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    raw = json.loads((PROJECT_ROOT / (ds_file or f"ds_configs/zero{stage}.json")).read_text())
    model_config = model.read_model_config(base_dir)
    ds_config = resolve(raw, config, world_size=ranks.world_size, on_cpu=True, layer=model.layer_sizes(model_config))
    with loading(ds_config):
        base = model.load_base(base_dir, model_config, config.model.dtype)
    lora_model = model.attach_lora(
        base,
        rank=config.lora.lora_r,
        alpha=config.lora.lora_alpha,
        dropout=config.lora.lora_dropout,
        target_modules=config.lora.lora_target_modules,
        seed=config.optim.seed,
        base_name=str(base_dir),
    )
    if wrap_model is not None:
        lora_model = wrap_model(lora_model)
    engine = Engine(
        training_forward(
            lora_model,
            model_config,
            forward_impl=forward_impl,
            loss_impl=loss_impl,
            checkpoint_every=checkpoint_every,
        ),
        ds_config,
        weight_decay=config.optim.weight_decay,
        max_grad_norm=config.optim.max_grad_norm,
    )
    weights = LossWeights.of(1.0, 1.0, None, model_config.audio_num_codebooks)
    guard = Guard(
        rank=ranks.rank,
        output_dir=cache_dir,
        audio_out_token=model_config.audio_out_token_idx,
        max_code=model_config.audio_codebook_size + 1,
        weights=weights,
    )
    cache = CodeCache(cache_dir / "codes_cache", load_codec(str(codec_dir)))
    refs = [ref for row in rows for _, ref in row.audio_refs]
    problems = cache.ensure(refs, shard=ranks.rank, num_shards=ranks.world_size)
    assert not any(ranks.gather(problems)), problems
    plan = Plan(
        len(rows), batch_size=batch_size, grad_accum=grad_accum, world_size=ranks.world_size, seed=config.optim.seed
    )
    trainer = Trainer(
        engine=engine,
        ranks=ranks,
        guard=guard,
        weights=weights,
        learning_rate=partial(learning_rate, peak=lr, total_steps=total_steps, warmup_ratio=0.0, shape="constant"),
        on_bad_loss=on_bad_loss,
        log_every=1,
        total_steps=total_steps,
        eval_every=10**9,
    )
    collator = Collator.of(model_config, with_layout=forward_impl == "padding_free")
    dataset = MicroBatches(rows, model.load_tokenizer(base_dir), cache, collator)
    return Run(ranks, plan, dataset, engine, guard, trainer, weights)
