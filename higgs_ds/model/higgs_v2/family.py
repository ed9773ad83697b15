"""Higgs Audio v2 as the trainer sees it; see `model/family.py`. What takes long to import is imported when called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...codec.base import Codec
    from ...data.chatml import AudioRef, Turn
    from ...options.sections import TrainConfig
    from ..base import BaseCheckpoint
    from ..files.adapter_file import Adapter


class HiggsV2:
    """boson_multimodal's `HiggsAudioModel`: two feed-forward networks a layer, a text head and 8 codebooks."""

    name = "higgs_audio"

    def open_base(self, name_or_path: str, revision: str | None, flag: str, folder: Path) -> BaseCheckpoint:
        """See `Family.open_base`."""
        from .checkpoint import open_base

        return open_base(name_or_path, revision, flag, folder)

    def check_forward(self, base: BaseCheckpoint) -> None:
        """Refuses layers or projections that `layers.py` does not compute."""
        from .layers import check_supported

        check_supported(base.config)

    def settle_lora(
        self, config: TrainConfig, base: BaseCheckpoint, resumed: dict | None
    ) -> tuple[TrainConfig, dict[str, torch.Tensor] | None]:
        """See `Family.settle_lora`."""
        from .init_adapter import settle_lora

        return settle_lora(config, base.config, resumed)

    def load_base(self, folder: Path, config: Any, dtype: str, *, quantize_on: torch.device | None = None) -> nn.Module:
        """See `Family.load_base`."""
        from .checkpoint import load_base

        return load_base(folder, config, dtype, quantize_on=quantize_on)

    def training_forward(self, model: nn.Module, config: Any, **options: Any) -> nn.Module:
        """See `forward.training_forward`."""
        from .forward import training_forward

        return training_forward(model, config, **options)

    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        """Boson's ChatML, see `prompt.tokenize`."""
        from .prompt import tokenize

        return tokenize(messages, start_index, tokenizer)

    def adaptable_modules(self, base: BaseCheckpoint) -> dict[str, tuple[int, int]]:
        """See `load.adaptable_modules`."""
        from .load import adaptable_modules

        return adaptable_modules(base.config)

    def merge(
        self, base: BaseCheckpoint, adapter: Adapter | None, output_dir: Path, layout: str, **options: Any
    ) -> int:
        """See `merge.merge`."""
        from .merge import merge

        return merge(base, adapter, output_dir, layout, **options)

    def voice(
        self, base: BaseCheckpoint, dtype: str, codec: Codec, device: torch.device
    ) -> tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]:
        """See `Family.voice`."""
        from .checkpoint import empty_base
        from .speaker import Speaker

        return lambda: empty_base(base.config, dtype), lambda model: Speaker(model, base, codec, device)

    def speaker(self, base: BaseCheckpoint, adapter: str | None, codec: Any, **options: Any) -> Any:
        """Upstream's own generate, see `speaker.Speaker`."""
        from .speaker import Speaker

        return Speaker.load(base, adapter, codec, **options)
