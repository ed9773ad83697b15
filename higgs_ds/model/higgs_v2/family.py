"""Higgs Audio v2 as the trainer sees it: each method is `family.Family`'s, and imports what it needs when called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layouts import LAYOUTS, layout_of, name_in
from .modules import MODULES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...codec.base import Codec
    from ...data.chatml import AudioRef, Turn
    from ..base import BaseCheckpoint
    from ..family import Adaptable
    from ..files.adapter_file import Adapter
    from ..speech import Speaker


class HiggsV2:
    """boson_multimodal's `HiggsAudioModel`: two feed-forward networks a layer, a text head and 8 codebooks."""

    name = "higgs_audio"
    modules = MODULES
    layouts: tuple[str, ...] = LAYOUTS
    layout_of = staticmethod(layout_of)
    name_in = staticmethod(name_in)

    def read_config(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        from .config import read_checkpoint_config

        return read_checkpoint_config(folder, flag)

    def load_tokenizer(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        from ..base import load_tokenizer

        return load_tokenizer(folder, flag)

    def open_base(
        self, name_or_path: str, revision: str | None, flag: str, folder: Path, *, weights: bool = True
    ) -> BaseCheckpoint:
        from .checkpoint import open_base

        return open_base(name_or_path, revision, flag, folder, weights=weights)

    def check_forward(self, base: BaseCheckpoint) -> None:
        from .layers import check_supported

        check_supported(base.config)

    def adaptable_modules(self, config: Any) -> Adaptable:
        from .load import adaptable_modules

        return adaptable_modules(config)

    def empty_base(self, config: Any, dtype: str) -> nn.Module:
        from .checkpoint import empty_base

        return empty_base(config, dtype)

    def load_base(self, folder: Path, config: Any, dtype: str, *, quantize_on: torch.device | None = None) -> nn.Module:
        from .checkpoint import load_base

        return load_base(folder, config, dtype, quantize_on=quantize_on)

    def training_forward(self, model: nn.Module, config: Any, **options: Any) -> nn.Module:
        from .forward import training_forward

        return training_forward(model, config, **options)

    def tokenize(
        self, messages: Sequence[Turn], start_index: int | None, tokenizer: Any
    ) -> tuple[list[int], list[int], list[AudioRef]]:
        from .prompt import tokenize

        return tokenize(messages, start_index, tokenizer)

    def check_codec(self, codec: str, layout: str) -> None:
        from .processor_files import codec_reference

        codec_reference(codec, layout)

    def merge(
        self, base: BaseCheckpoint, adapter: Adapter | None, output_dir: Path, layout: str, **options: Any
    ) -> int:
        from .merge import merge

        return merge(base, adapter, output_dir, layout, **options)

    def voice(self, model: nn.Module, base: BaseCheckpoint, codec: Codec, device: torch.device) -> Any:
        from .speaker import Speaker

        return Speaker(model, base, codec, device)

    def speaker(self, base: BaseCheckpoint, adapter: str | None, codec: Any, **options: Any) -> Speaker:
        """Upstream's own generate, see `speaker.Speaker`."""
        from .speaker import Speaker

        return Speaker.load(base, adapter, codec, **options)
