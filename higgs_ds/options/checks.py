"""Contradictions between options that are each right by themselves."""

from __future__ import annotations

from .sections import TrainConfig

# Pairs of options that say one thing in two ways: a flag for one wins over the file's other.
EITHER_OR = (
    *(("warmup_ratio", "warmup_steps"), ("warmup_steps", "warmup_ratio")),
    *(("batch_size", "max_tokens_per_batch"), ("max_tokens_per_batch", "batch_size")),
)


def contradictions(config: TrainConfig) -> list[str]:
    """A line for each."""
    loss, optim, problems = config.loss, config.optim, []
    if loss.text_loss_weight == 0 and loss.audio_loss_weight == 0:
        problems.append("--text_loss_weight, --audio_loss_weight: both are 0, so there is no loss to train on")
    if loss.codebook_weights is not None and sum(loss.codebook_weights) <= 0:
        problems.append(f"--codebook_weights: {loss.codebook_weights} sum to 0; give at least one above 0")
    if config.run.early_stop is not None and config.data.val_manifest is None:
        problems.append("--early_stop: there is nothing to validate on; give --val_manifest with it")
    run = config.run
    if (run.sample_every or run.sample_count) and not (run.sample_texts or config.data.val_manifest):
        flag = "--sample_every" if run.sample_every else "--sample_count"
        problems.append(f"{flag}: there is nothing to speak; give --sample_texts or --val_manifest with it")
    if run.sample_texts and not (run.sample_every or config.data.val_manifest):
        problems.append("--sample_texts: when is not said; give --sample_every or --val_manifest with it")
    if config.lora.lora_dora:
        problems.append(
            "--lora_dora: not supported: DoRA scales each row of the weight by a learned size, which the fused layers, "
            "merge and export, all of plain LoRA, do not compute; --lora_rslora is the other way to a larger rank"
        )
    if optim.max_tokens_per_batch is not None and optim.batch_size not in (None, 1):
        problems.append("--batch_size, --max_tokens_per_batch: one counts rows, the other tokens; leave one out")
    if optim.warmup_steps is None and optim.warmup_ratio is None:
        problems.append("--warmup_ratio: needs a value, 0 for no warm-up")
    if optim.warmup_steps is not None and optim.warmup_ratio is not None and "warmup_ratio" in config.given:
        problems.append("--warmup_steps, --warmup_ratio: both say how long the warm-up is; leave one out")
    return problems + _forward_problems(config)


def _forward_problems(config: TrainConfig) -> list[str]:
    """A line for each loss or recomputation that upstream's forward does not have."""
    if config.model.forward_impl != "upstream":
        return []
    problems = []
    if config.loss.loss_impl == "fused":
        problems.append(
            "--forward_impl upstream: upstream's forward computes the logits of every position itself; "
            "give --loss_impl reference with it"
        )
    if config.model.checkpoint_every:
        problems.append("--activation_checkpointing: upstream's forward has none; use --forward_impl padding_free")
    if config.model.compile:
        problems.append("--compile: upstream's forward is not compiled; use --forward_impl padding_free")
    return problems
