"""Every option of a training run, in sections that travel whole; `parse` fills them.

Nothing here imports torch, so that a wrong flag is reported in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..data.portions import Portion, portions_of
from ..model.higgs_v2.modules import DEFAULT_LORA_TARGETS, EMBEDDINGS, LORA_TARGET_GROUPS, TRAINED_HEADS

DEFAULT_BASE = "bosonai/higgs-tts-2-3b-base"
# One repository, with the same revisions, which the hub knows by its name of today and by the one that it had before.
BASE_NAMES = (DEFAULT_BASE, "bosonai/higgs-audio-v2-generation-3B-base")
DEFAULT_BASE_REVISION = "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
# The last revisions that boson_multimodal can read: the hub's `main` is in the layout of newer transformers.
DEFAULT_CODEC = "bosonai/higgs-audio-v2-tokenizer"
DEFAULT_CODEC_REVISION = "9d4988fbd4ad07b4cac3a5fa462741a41810dbec"
PINNED_REVISIONS = {**dict.fromkeys(BASE_NAMES, DEFAULT_BASE_REVISION), DEFAULT_CODEC: DEFAULT_CODEC_REVISION}
PROJECT_ROOT = Path(__file__).resolve().parents[2]

ALIASES = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "deepspeed": "deepspeed_config",
    "model_name_or_path": "base_ckpt",
    "max_grad_norm_clip": "max_grad_norm",
    "lr_scheduler_type": "lr_scheduler",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "val_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_last",
    "project_name": "wandb_project",
    "lora_rank": "lora_r",
    "dataloader_num_workers": "num_workers",
    "torch_compile": "compile",
}


def revision_of(name: str, given: str | None) -> str | None:
    """Which revision of a repository on the hub: the one given, else Boson's pinned one; None is the newest."""
    return given or PINNED_REVISIONS.get(name)


def _option(default, text: str, **rules):
    """A field with its help and the rules that a value must meet: choices, least, most, above, below, required.

    `whole`: the words of a list are taken as they are, with whatever blanks and commas are in them.
    """
    metadata = {"help": text, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataOptions:
    """What is trained on, and where its codes are kept."""

    train_manifest: list[str] | None = _option(
        None,
        "JSON or JSONL manifests of training rows; one of another weight than 1 as PATH=WEIGHT: an epoch takes so "
        "many times its rows, drawn anew where that is no whole number",
        required=True,
        whole=True,
    )
    val_manifest: str | None = _option(None, "manifest of validation rows")
    codec: str = _option(DEFAULT_CODEC, "Higgs audio tokenizer (hub id or folder), or a folder of the sample codec")
    codec_revision: str | None = _option(None, f"revision of a hub codec (Boson's: {DEFAULT_CODEC_REVISION[:12]}…)")
    codes_cache: str | None = _option(
        None, "folder of the clips' codes; several runs may share one (default: codes_cache in --output_dir)"
    )
    max_duration_sec: float = _option(30.0, "longest clip that is accepted, seconds", above=0)
    max_row_tokens: int = _option(
        8192, "longest row that is accepted, in tokens; never more than the model has positions", least=1
    )
    reference_rate: float | None = _option(
        None,
        "share of the speech rows that carry a reference, drawn anew each epoch: another clip of their speaker, or "
        "their own (default: as the manifest has them)",
        least=0,
        most=1,
    )
    audio_root: str | None = _option(
        None, "folder that paths are relative to which are not beside their manifest (default: working folder)"
    )
    prompt_style: str = _option(
        "served",
        "prompt of speech rows. served: as transformers and vllm-omni build it, a system turn always; boson: as "
        "boson_multimodal's example, which has none before a reference clip",
        choices=("served", "boson"),
    )
    skip_bad_rows: bool = _option(False, "train without the rows that fail their check, and say which")
    num_workers: int = _option(2, "processes a rank that prepare batches (0: the training process)", least=0, most=256)

    @property
    def portions(self) -> list[Portion]:
        """`train_manifest` read: paths and weights."""
        return portions_of(self.train_manifest)


@dataclass
class ModelOptions:
    """The base checkpoint, and how it is computed."""

    base_ckpt: str = _option(
        DEFAULT_BASE, "base checkpoint: hub id or folder, in boson_multimodal's or transformers' layout"
    )
    base_revision: str | None = _option(None, f"revision of a hub checkpoint (Boson's: {DEFAULT_BASE_REVISION[:12]}…)")
    dtype: str = _option("bf16", "what the model computes in", choices=("bf16", "fp16", "fp32"))
    base_dtype: str | None = _option(
        None,
        "how the decoder's frozen layers are kept (default: in --dtype). nf4: in 4.5 bits a weight, for GPUs of 24 GB "
        "and less; ZeRO stages 0 to 2",
        choices=("nf4",),
    )
    forward_impl: str = _option(
        "padding_free",
        "padding_free: real tokens alone, without waiting for the GPU; upstream: boson_multimodal's own forward",
        choices=("padding_free", "upstream"),
    )
    activation_checkpointing: str = _option(
        "none",
        "decoder layers whose activations are recomputed in the backward: none, full, or N for every N-th",
    )

    compile: bool = _option(
        False,
        "torch.compile of the decoder layers (on several ranks: stage 0 or 1); compiling takes a minute or more; "
        "the gain on a GPU is unmeasured",
    )

    @property
    def checkpoint_every(self) -> int:
        """`activation_checkpointing` as a number: 0 for none, 1 for every layer, N for every N-th."""
        return {"none": 0, "full": 1}.get(self.activation_checkpointing) or _whole(self.activation_checkpointing)


@dataclass
class LoraOptions:
    """What trains."""

    lora_r: int = _option(16, "LoRA rank", least=1)
    lora_alpha: float = _option(32.0, "LoRA alpha; updates are scaled by alpha / r", above=0, most=1e6)
    lora_rslora: bool = _option(False, "rank-stabilised LoRA: updates are scaled by alpha / sqrt(r) instead")
    lora_dora: bool = _option(False, "not supported: DoRA is refused, with the reason")
    train_audio_embeddings: bool = _option(
        False, "train the embeddings of the audio codes whole, beside LoRA, at the same --lr; for sounds that are new"
    )
    train_heads: str = _option(
        "none",
        "train a head whole, beside LoRA, at the same --lr. Alone it means audio, which says the codes. The text head "
        "is large (394 M values), and a spoken row teaches it no more than to begin and to end a clip",
        choices=tuple(TRAINED_HEADS),
    )
    lora_dropout: float = _option(0.05, "dropout before the LoRA branch", least=0, below=1)
    lora_target_modules: list[str] = _option(
        list(DEFAULT_LORA_TARGETS),
        "linear layers that get LoRA: by the end of their path (q_proj, audio_mlp.up_proj, layers.3.self_attn.o_proj), "
        "or attention, text_mlp, audio_mlp, all",
    )
    init_adapter: str | None = _option(
        None,
        "start from this adapter's weights, with its rank, alpha, rslora, targets and whole modules: a new run, not a "
        "resume",
    )
    other_base: bool = _option(False, "--init_adapter was trained on another base than --base_ckpt")

    @property
    def target_suffixes(self) -> list[str]:
        """`lora_target_modules` with the names of `LORA_TARGET_GROUPS` written out, each once."""
        suffixes = [s for name in self.lora_target_modules for s in LORA_TARGET_GROUPS.get(name, (name,))]
        return list(dict.fromkeys(suffixes))

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """The modules that are trained whole, by the end of their path."""
        return ((EMBEDDINGS,) if self.train_audio_embeddings else ()) + TRAINED_HEADS[self.train_heads]


@dataclass
class OptimOptions:
    """Batches, steps and AdamW."""

    # None: not given. Which of the two holds then is settled once the device is known: see `batching/micro_batches.py`.
    batch_size: int | None = _option(None, "rows a rank and micro-batch (default on a CPU: 1)", least=1)
    max_tokens_per_batch: int | None = _option(
        None,
        "micro-batches of at most so many tokens, of rows of similar length, instead of --batch_size rows "
        "(default on a GPU, where --batch_size is not given: 16384)",
        least=1,
    )
    grad_accum: int = _option(1, "micro-batches an optimizer step", least=1)
    epochs: float | None = _option(
        None, "passes over the training rows (default: 1, or as many as --max_steps takes)", above=0, most=1e6
    )
    max_steps: int | None = _option(None, "optimizer steps of the run; with --epochs the fewer of both", least=1)
    lr: float = _option(2e-4, "peak learning rate of AdamW", above=0, most=100)
    lr_scheduler: str = _option("cosine", "shape after warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float | None = _option(0.03, "share of the schedule's steps that warm up", least=0, below=1)
    warmup_steps: int | None = _option(None, "steps that warm up, instead of --warmup_ratio", least=0)
    lr_schedule_steps: int | None = _option(
        None,
        "steps that the learning rate's schedule spans (default: the run's); after them it stays where it is",
        least=1,
    )
    weight_decay: float = _option(0.0, "AdamW weight decay of what trains", least=0, most=1000)
    max_grad_norm: float = _option(1.0, "gradient clipping, 0 for none", least=0)
    seed: int = _option(42, "LoRA initialisation, order of the data, dropout", least=0, most=2**53 - 1)


@dataclass
class LossOptions:
    """Weights of the loss, and what happens where it is not real."""

    text_loss_weight: float = _option(1.0, "weight of the text head's mean cross-entropy", least=0, most=1e6)
    audio_loss_weight: float = _option(1.0, "weight of the audio head's mean cross-entropy", least=0, most=1e6)
    codebook_weights: list[float] | None = _option(None, "one weight a codebook, scaled to sum 1 (default: equal)")
    loss_impl: str = _option(
        "fused",
        "fused: labelled rows in chunks, for heads without LoRA; reference: plain cross-entropy on their logits",
        choices=("fused", "reference"),
    )
    on_bad_loss: str = _option(
        "raise", "a failed loss check ends the run (code 3) or drops the step", choices=("raise", "skip")
    )


@dataclass
class RunOptions:
    """Files, checkpoints, clocks and curves."""

    deepspeed_config: str = _option("ds_configs/zero2.json", "DeepSpeed JSON; swap the file to swap the ZeRO stage")
    output_dir: str | None = _option(None, "where the run's files go", required=True)
    log_every: int = _option(1, "optimizer steps between two logged points", least=1)
    eval_every: int | None = _option(None, "optimizer steps between two validations (default: once an epoch)", least=1)
    save_every: int | None = _option(None, "optimizer steps between two checkpoints, beside --save_minutes", least=1)
    save_minutes: float = _option(15.0, "minutes between two checkpoints, beside --save_every; 0: not by time", least=0)
    keep_last: int = _option(3, "checkpoints that are kept; older ones are removed", least=1)
    keep_best: bool = _option(
        True, "keep the checkpoint with the lowest validation loss too, and its adapter as adapter-best/"
    )
    early_stop: int | None = _option(
        None, "validations in a row without a lower loss, after which the run ends (default: it does not)", least=1
    )
    resume: str = _option(
        "none",
        "auto, or no value: go on from the newest whole checkpoint of --output_dir; none; or a checkpoint's folder",
    )
    stall_timeout_sec: float | None = _option(
        None,
        "seconds without progress on any rank, after which all ranks end and say who is stuck; below 600 on GPUs "
        "(default: 300 on GPUs, 3600 on CPUs, where a single pass over a large model takes many minutes)",
        above=0,
    )
    deterministic: bool = _option(
        False, "kernels that give the same numbers twice, which a GPU's fastest do not; slower"
    )
    run_name: str | None = _option(
        None, "name of the run in W&B and on the plot (default: WANDB_NAME, or --output_dir's)"
    )
    wandb_project: str | None = _option(None, "W&B project (default: WANDB_PROJECT, or higgs-ds)")
    wandb_mode: str = _option(
        "auto",
        "auto: WANDB_MODE, or online with a key and a network, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )


@dataclass
class TrainConfig:
    """The options of `train_ds.py` in sections, which travel whole. An option is a flag (`--name`) and a YAML key."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    run: RunOptions = field(default_factory=RunOptions)
    # Names of the options that a flag or the YAML file gave; the others may be filled by what a run starts from.
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def get(self, name: str):
        """The value of an option by its flag's name."""
        return getattr(getattr(self, OPTIONS[name].section), name)

    def set(self, name: str, value) -> None:
        """Sets an option by its flag's name; nothing is checked."""
        setattr(getattr(self, OPTIONS[name].section), name, value)

    def as_dict(self) -> dict:
        """All options by their flags' names as plain values, as saved in `config.yaml`."""
        return {name: self.get(name) for name in OPTIONS}


class Option(NamedTuple):
    """One option: where it stands, its type and its rules."""

    section: str
    hint: object  # as annotated
    field: dataclasses.Field


def _options() -> dict[str, Option]:
    found: dict[str, Option] = {}
    for section, kind in typing.get_type_hints(TrainConfig).items():
        if not dataclasses.is_dataclass(kind):
            continue
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            assert f.name not in found, f.name
            found[f.name] = Option(section, hints[f.name], f)
    return found


OPTIONS = _options()


def _whole(text: str) -> int:
    """The number that a few digits say; 0 for anything else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
