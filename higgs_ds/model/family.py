"""The interface between the trainer and a model family.

Loop, loss, guard, batching and engine use a model only through its `ModelSpec` and these methods. To add a family, put
a folder beside `higgs_v2/` and name its object in `families.py`; see `docs/internals.md`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import ConfigError
from .files.adapter_names import names_layer

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from ..codec.base import Codec
    from ..data.chatml import AudioRef, Turn
    from ..options.sections import TrainConfig
    from .base import BaseCheckpoint
    from .files.adapter_file import Adapter
    from .speech import Speaker


@dataclass(frozen=True)
class ModuleNames:
    """A family's modules under the names used by options; each is the end of a module path. Needs no torch."""

    lora_targets: tuple[str, ...]  # default of --lora_target_modules
    lora_groups: Mapping[str, tuple[str, ...]]  # names for groups of layers
    embeddings: str  # module of --train_audio_embeddings
    heads: Mapping[str, tuple[str, ...]]  # modules by value of --train_heads

    def trained_whole(self, audio_embeddings: bool, heads: str) -> tuple[str, ...]:
        """Modules that these options train in full. Raises ConfigError for a head that this family does not have."""
        if heads not in self.heads:
            raise ConfigError([f"--train_heads: {heads} is not for this model, expected {' or '.join(self.heads)}"])
        return ((self.embeddings,) if audio_embeddings else ()) + self.heads[heads]

    def targets(self, words: Iterable[str]) -> list[str]:
        """Expands the groups in --lora_target_modules and removes duplicates."""
        suffixes = [suffix for word in words for suffix in self.lora_groups.get(word, (word,))]
        return list(dict.fromkeys(suffixes))

    def contradictions(self, config: TrainConfig) -> list[str]:
        """Lists heads with LoRA that are also trained in full, or that the fused loss would give no gradient."""
        trained = self.trained_whole(config.lora.train_audio_embeddings, config.lora.train_heads)
        heads = {head for modules in self.heads.values() for head in modules}
        problems = []
        for target in self.targets(config.lora.lora_target_modules):
            head = target.rsplit(".", 1)[-1]
            if head in trained:
                problems.append(f"--train_heads: {head} has LoRA already (--lora_target_modules); leave one out")
            elif head in heads and config.loss.loss_impl == "fused":
                problems.append(
                    f"--lora_target_modules: LoRA on {target} would get no gradient from the fused loss; "
                    "use --loss_impl reference"
                )
        return problems

    def options_of(self, whole: Collection[str]) -> tuple[bool, str]:
        """Inverse of `trained_whole`: --train_audio_embeddings and --train_heads from the modules trained in full."""
        embeddings = {name for name in whole if names_layer(self.embeddings, name)}
        names = {name.rsplit(".", 1)[-1] for name in whole if name not in embeddings}
        heads = next(value for value, modules in self.heads.items() if set(modules) == names)
        return bool(embeddings), heads


class Adaptable(NamedTuple):
    """Modules that an adapter may change: weight shapes [out, in] by module name."""

    linears: dict[str, tuple[int, ...]]  # may have LoRA
    savable: dict[str, tuple[int, ...]]  # may be trained in full


class Family(Protocol):
    """Everything specific to one kind of model: files, LoRA, rows, training forward, speech."""

    name: str
    modules: ModuleNames
    layouts: tuple[str, ...]  # that `merge` can write

    def layout_of(self, folder: Path, flag: str = "--base_ckpt") -> str:
        """The layout of a checkpoint's files."""

    def read_config(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        """The checkpoint's config, checked; its `model_type` is a key of `FAMILIES`. Raises ConfigError."""

    def load_tokenizer(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        """The checkpoint's tokenizer, a `PreTrainedTokenizerFast`; nothing in the folder is run. Raises ConfigError."""

    def open_base(
        self, name_or_path: str, revision: str | None, flag: str, folder: Path, *, weights: bool = True
    ) -> BaseCheckpoint:
        """A checkpoint in this folder: config, spec and tokenizer, checked, and with `weights` their headers; no weight
        is read. Raises ConfigError."""

    def check_forward(self, base: BaseCheckpoint) -> None:
        """Refuses a checkpoint that the default training forward would not compute. Raises ConfigError."""

    def adaptable_modules(self, config: Any) -> Adaptable:
        """Modules that an adapter may change, for a model with this config."""

    def empty_base(self, config: Any, dtype: str) -> nn.Module:
        """The model of `load_base` on the meta device: names and shapes without values."""

    def load_base(self, folder: Path, config: Any, dtype: str, *, quantize_on: torch.device | None = None) -> nn.Module:
        """Loads the frozen model in `dtype`; sharded while loading under ZeRO-3."""

    def training_forward(self, model: nn.Module, config: Any, **options: Any) -> nn.Module:
        """The module that the engine runs: from a micro-batch's inputs and scales to (loss, stats, report).

        Has `num_codebooks`, and the PEFT model as `model`. If a layer reads several weights at once, it also has
        `leaf_modules`, their classes, and takes `input_gradient`; both are for ZeRO-3.
        """

    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        """Token ids, label ids (-100 where nothing is learned) and clips of a row, in reading order."""

    def name_in(self, layout: str, name: str) -> str:
        """The name of a module or weight in one of `layouts`."""

    def check_codec(self, codec: str, layout: str) -> None:
        """Refuses a codec that servers of `layout` cannot load beside the model. Raises ConfigError."""

    def merge(
        self, base: BaseCheckpoint, adapter: Adapter | None, output_dir: Path, layout: str, **options: Any
    ) -> int:
        """Writes the merged checkpoint, reads it back, returns its size in bytes. Raises ConfigError."""

    def voice(self, model: nn.Module, base: BaseCheckpoint, codec: Codec, device: torch.device) -> Any:
        """The voice of a model in training, for samples of a run."""

    def speaker(self, base: BaseCheckpoint, adapter: str | None, codec: Any, **options: Any) -> Speaker:
        """Loads a voice: the base with an adapter merged into it. Raises ConfigError."""
