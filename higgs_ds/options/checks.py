"""What is wrong between options that are each right by themselves."""

from __future__ import annotations

import math

from ..errors import ConfigError, shown
from ..model.higgs_v2.modules import HEADS
from .sections import TrainConfig, revision_of

# Of two options that say one thing, each in its way, and the other.
EITHER_OR = (
    *(("warmup_ratio", "warmup_steps"), ("warmup_steps", "warmup_ratio")),
    *(("batch_size", "max_tokens_per_batch"), ("max_tokens_per_batch", "batch_size")),
)


def cross_checks(config: TrainConfig) -> list[str]:
    """What is wrong between options, a line each; fills the revisions of Boson's own repositories, and gives manifests'
    weights one spelling."""
    problems = []
    try:
        if config.data.train_manifest is not None:
            config.data.train_manifest = list(map(str, config.data.portions))
    except ConfigError as error:
        problems += error.problems
    if config.loss.text_loss_weight == 0 and config.loss.audio_loss_weight == 0:
        problems.append("--text_loss_weight, --audio_loss_weight: both are 0, so there is no loss to train on")
    if config.loss.codebook_weights is not None:
        if any(weight < 0 for weight in config.loss.codebook_weights):
            problems.append(f"--codebook_weights: {config.loss.codebook_weights} holds a negative weight")
        elif not math.isfinite(sum(config.loss.codebook_weights)):
            problems.append(f"--codebook_weights: {config.loss.codebook_weights} sum to more than a float holds")
        elif sum(config.loss.codebook_weights) <= 0:
            problems.append(f"--codebook_weights: {config.loss.codebook_weights} sum to 0; give at least one above 0")
    problems += _forward_checks(config)
    if config.run.early_stop is not None and config.data.val_manifest is None:
        problems.append("--early_stop: there is nothing to validate on; give --val_manifest with it")
    if config.lora.lora_dora:
        problems.append(
            "--lora_dora: not supported: DoRA scales each row of the weight by a learned size, which the fused layers, "
            "merge and export, all of plain LoRA, do not compute; --lora_rslora is the other way to a larger rank"
        )
    if config.optim.max_tokens_per_batch is not None and config.optim.batch_size not in (None, 1):
        problems.append("--batch_size, --max_tokens_per_batch: one counts rows, the other tokens; leave one out")
    problems += _warmup_checks(config)
    config.model.base_revision = revision_of(config.model.base_ckpt, config.model.base_revision)
    config.data.codec_revision = revision_of(config.data.codec, config.data.codec_revision)
    return problems


def _warmup_checks(config: TrainConfig) -> list[str]:
    """One of ratio and steps says how long the warm-up is; the other then is None."""
    optim = config.optim
    if optim.warmup_steps is None:
        return ["--warmup_ratio: needs a value, 0 for no warm-up"] if optim.warmup_ratio is None else []
    if optim.warmup_ratio is not None and "warmup_ratio" in config.given:
        return ["--warmup_steps, --warmup_ratio: both say how long the warm-up is; leave one out"]
    optim.warmup_ratio = None
    return []


def _forward_checks(config: TrainConfig) -> list[str]:
    """Which forward, loss and recomputation go together."""
    problems = []
    recomputed = config.model.activation_checkpointing
    if recomputed != "none" and not config.model.checkpoint_every:
        problems.append(f"--activation_checkpointing: {shown(recomputed)} is not none, full or a whole number above 0")
    if config.model.forward_impl == "upstream":
        if config.loss.loss_impl == "fused":
            problems.append(
                "--forward_impl upstream: upstream's forward computes the logits of every position itself; "
                "give --loss_impl reference with it"
            )
        if recomputed != "none":
            problems.append("--activation_checkpointing: upstream's forward has none; use --forward_impl padding_free")
        if config.model.compile:
            problems.append("--compile: upstream's forward is not compiled; use --forward_impl padding_free")
    return problems + head_problems(config)


def head_problems(config: TrainConfig) -> list[str]:
    """LoRA on a head that is trained whole, or beside the fused loss, a line each."""
    problems = []
    for target in config.lora.target_suffixes:
        head = target.rsplit(".", 1)[-1]
        if head in config.lora.whole_modules:
            problems.append(f"--train_heads: {head} has LoRA already (--lora_target_modules); one of them trains it")
        elif head in HEADS and config.loss.loss_impl == "fused":
            problems.append(
                f"--lora_target_modules: LoRA on {target} would get no gradient from the fused loss; "
                "use --loss_impl reference"
            )
    return problems
