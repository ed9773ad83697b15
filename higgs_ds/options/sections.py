"""All options of a training run, in sections; filled in by `parse`.

An option's type, range, choices, help, aliases and behaviour on resume are all declared on its field. Nothing here
imports torch, so that a wrong flag is reported in a fraction of a second.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..data.portions import Portion, portions_of
from ..model.higgs_v2.modules import DEFAULT_LORA_TARGETS
from .option import FIXED, SAID, Other, Section, option, options_of

DEFAULT_BASE = "bosonai/higgs-tts-2-3b-base"
# Current and former name of the same repository on the hub.
BASE_NAMES = (DEFAULT_BASE, "bosonai/higgs-audio-v2-generation-3B-base")
DEFAULT_BASE_REVISION = "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
# The last revisions in boson_multimodal's layout; the hub's `main` has that of newer transformers.
DEFAULT_CODEC = "bosonai/higgs-audio-v2-tokenizer"
DEFAULT_CODEC_REVISION = "9d4988fbd4ad07b4cac3a5fa462741a41810dbec"
DEFAULT_WORDS, DEFAULT_VOICE = "openai/whisper-large-v3-turbo", "microsoft/wavlm-base-plus-sv"
PINNED_REVISIONS = {**dict.fromkeys(BASE_NAMES, DEFAULT_BASE_REVISION), DEFAULT_CODEC: DEFAULT_CODEC_REVISION}
PROJECT_ROOT = Path(__file__).resolve().parents[2]


def revision_of(name: str, given: str | None) -> str | None:
    """A hub repository's revision: the one given, else the pinned one of Boson's; None for the newest."""
    return given or PINNED_REVISIONS.get(name)


def _manifests(words: list[str] | None) -> list[str] | None:
    """Manifests with weights in canonical spelling."""
    return words and [str(portion) for portion in portions_of(words)]


def _layers(text: str) -> str:
    if text in ("none", "full") or re.fullmatch(r"[1-9][0-9]{0,8}", text):
        return text
    raise ValueError("should be none, full or a whole number above 0")


class DataOptions(Section):
    """Training data and its code cache."""

    train_manifest: Annotated[list[str] | None, AfterValidator(_manifests)] = option(
        None,
        "Training manifests, JSON or JSONL. PATH=WEIGHT over- or undersamples a manifest: 0.3 takes a new random 30 % "
        "each epoch, 2 takes every row twice.",
        required=True,
        verbatim=True,
        resume=SAID,
        min_length=1,
    )
    val_manifest: str | None = option(None, "Validation manifest.")
    codec: str = option(
        DEFAULT_CODEC,
        "Higgs audio tokenizer (hub id or folder), or a folder with the sample codec; Higgs TTS 3 bundles one, its "
        "default.",
        resume=SAID,
    )
    codec_revision: str | None = option(
        None, f"Hub revision of the codec (default for Boson's: {DEFAULT_CODEC_REVISION[:12]}…)."
    )
    codes_cache: str | None = option(
        None, "Cache folder for the encoded clips; runs can share it (default: codes_cache in --output_dir)."
    )
    max_duration_sec: float = option(30.0, "Longest accepted clip, in seconds.", gt=0, resume=SAID)
    max_row_tokens: int = option(8192, "Longest accepted row, in tokens (at most the model's context).", ge=1)
    reference_rate: float | None = option(
        None,
        "Fraction of speech rows that get a reference clip, redrawn each epoch: another clip of the same speaker, or "
        "the row's own ref_audio (default: as in the manifest).",
        ge=0,
        le=1,
        resume=SAID,
    )
    audio_root: str | None = option(
        None, "Base folder for clips, before the manifest's own folder and the working directory."
    )
    channel: int | None = option(
        None,
        "Channel of clips with several, from 0; -1: mix all (default: mix, if all hold the same).",
        ge=-1,
        resume=SAID,
    )
    audio_track: int | None = option(
        None, "Sound track of containers with several, from 0 (default: the only one).", ge=0, resume=SAID
    )
    prompt_style: Literal["served", "boson"] = option(
        "served",
        "Prompt format of speech rows. served: as in transformers and vllm-omni; boson: as in boson_multimodal's "
        "example, without a system turn before a reference.",
        resume=SAID,
    )
    skip_bad_rows: bool = option(False, "Skip invalid rows and report them, instead of refusing to train.")
    num_workers: int = option(
        2,
        "Data loading processes per rank (0: load in the training process).",
        ge=0,
        le=256,
        also="dataloader_num_workers",
    )

    @property
    def portions(self) -> list[Portion]:
        """Paths and weights in `train_manifest`."""
        return portions_of(self.train_manifest or ())


class ModelOptions(Section):
    """The base checkpoint and its computation."""

    base_ckpt: str = option(
        DEFAULT_BASE,
        "Base checkpoint, hub id or folder: Higgs Audio v2 (boson_multimodal's or transformers' layout), Higgs TTS 3.",
        also="model_name_or_path",
        resume=SAID,
    )
    base_revision: str | None = option(
        None, f"Hub revision of the base checkpoint (default for Boson's: {DEFAULT_BASE_REVISION[:12]}…).", resume=SAID
    )
    dtype: Literal["bf16", "fp16", "fp32"] = option(
        "bf16",
        "Compute precision.",
        resume=SAID,
        others={"bf16": Other({"true": "bf16", "false": "fp32 unless --fp16"}), "fp16": Other({"true": "fp16"})},
    )
    base_dtype: Literal["nf4"] | None = option(
        None,
        "Storage of the frozen decoder layers (default: --dtype). nf4: 4-bit, for GPUs up to 24 GB; not with ZeRO-3.",
        resume=SAID,
    )
    forward_impl: Literal["padding_free", "upstream"] = option(
        "padding_free",
        "padding_free: compute real tokens only, without GPU syncs; upstream: boson_multimodal's own forward.",
        resume=SAID,
    )
    activation_checkpointing: Annotated[str, AfterValidator(_layers)] = option(
        "none",
        "Recompute activations in the backward pass to save memory: in no layer (none), all (full) or every N-th (N).",
        others={"gradient_checkpointing": Other({"true": "full", "false": "none"})},
    )
    compile: bool = option(
        False,
        "Compile the decoder layers with torch.compile (on several ranks: ZeRO stage 0 or 1). Takes a minute or more "
        "at the start; the speed-up on GPUs has not been measured.",
        also="torch_compile",
    )

    @property
    def checkpoint_every(self) -> int:
        """`activation_checkpointing` as a number: 0 for none, 1 for every layer, N for every N-th."""
        named = {"none": 0, "full": 1}.get(self.activation_checkpointing)
        return int(self.activation_checkpointing) if named is None else named


class LoraOptions(Section):
    """Trainable weights."""

    lora_r: int = option(16, "LoRA rank.", ge=1, also="lora_rank", resume=FIXED)
    lora_alpha: float = option(32.0, "LoRA alpha; updates are scaled by alpha / r.", gt=0, le=1e6, resume=SAID)
    lora_rslora: bool = option(False, "Rank-stabilised LoRA: scale updates by alpha / sqrt(r) instead.", resume=SAID)
    lora_dora: bool = option(False, "DoRA: not supported.")
    train_audio_embeddings: bool = option(
        False,
        "Also train the audio code embeddings in full, at the same --lr; for sounds the base model does not know.",
        resume=FIXED,
    )
    train_heads: Literal["none", "audio", "text", "both"] = option(
        "none",
        "Also train output heads in full (no value: audio). On speech rows the text head (394 M parameters) only "
        "learns where clips start and end.",
        resume=FIXED,
        others={"train_heads": Other({"true": "audio", "false": "none"}, only=False)},
    )
    lora_dropout: float = option(0.05, "Dropout on the input of LoRA.", ge=0, lt=1, resume=SAID)
    lora_target_modules: list[str] = option(
        list(DEFAULT_LORA_TARGETS),
        "Linear layers that get LoRA: ends of their paths (q_proj, audio_mlp.up_proj, layers.3.self_attn.o_proj), or "
        "groups: attention, text_mlp, audio_mlp, all.",
        min_length=1,
        resume=FIXED,
    )
    init_adapter: str | None = option(
        None,
        "Start a new run from this adapter: its weights, rank, alpha, rslora, targets and fully trained modules (to "
        "continue a run: --resume).",
    )
    other_base: bool = option(False, "Accept an --init_adapter trained on a base other than --base_ckpt.")


class OptimOptions(Section):
    """Batches, steps and AdamW."""

    # If neither is given, the default depends on the device: see `batching/micro_batches.py`.
    batch_size: int | None = option(
        None,
        "Rows per rank and micro-batch (default on CPUs: 1).",
        ge=1,
        also="per_device_train_batch_size micro_batch_size",
    )
    max_tokens_per_batch: int | None = option(
        None,
        "Token budget per micro-batch of rows of similar length, instead of --batch_size (GPU default: 16384).",
        ge=1,
        resume=SAID,
    )
    grad_accum: int = option(1, "Micro-batches per optimizer step.", ge=1, also="gradient_accumulation_steps")
    epochs: float | None = option(
        None,
        "Passes over the training rows (default: 1, or as many as --max_steps takes).",
        gt=0,
        le=1e6,
        also="num_train_epochs num_epochs",
        resume=SAID,
    )
    max_steps: int | None = option(
        None, "Stop after this many optimizer steps, or after --epochs if that is sooner.", ge=1, resume=SAID
    )
    lr: float = option(2e-4, "Peak learning rate of AdamW.", gt=0, le=100, also="learning_rate", resume=SAID)
    lr_scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Learning rate schedule after warm-up.", also="lr_scheduler_type", resume=SAID
    )
    warmup_ratio: float | None = option(0.03, "Fraction of the schedule used for warm-up.", ge=0, lt=1, resume=SAID)
    warmup_steps: int | None = option(None, "Warm-up steps, instead of --warmup_ratio.", ge=0, resume=SAID)
    lr_schedule_steps: int | None = option(
        None, "Length of the learning rate schedule in steps (default: the run); the rate is constant after it.", ge=1
    )
    weight_decay: float = option(0.0, "AdamW weight decay of the trained parameters.", ge=0, le=1000, resume=SAID)
    max_grad_norm: float = option(
        1.0, "Gradient clipping norm (0: none).", ge=0, also="max_grad_norm_clip", resume=SAID
    )
    seed: int = option(42, "Seed for LoRA initialisation, data order and dropout.", ge=0, le=2**53 - 1, resume=SAID)


class LossOptions(Section):
    """Loss weights, and the reaction to a failed loss check."""

    text_loss_weight: float = option(1.0, "Weight of the text head's mean cross-entropy.", ge=0, le=1e6, resume=SAID)
    audio_loss_weight: float = option(1.0, "Weight of the audio head's mean cross-entropy.", ge=0, le=1e6, resume=SAID)
    codebook_weights: list[Annotated[float, Field(ge=0, le=1e6)]] | None = option(
        None, "Loss weight of each codebook, normalised to sum to 1 (default: equal).", min_length=1, resume=SAID
    )
    loss_impl: Literal["fused", "reference"] = option(
        "fused",
        "fused: computed in chunks of labelled positions, for heads without LoRA; reference: plain cross-entropy.",
    )
    on_bad_loss: Literal["raise", "skip"] = option(
        "raise", "When a loss check fails: raise ends the run (exit code 3), skip drops the step."
    )


class RunOptions(Section):
    """Output, checkpoints, time limits and logging."""

    deepspeed_config: str = option(
        "ds_configs/zero2.json", "DeepSpeed JSON file; sets the ZeRO stage.", also="deepspeed"
    )
    output_dir: str | None = option(None, "Folder for everything the run writes.", required=True)
    log_every: int = option(1, "Log every N optimizer steps.", ge=1, also="logging_steps")
    eval_every: int | None = option(
        None, "Validate every N optimizer steps (default: once per epoch).", ge=1, also="eval_steps val_steps"
    )
    sample_every: int | None = option(
        None, "Also speak samples every N optimizer steps (default: at validations, with the two options below).", ge=1
    )
    sample_texts: str | None = option(None, "File of texts to speak as samples while training, one per line.")
    sample_count: int | None = option(
        None, "Number of validation rows to speak as samples (default: none; 4 with --sample_every alone).", ge=1
    )
    judges: list[Literal["words", "voice", "sound"]] | None = option(
        None, "Judges of the samples: words (WER), voice (similarity), sound (DNSMOS) (default: none).", min_length=1
    )
    words: str = option(
        DEFAULT_WORDS, "Recogniser: pocketsphinx, or a folder (transformers' or faster-whisper's) or hub id of Whisper."
    )
    voice: str = option(DEFAULT_VOICE, "Judge of the voice: resemblyzer, or a folder or hub id of an x-vector model.")
    best_by: Literal["loss", "wer", "similarity"] = option(
        "loss", "Measure of --keep_best and --early_stop: the validation loss, or the judges' figure of the samples."
    )
    save_every: int | None = option(None, "Also save a checkpoint every N optimizer steps.", ge=1, also="save_steps")
    save_minutes: float = option(15.0, "Also save a checkpoint every N minutes (0: never by time).", ge=0)
    keep_last: int = option(3, "Number of checkpoints to keep; older ones are deleted.", ge=1, also="save_total_limit")
    keep_best: bool = option(
        True, "Also keep the checkpoint that is best by --best_by, and its adapter in adapter-best/."
    )
    early_stop: int | None = option(
        None, "Stop after this many validations (judged samples) without improvement (default: never).", ge=1
    )
    resume: str = option(
        "none",
        "Continue a run from a checkpoint folder; auto, or no value: from the newest intact one in --output_dir.",
        others=dict.fromkeys(
            ("resume", "resume_from_checkpoint"), Other({"true": "auto", "false": "none"}, only=False)
        ),
    )
    stall_timeout_sec: float | None = option(
        None,
        "End the run, naming the stuck rank, after this many seconds without progress (default: 300 on GPUs, where it "
        "must be below 600; 3600 on CPUs).",
        gt=0,
    )
    deterministic: bool = option(False, "Use deterministic GPU kernels, for bit-identical reruns; slower.")
    debug: bool = option(False, "Show the traceback behind an error line.")
    run_name: str | None = option(
        None, "Run name in W&B and in the plot (default: WANDB_NAME, or the name of --output_dir)."
    )
    wandb_project: str | None = option(None, "W&B project (default: WANDB_PROJECT, or higgs-ds).", also="project_name")
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = option(
        "auto",
        "auto: WANDB_MODE if set, else online with an API key and network, else offline.",
        others={"report_to": Other({"wandb": "auto", "none": "disabled"}, bare=None)},
    )


class TrainConfig(BaseModel):
    """The options of `train_ds.py`, in sections. Each is a flag (`--name`) and a YAML key.

    Immutable: `settled` makes a copy with other values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    lora: LoraOptions = LoraOptions()
    optim: OptimOptions = OptimOptions()
    loss: LossOptions = LossOptions()
    run: RunOptions = RunOptions()

    @property
    def output_dir(self) -> Path:
        """`--output_dir`, required of every run."""
        assert self.run.output_dir is not None
        return Path(self.run.output_dir)

    @property
    def given(self) -> frozenset[str]:
        """Options given by flag or YAML; the others may be taken from a checkpoint or adapter."""
        return frozenset().union(*(getattr(self, name).model_fields_set for name in type(self).model_fields))

    def get(self, name: str) -> Any:
        """The value of an option by name."""
        return getattr(getattr(self, OPTIONS[name].section), name)

    def settled(self, **values: Any) -> TrainConfig:
        """A copy with other values of some options, by name; unvalidated, with the same `given`."""
        sections: dict[str, Section] = {}
        for section in {OPTIONS[name].section for name in values}:
            old: Section = getattr(self, section)
            own = {name: value for name, value in values.items() if OPTIONS[name].section == section}
            sections[section] = old.model_construct(set(old.model_fields_set), **{**dict(old), **own})
        return self.model_copy(update=sections)

    def as_dict(self) -> dict[str, Any]:
        """All options by name as plain values, as in `config.yaml`."""
        return {name: self.get(name) for name in OPTIONS}


OPTIONS = options_of(TrainConfig)
ALIASES = {alias: name for name, known in OPTIONS.items() for alias in known.also}
OTHERS = {theirs: (name, other) for name, known in OPTIONS.items() for theirs, other in known.others.items()}
SHAPE_OPTIONS = tuple(name for name, known in OPTIONS.items() if known.resume == FIXED)
TRAJECTORY_OPTIONS = tuple(name for name, known in OPTIONS.items() if known.resume == SAID)
