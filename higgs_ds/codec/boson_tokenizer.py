"""The network of Boson's codec: upstream's `HiggsAudioTokenizer`, built with nothing from the hub.

Upstream is imported by `build_tokenizer` alone, so that whoever needs no network does not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from . import codec_layout

if TYPE_CHECKING:
    import torch

TEACHER = "hubert_base_general"
TEACHER_REPOSITORY = "bosonai/hubert_base"  # where upstream's constructor would get it
TEACHER_RATE, TEACHER_HOP = 16000, 320  # samples a second, and a frame
# What config.json may say, and what upstream's constructor takes where it says nothing.
DEFAULTS = {
    "n_filters": 32,
    "D": 128,
    "target_bandwidths": [1, 1.5, 2, 4, 6],
    "ratios": [8, 5, 4, 2],
    "sample_rate": 16000,
    "bins": 1024,
    "n_q": 8,
    "codebook_dim": None,
    "normalize": False,
    "causal": False,
    "semantic_techer": TEACHER,
    "last_layer_semantic": True,
    "merge_mode": "concat",
    "downsample_mode": "step_down",
    "semantic_mode": "classic",
    "vq_scale": 1,
    "semantic_sample_rate": None,
}
# Largest whole number for each size: codes are int16, the others keep a hostile config from building forever.
LARGEST = {
    "bins": 1 << 15,
    "n_q": 64,
    "D": 1 << 14,
    "codebook_dim": 1 << 14,
    "vq_scale": 1 << 14,
    "sample_rate": 192_000,
    "semantic_sample_rate": 192_000,
}
MOST_RATIOS = 8

# Only HuBERT's training masks frames with it. Checkpoint and model may each have it or not, and the codes are the same.
UNUSED_WEIGHT = "semantic_model.masked_spec_embed"


@dataclass(frozen=True)
class TokenizerConfig:
    """A checked config.json: `arguments` for upstream's constructor, and what follows from them."""

    arguments: dict
    num_codebooks: int
    codebook_size: int
    frame_rate: float  # frames a second
    sample_rate: int


def read_tokenizer_config(path: Path) -> TokenizerConfig:
    """Raises ValueError naming the file for what is no config of Boson's codec, or needs the hub; OSError."""
    try:
        given = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no config of Boson's codec: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} is no config of Boson's codec: it must be a JSON object")
    if codec_layout.is_renamed(given):
        try:
            given = codec_layout.old_config(given)
        except ValueError as error:
            raise ValueError(f"{path} is no config of Boson's codec: {error}") from error
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(f"{path} is no config of Boson's codec: upstream knows no {listed(unknown)}")
    config: dict[str, Any] = DEFAULTS | given
    if config["semantic_techer"] != TEACHER:
        raise ValueError(
            f"{path}: semantic_techer {config['semantic_techer']!r} would be fetched from the hub; only {TEACHER}, "
            "whose weights are all in model.pth, can be used"
        )
    for name, largest in LARGEST.items():
        if config[name] is None and DEFAULTS[name] is None:
            continue
        what = " (of codes)" if name == "bins" else ""
        if not _is_whole(config[name], largest):
            raise ValueError(f"{path}: {name} must be a whole number{what} of 1 to {largest}, found {config[name]!r}")
    ratios = config["ratios"]
    if not isinstance(ratios, list) or not 1 <= len(ratios) <= MOST_RATIOS or not all(map(_is_whole, ratios)):
        raise ValueError(f"{path}: ratios must be 1 to {MOST_RATIOS} whole numbers of 1 to 4096, found {ratios!r}")
    teacher_rate = config["semantic_sample_rate"] or TEACHER_RATE
    if math.prod(ratios) * teacher_rate < TEACHER_HOP * config["sample_rate"]:
        raise ValueError(
            f"{path}: a frame of {math.prod(ratios)} samples (the product of ratios) is shorter than one of {TEACHER}, "
            f"{1000 * TEACHER_HOP / teacher_rate:g} ms"
        )
    return TokenizerConfig(
        arguments=given,
        num_codebooks=config["n_q"],
        codebook_size=config["bins"],
        frame_rate=float(math.ceil(config["sample_rate"] / math.prod(ratios))),
        sample_rate=config["sample_rate"],
    )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file that `torch.save` wrote, on the CPU: mapped, so that only their list has been read.

    Nothing in the file is executed. Raises ValueError naming the file for anything but a state dict; OSError.
    """
    import torch

    if path.name == codec_layout.WEIGHTS:
        return codec_layout.read_renamed(path)
    try:
        # The layout of torch before 1.6 cannot be mapped, and is read.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle fails in every way that there is
        raise ValueError(
            f"{path} does not hold the weights of Boson's codec: torch cannot read it as tensors alone "
            f"({type(error).__name__}); get the file again"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(
            f"{path} does not hold the weights of Boson's codec: expected tensors by name, found "
            f"{'other keys' if isinstance(weights, dict) else f'a {type(weights).__name__}'}"
        )
    return weights


def build_tokenizer(
    config: TokenizerConfig, weights_path: Path, device: str, warn: Callable[[str], None]
) -> torch.nn.Module:
    """Upstream's tokenizer with the weights of a file, float32 on `device`, in eval mode, without gradients.

    Leaves the random generator as it was. `warn` gets one line if the file holds weights without a place.

    Raises ValueError naming the file: for a config that cannot be built, a weight that is missing, of another shape or
    not finite, and codebooks that were never fitted. OSError.
    """
    import torch

    weights = read_weights(weights_path)
    try:
        model = _empty_tokenizer(config, device)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"config.json beside {weights_path} cannot be built: {first_line(error)}") from error
    if weights_path.name == codec_layout.WEIGHTS:
        codec_layout.drop_weight_norm(model)
        weights = codec_layout.renamed(weights, model.state_dict())
    places = model.state_dict().keys()
    unusable = [name for name in weights if name in places and not _is_plain(weights[name])]
    if unusable:
        raise ValueError(f"{weights_path}: {listed(unusable)} must be plain tensors; get the file again")
    try:
        # Not upstream's loader, which leaves out silently what does not fit. Nothing is copied before all of it fits.
        fit = model.load_state_dict(weights, strict=False, assign=True)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise ValueError(f"{weights_path} does not fit its config.json: {reason}") from error
    missing = [name for name in fit.missing_keys if name != UNUSED_WEIGHT]
    unexpected = [name for name in fit.unexpected_keys if name != UNUSED_WEIGHT]
    if missing:
        instead = f" (it holds {listed(unexpected, most=5)}, which have no place)" if unexpected else ""
        raise ValueError(f"{weights_path} does not fit its config.json: missing {listed(missing)}{instead}")
    # Copies: float32 whatever the file has, and nothing left that hangs on the file.
    own = {name: weight.to(device, torch.float32, copy=True) for name, weight in model.state_dict().items()}
    model.load_state_dict(own, assign=True)
    broken = [name for name, weight in own.items() if name != UNUSED_WEIGHT and not bool(weight.isfinite().all())]
    if broken:
        raise ValueError(f"{weights_path}: not finite: {listed(broken)}; get the file again")
    # Upstream would fit such a codebook to the first clip, by collectives over whichever ranks encode one.
    unfitted = [name for name, weight in own.items() if name.endswith("._codebook.inited") and not bool(weight.all())]
    if unfitted:
        raise ValueError(f"{weights_path}: codebooks that were never fitted: {listed(unfitted)} must be 1")
    if unexpected:
        warn(
            f"--codec: {weights_path} holds {len(unexpected)} weight{'s' * (len(unexpected) != 1)} that Boson's codec "
            f"has no place for, left out: {listed(unexpected, most=5)}"
        )
    return model.eval()


@contextlib.contextmanager
def exact_float32(device: str) -> Iterator[None]:
    """float32 to the last bit within, whatever is set outside: a code is the nearest entry, and TF32 or bf16, to which
    GPUs and some CPUs round inputs where they may, make another one the nearest. Restores what was set, and the random
    generator, from which HuBERT draws for every layer: a run shall not depend on which clips it had to encode."""
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


def listed(names: Sequence[str], most: int = 20) -> str:
    """`a, b and 3 more`"""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


class _InstalledHubert:
    """Stands where upstream's constructor looks for transformers' `AutoModel`, which would fetch a repository and run
    the code in it (trust_remote_code=True). HuBERT base is transformers' own class in its default sizes."""

    @staticmethod
    def from_pretrained(name: str, **_) -> torch.nn.Module:
        from transformers import HubertConfig, HubertModel

        if name != TEACHER_REPOSITORY:
            raise ValueError(f"upstream asks for {name}, expected {TEACHER_REPOSITORY}")
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
            model = upstream.HiggsAudioTokenizer(**config.arguments, device=device)
    finally:
        upstream.AutoModel = auto_model
    return model.requires_grad_(False)


def _is_whole(value, largest: int = 4096) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def _is_plain(value) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
