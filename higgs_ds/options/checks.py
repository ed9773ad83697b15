"""Contradictions between individually valid options."""

from __future__ import annotations

from .sections import TrainConfig

# Alternative options for the same setting: a flag for one overrides the other in the YAML file.
EITHER_OR = (
    *(("warmup_ratio", "warmup_steps"), ("warmup_steps", "warmup_ratio")),
    *(("batch_size", "max_tokens_per_batch"), ("max_tokens_per_batch", "batch_size")),
)


def contradictions(config: TrainConfig) -> list[str]:
    """Lists contradictions, a line each."""
    loss, optim, problems = config.loss, config.optim, []
    if loss.text_loss_weight == 0 and loss.audio_loss_weight == 0:
        problems.append("--text_loss_weight, --audio_loss_weight: both are 0, so there is no loss to train on")
    if loss.codebook_weights is not None and sum(loss.codebook_weights) <= 0:
        problems.append(f"--codebook_weights: {loss.codebook_weights} sum to 0; give at least one above 0")
    run = config.run
    if run.early_stop is not None and run.best_by == "loss" and config.data.val_manifest is None:
        problems.append("--early_stop: there is nothing to validate on; give --val_manifest with it")
    judge = {"loss": None, "wer": "words", "similarity": "voice"}[run.best_by]
    if judge and judge not in (run.judges or ()):
        problems.append(f"--best_by: {run.best_by} is the figure of a judge; give --judges {judge} with it")
    if run.judges and not (run.sample_every or run.sample_texts or run.sample_count):
        problems.append("--judges: there are no samples to judge; give --sample_count or --sample_texts with it")
    if (run.sample_every or run.sample_count) and not (run.sample_texts or config.data.val_manifest):
        flag = "--sample_every" if run.sample_every else "--sample_count"
        problems.append(f"{flag}: there is nothing to speak; give --sample_texts or --val_manifest with it")
    if run.sample_texts and not (run.sample_every or config.data.val_manifest):
        problems.append("--sample_texts: no time for samples; give --sample_every or --val_manifest with it")
    if config.lora.lora_dora:
        problems.append(
            "--lora_dora: not supported: DoRA scales each row of the weight by a learned magnitude, which the fused "
            "layers, merge and export do not compute; for larger ranks use --lora_rslora"
        )
    if optim.max_tokens_per_batch is not None and optim.batch_size not in (None, 1):
        problems.append("--batch_size, --max_tokens_per_batch: one counts rows, the other tokens; give one of them")
    if optim.warmup_steps is None and optim.warmup_ratio is None:
        problems.append("--warmup_ratio: needs a value, 0 for no warm-up")
    if optim.warmup_steps is not None and optim.warmup_ratio is not None and "warmup_ratio" in config.given:
        problems.append("--warmup_steps, --warmup_ratio: both set the length of the warm-up; give one of them")
    return problems + _forward_problems(config)


def _forward_problems(config: TrainConfig) -> list[str]:
    """Lists options that upstream's forward does not support."""
    if config.model.forward_impl != "upstream":
        return []
    problems = []
    if config.loss.loss_impl == "fused":
        problems.append(
            "--forward_impl upstream: upstream's forward computes the logits of every position itself; "
            "give --loss_impl reference with it"
        )
    if config.model.checkpoint_every:
        problems.append(
            "--activation_checkpointing: not available with upstream's forward; use --forward_impl padding_free"
        )
    if config.model.compile:
        problems.append("--compile: not available with upstream's forward; use --forward_impl padding_free")
    return problems
