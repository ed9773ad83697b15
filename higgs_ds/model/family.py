"""The interface between the trainer and a model family.

Loop, loss, guard, batching and engine know a model by its `ModelSpec` and by these methods alone. Another family is a
folder beside `higgs_v2/` with an object like its `HiggsV2`, named in `families.py`; `docs/internals.md` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    """A family's modules by the names that options have for them, each the end of a path. No torch."""

    lora_targets: tuple[str, ...]  # of --lora_target_modules, where it is not given
    lora_groups: Mapping[str, tuple[str, ...]]  # names for several of them
    embeddings: str  # of --train_audio_embeddings
    heads: Mapping[str, tuple[str, ...]]  # by the values of --train_heads that this family has

    def trained_whole(self, audio_embeddings: bool, heads: str) -> tuple[str, ...]:
        """The modules that these options train. Raises ConfigError for a head that this family does not have."""
        if heads not in self.heads:
            raise ConfigError([f"--train_heads: {heads} is not for this model, expected {' or '.join(self.heads)}"])
        return ((self.embeddings,) if audio_embeddings else ()) + self.heads[heads]

    def targets(self, words: Iterable[str]) -> list[str]:
        """The words of --lora_target_modules with the layers of groups written out, each once."""
        suffixes = [suffix for word in words for suffix in self.lora_groups.get(word, (word,))]
        return list(dict.fromkeys(suffixes))

    def contradictions(self, config: TrainConfig) -> list[str]:
        """A line for each head with LoRA that is trained in full too, or beside the fused loss."""
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
        """--train_audio_embeddings and --train_heads, from the modules that were trained whole; the way back."""
        embeddings = {name for name in whole if names_layer(self.embeddings, name)}
        names = {name.rsplit(".", 1)[-1] for name in whole if name not in embeddings}
        heads = next(value for value, modules in self.heads.items() if set(modules) == names)
        return bool(embeddings), heads


class Adaptable(NamedTuple):
    """Modules that an adapter may change, each with the shape of its weight, [out, in], by their names in the model."""

    linears: dict[str, tuple[int, ...]]  # LoRA may stand on these
    savable: dict[str, tuple[int, ...]]  # and these may be trained whole


class Family(Protocol):
    """The contribution of one kind of model: files, LoRA, rows, the training forward, a voice."""

    name: str
    modules: ModuleNames
    layouts: tuple[str, ...]  # in which `merge` writes it

    def layout_of(self, folder: Path, flag: str = "--base_ckpt") -> str:
        """The layout of a checkpoint's files."""

    def read_config(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        """The checkpoint's config, checked; its `model_type` is a key of `FAMILIES`. Raises ConfigError."""

    def load_tokenizer(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        """The checkpoint's tokenizer, a `PreTrainedTokenizerFast`; nothing in the folder is run. Raises ConfigError."""

    def open_base(self, name_or_path: str, revision: str | None, flag: str, folder: Path) -> BaseCheckpoint:
        """A checkpoint in this folder: config, spec and tokenizer, checked; no weight is read. Raises ConfigError."""

    def check_forward(self, base: BaseCheckpoint) -> None:
        """Refuses a checkpoint that the default training forward would not compute. Raises ConfigError."""

    def adaptable_modules(self, config: Any) -> Adaptable:
        """The modules of a model with this config that an adapter may change."""

    def load_base(self, folder: Path, config: Any, dtype: str, *, quantize_on: torch.device | None = None) -> nn.Module:
        """The model, frozen, in `dtype`; sharded while it loads where DeepSpeed's stage 3 is told of."""

    def training_forward(self, model: nn.Module, config: Any, **options: Any) -> nn.Module:
        """The module that the engine runs: a micro-batch's inputs and scales to (loss, stats, report).

        It has `num_codebooks` and PEFT's model as `model`. Where a layer uses several weights at once it also has
        `leaf_modules`, the kinds of such modules, and takes `input_gradient`, for ZeRO-3.
        """

    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        """Token ids, label ids (-100 where nothing is learned) and clips of a row, in reading order."""

    def name_in(self, layout: str, name: str) -> str:
        """The name in one of `layouts` of a module or weight of the model."""

    def check_codec(self, codec: str, layout: str) -> None:
        """Refuses a codec that what loads `layout` cannot load beside the model. Raises ConfigError."""

    def merge(
        self, base: BaseCheckpoint, adapter: Adapter | None, output_dir: Path, layout: str, **options: Any
    ) -> int:
        """Writes the merged checkpoint and reads it back; its size in bytes. Raises ConfigError."""

    def voice(
        self, base: BaseCheckpoint, dtype: str, codec: Codec, device: torch.device
    ) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
        """For samples of a run: makes its model without LoRA and without weights (on the meta device), under the names
        of `load_base`; and makes a voice of such a model once it has both."""

    def speaker(self, base: BaseCheckpoint, adapter: str | None, codec: Any, **options: Any) -> Speaker:
        """A voice to speak with: the base, and an adapter on it. Raises ConfigError."""
