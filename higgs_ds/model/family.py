"""The seam between the trainer and a model family: what a family gives, and which one a checkpoint is of.

Loop, loss, guard, batching and engine know a model by its `ModelSpec` and by these methods alone. A second family is a
folder beside `higgs_v2/` with an object like its `HiggsV2`, named in `families.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from ..codec.base import Codec
    from ..data.chatml import AudioRef, Turn
    from ..options.sections import TrainConfig
    from .base import BaseCheckpoint
    from .files.adapter_file import Adapter


class Family(Protocol):
    """The contribution of one kind of model: files, LoRA, rows, the training forward, a voice."""

    name: str

    def open_base(self, name_or_path: str, revision: str | None, flag: str, folder: Path) -> BaseCheckpoint:
        """A checkpoint in this folder: config, spec and tokenizer, checked; no weight is read. Raises ConfigError."""

    def check_forward(self, base: BaseCheckpoint) -> None:
        """Refuses a checkpoint that the default training forward would not compute. Raises ConfigError."""

    def settle_lora(
        self, config: TrainConfig, base: BaseCheckpoint, resumed: dict | None
    ) -> tuple[TrainConfig, dict[str, torch.Tensor] | None]:
        """The options with LoRA as `--init_adapter` has it, and its checked weights. Raises ConfigError."""

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

    def adaptable_modules(self, base: BaseCheckpoint) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of every linear layer that LoRA may stand on, by its name in the model."""

    def merge(
        self, base: BaseCheckpoint, adapter: Adapter | None, output_dir: Path, layout: str, **options: Any
    ) -> int:
        """Writes the merged checkpoint and reads it back; its size in bytes. Raises ConfigError."""

    def voice(
        self, base: BaseCheckpoint, dtype: str, codec: Codec, device: torch.device
    ) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
        """For samples of a run: makes its model without LoRA and without weights (on the meta device), under the names
        of `load_base`; and makes a voice of such a model once it has both."""

    def speaker(self, base: BaseCheckpoint, adapter: str | None, codec: Any, **options: Any) -> Any:
        """A voice to speak with: the base, and an adapter on it. Raises ConfigError."""
