"""Interface of Higgs TTS 3 to the trainer: methods are documented in `family.Family`, and import on call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..family import ModuleNames

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...codec.base import Codec
    from ...data.chatml import AudioRef, Turn
    from ..base import BaseCheckpoint
    from ..family import Adaptable
    from ..files.adapter_file import Adapter
    from ..speech import Speaker

LAYOUT = "native"
_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TABLE = "modality_embeddings.0.embedding"  # both embedding and head of the codes
MODULES = ModuleNames(_TARGETS, {"attention": _ATTENTION, "text_mlp": _MLP, "all": _TARGETS}, _TABLE, {"none": ()})


class HiggsV3:
    """Qwen3's decoder, no text head, and one table of 8 codebooks."""

    name = "higgs_multimodal_qwen3"
    modules = MODULES
    layouts: tuple[str, ...] = (LAYOUT,)

    def layout_of(self, folder: Path, flag: str = "--base_ckpt") -> str:
        return LAYOUT

    def name_in(self, layout: str, name: str) -> str:
        return name

    def read_config(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        from .load import read_config

        return read_config(folder, flag)

    def load_tokenizer(self, folder: Path, flag: str = "--base_ckpt") -> Any:
        from .load import load_tokenizer

        return load_tokenizer(folder, flag)

    def open_base(
        self, name_or_path: str, revision: str | None, flag: str, folder: Path, *, weights: bool = True
    ) -> BaseCheckpoint:
        from .load import open_base

        return open_base(name_or_path, revision, flag, folder, weights=weights)

    def check_forward(self, base: BaseCheckpoint) -> None:
        """Does nothing: `open_base` has checked everything."""

    def adaptable_modules(self, config: Any) -> Adaptable:
        from .load import adaptable_modules

        return adaptable_modules(config)

    def empty_base(self, config: Any, dtype: str) -> nn.Module:
        from .load import empty_base

        return empty_base(config, dtype)

    def load_base(self, folder: Path, config: Any, dtype: str, *, quantize_on: torch.device | None = None) -> nn.Module:
        from .load import load_base

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
        """Does nothing: the codec is in the checkpoint."""

    def merge(
        self, base: BaseCheckpoint, adapter: Adapter | None, output_dir: Path, layout: str, **options: Any
    ) -> int:
        from .merge import merge

        return merge(base, adapter, output_dir, layout, **options)

    def voice(self, model: nn.Module, base: BaseCheckpoint, codec: Codec, device: torch.device) -> Any:
        from .speaker import Speaker

        return Speaker(model, base, codec, device)

    def speaker(self, base: BaseCheckpoint, adapter: str | None, codec: Any, **options: Any) -> Speaker:
        from .speaker import Speaker

        return Speaker.load(base, adapter, codec, **options)
