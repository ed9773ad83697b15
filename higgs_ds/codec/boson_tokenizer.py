"""The network of Boson's codec: upstream's `HiggsAudioTokenizer`, built with nothing from the hub.

Upstream is imported by `build_tokenizer` alone, so that code that needs no network does not wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, TypeAdapter

from ..errors import first_of, reading
from ..model.files.config_values import checked
from ..process import say
from . import codec_layout

if TYPE_CHECKING:
    import torch

Count = Annotated[StrictInt, Field(ge=1)]


class TokenizerConfig(BaseModel):
    """Keys that config.json may have, and what upstream's constructor takes where it says nothing."""

    model_config = ConfigDict(extra="forbid")

    n_filters: Count = 32
    D: Count = 128
    target_bandwidths: list[float] = [1, 1.5, 2, 4, 6]
    ratios: list[Count] = [8, 5, 4, 2]
    sample_rate: Count = 16000
    bins: Annotated[StrictInt, Field(ge=1, le=1 << 15)] = 1024  # codes are int16
    n_q: Count = 8
    codebook_dim: Count | None = None
    normalize: bool = False
    causal: bool = False
    semantic_techer: Literal["hubert_base_general"] = "hubert_base_general"  # any other would be fetched from the hub
    last_layer_semantic: bool = True
    merge_mode: str = "concat"
    downsample_mode: str = "step_down"
    semantic_mode: str = "classic"
    vq_scale: Count = 1
    semantic_sample_rate: Count | None = None

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return float(math.ceil(self.sample_rate / math.prod(self.ratios)))


# Only HuBERT's training masks frames with it. Checkpoint and model may each have it or not, and the codes are the same.
UNUSED_WEIGHT = "semantic_model.masked_spec_embed"


def read_tokenizer_config(path: Path) -> TokenizerConfig:
    """Raises ConfigError naming the file for what is no config of Boson's codec, or needs the hub."""
    what = f"--codec: {path} is no config of Boson's codec"
    with reading(what):
        given = json.loads(path.read_bytes())
        if given.get("model_type") == codec_layout.BUNDLED_IN:
            given = codec_layout.BUNDLED_CONFIG
        if codec_layout.is_renamed(given):
            given = codec_layout.old_config(given)
    return checked(TypeAdapter(TokenizerConfig), given, what)


def read_weights(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The codec's tensors in its files, on the CPU: mapped, so that only their list has been read.

    Nothing in a file is executed. Raises ConfigError naming the file for anything but tensors by name.
    """
    weights = {name: value for file in files for name, value in _tensors_in(file).items()}
    bundled = {name: value for name, value in weights.items() if name.startswith(codec_layout.BUNDLED)}
    return {name.removeprefix(codec_layout.BUNDLED): value for name, value in (bundled or weights).items()}


def _tensors_in(path: Path) -> dict[str, torch.Tensor]:
    import torch
    from safetensors.torch import load_file

    with reading(f"--codec: {path} does not hold the weights of Boson's codec"):
        if path.suffix == ".safetensors":
            return load_file(path)
        # The layout of torch before 1.6 cannot be mapped, and is read.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
            raise ValueError("expected tensors by name")
    return weights


def digest_of(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors: their names, dtypes, shapes and values, whatever file holds them."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_tokenizer(config: TokenizerConfig, files: Sequence[Path], device: str) -> torch.nn.Module:
    """Upstream's tokenizer with the weights of its files, float32 on `device`, in eval mode, without gradients.

    Leaves the random generator as it was, and says on stderr which weights have no place.

    Raises ValueError for a weight that is missing or not finite, and for codebooks that were never fitted; whatever
    torch raises for a config that cannot be built and for weights of another shape.
    """
    import torch

    weights = read_weights(files)
    model = _empty_tokenizer(config, device)
    if files[0].suffix == ".safetensors":
        codec_layout.drop_weight_norm(model)
        weights = codec_layout.renamed(weights, model.state_dict())
    # Not upstream's loader, which leaves out silently what does not fit. Nothing is copied before all of it fits.
    fit = model.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in fit.missing_keys if name != UNUSED_WEIGHT]
    unexpected = [name for name in fit.unexpected_keys if name != UNUSED_WEIGHT]
    if missing:
        instead = f" (it holds {listed(unexpected)}, which have no place)" if unexpected else ""
        raise ValueError(f"missing {listed(missing)}{instead}")
    # Copies: float32 whatever the file has, and nothing left that hangs on the file.
    own = {name: weight.to(device, torch.float32, copy=True) for name, weight in model.state_dict().items()}
    model.load_state_dict(own, assign=True)
    broken = [name for name, weight in own.items() if name != UNUSED_WEIGHT and not bool(weight.isfinite().all())]
    if broken:
        raise ValueError(f"not finite: {listed(broken)}")
    # Upstream would fit such a codebook to the first clip, by collectives over whichever ranks encode one.
    unfitted = [name for name, weight in own.items() if name.endswith("._codebook.inited") and not bool(weight.all())]
    if unfitted:
        raise ValueError(f"codebooks that were never fitted: {listed(unfitted)} must be 1")
    if unexpected:
        no_place = f"left out, since Boson's codec has no place for it: {listed(unexpected)}"
        say(f"--codec: {files[0]}: {no_place}", error=True)
    return model.eval()


def bundled_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the codec in a Higgs TTS 3 checkpoint."""
    model = _empty_tokenizer(TokenizerConfig(**codec_layout.old_config(codec_layout.BUNDLED_CONFIG)), "cpu")
    codec_layout.drop_weight_norm(model)
    state = model.state_dict()
    return {codec_layout.BUNDLED + codec_layout.new_name(old): tuple(value.shape) for old, value in state.items()}


@contextlib.contextmanager
def exact_float32(device: str) -> Iterator[None]:
    """float32 to the last bit within, whatever is set outside: TF32 or bf16 would make another entry the nearest.

    Restores what was set, and the random generator, from which HuBERT draws for every layer: a run shall not depend on
    which clips it had to encode.
    """
    import torch

    # The older of torch's two ways to say it: it sets both, the newer one alone makes reading the older one an error.
    tf32, precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        exact = torch.autocast(torch.device(device).type, enabled=False)
        with torch.random.fork_rng(devices=[]), exact, torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_float32_matmul_precision(precision)


def listed(names: list[str]) -> str:
    """`a, b, … and 3 more`"""
    return ", ".join(first_of(names, 5))


class _InstalledHubert:
    """Stands where upstream's constructor looks for transformers' `AutoModel`, which would fetch a repository and run
    the code in it (trust_remote_code=True). HuBERT base is transformers' own class in its default sizes."""

    @staticmethod
    def from_pretrained(_: str, **__: object) -> torch.nn.Module:
        from transformers import HubertConfig, HubertModel

        return HubertModel(HubertConfig())


def _empty_tokenizer(config: TokenizerConfig, device: str) -> torch.nn.Module:
    """Upstream's tokenizer, whose weights take no memory yet."""
    import torch
    from boson_multimodal.audio_processing import higgs_audio_tokenizer as upstream

    # The one place where upstream is changed. tests/codec/test_codec.py refuses the network, counts the weights and
    # compares the codes with upstream's own, so that another version of it does not go unnoticed.
    auto_model = upstream.AutoModel
    upstream.AutoModel = _InstalledHubert
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
            model = upstream.HiggsAudioTokenizer(**config.model_dump(exclude_unset=True), device=device)
    finally:
        upstream.AutoModel = auto_model
    return model.requires_grad_(False)
