"""Audio to codes and back: Boson's codec, or the sample codec where Boson's weights cannot be had."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..config import DEFAULT_CODEC, DEFAULT_CODEC_REVISION
from ..errors import ConfigError
from ..process import say

if TYPE_CHECKING:
    import torch

CODEC_FILES = ("config.json", "model.pth", "sample_codec.json", "codebooks.safetensors")


def _to_stderr(line: str) -> None:
    say(line, error=True)


class Codec(Protocol):
    num_codebooks: int
    codebook_size: int  # codes are 0..codebook_size - 1
    frame_rate: float  # frames a second
    sample_rate: int  # of what decode returns
    fingerprint: str  # changes whenever the codes would

    def encode(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """Codes int16 [num_codebooks, frames] of a mono waveform float32 [samples]."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform float32 [samples] of codes [num_codebooks, frames]."""

    def build(self) -> None:
        """Loads what `encode` and `decode` need, which the first of them would do otherwise."""

    def release(self) -> None:
        """Gives back the memory that `build` took; the codec may still be used, and then loads it again."""


def load_codec(
    name_or_path: str,
    revision: str | None = None,
    device: str = "cpu",
    warn: Callable[[str], None] = _to_stderr,
) -> Codec:
    """The codec in a local folder (Boson's or a sample codec) or in a repository of the hub.

    Cheap: the network of Boson's codec is built by the first `encode` or `decode`, or by `build`, which raise
    ConfigError for weights that do not fit config.json.

    Args:
        revision: of the hub; None means the pinned one for `DEFAULT_CODEC`, the newest for any other.
        device: where the network is to be.
        warn: gets a line on weights that are left out.

    Raises:
        ConfigError: what is neither, a folder that lacks a file or holds the newer layout, a config.json or model.pth
            that is none, and what the hub does not give.
    """
    try:
        folder = Path(name_or_path)
        if not folder.exists():
            folder = _download(name_or_path, revision)
        elif revision is not None:
            raise ValueError(f"codec {name_or_path!r} is a local folder, which has no revision: leave {revision!r} out")
        return _load_folder(folder, device, warn)
    except OSError as error:
        raise ConfigError(
            [
                f"--codec: {name_or_path!r} cannot be loaded: {error}. A folder is looked for first, then the hub or "
                "its cache"
            ]
        ) from error
    except ValueError as error:
        raise ConfigError([f"--codec: {error}"]) from error


def check_fits(codec: Codec, num_codebooks: int, codebook_size: int) -> None:
    """Raises ConfigError unless the codec has a model's codebooks, and no codes but those that the model knows."""
    if codec.num_codebooks < num_codebooks:
        raise ConfigError(
            [f"--codec: has {codec.num_codebooks} codebooks, the model needs {num_codebooks}; use its own codec"]
        )
    if codec.codebook_size > codebook_size:
        raise ConfigError(
            [f"--codec: has codes up to {codec.codebook_size - 1}, the model knows 0 to {codebook_size - 1}"]
        )


def check_codes(codes: np.ndarray, codec: Codec) -> None:
    """Raises ValueError unless codes are whole numbers [num_codebooks, 1 or more frames] that the codec has."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"codes must be whole numbers, found {codes.dtype}")
    if codes.ndim != 2 or codes.shape[0] != codec.num_codebooks:
        raise ValueError(f"codes must have shape [{codec.num_codebooks}, frames], found {list(codes.shape)}")
    if codes.shape[1] == 0:
        raise ValueError("codes have no frames")
    low, high = codes.min(), codes.max()
    if low < 0 or high >= codec.codebook_size:
        found = low if low < 0 else high
        raise ValueError(f"codes must be 0..{codec.codebook_size - 1}, found {found}")


class BosonCodec:
    """Boson's own codec, `HiggsAudioTokenizer` of boson_multimodal.

    What is known without its network is read at once; the network is built by the first `encode` or `decode`.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        warn: Callable[[str], None] = _to_stderr,
        weights: str = "model.pth",
    ):
        """Reads config.json and the list of tensors in `weights`; `warn` gets a line on weights that are left out.

        Raises ValueError for files that are not such, OSError for files that cannot be read.
        """
        from .boson_tokenizer import read_tokenizer_config, read_weights

        self._config_path, self._weights_path = folder / "config.json", folder / weights
        self._device, self._warn = device, warn
        self._found = self._files_now()
        self._config = read_tokenizer_config(self._config_path)
        read_weights(self._weights_path)
        self._model: torch.nn.Module | None = None
        self.num_codebooks = self._config.num_codebooks
        self.codebook_size = self._config.codebook_size
        self.frame_rate = self._config.frame_rate
        self.sample_rate = self._config.sample_rate

    @functools.cached_property
    def fingerprint(self) -> str:
        """By the whole content of both files. Raises ConfigError if they cannot be read or have changed."""
        digest = hashlib.sha256()
        with self._unchanged_files():
            for path in (self._weights_path, self._config_path):
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
        return f"boson:{digest.hexdigest()}"

    def build(self) -> None:
        """Builds the network, unless it is there. Raises ConfigError for weights that do not fit config.json one to
        one, the unexpected ones aside, and for files that have changed since they were looked at first."""
        from .boson_tokenizer import build_tokenizer

        if self._model is not None:
            return
        with self._unchanged_files():
            try:
                model = build_tokenizer(self._config, self._weights_path, self._device, self._warn)
            except ValueError as error:
                raise ConfigError(
                    [f"--codec: {error}; {DEFAULT_CODEC} at revision {DEFAULT_CODEC_REVISION} is one that fits"]
                ) from error
        self._model = model

    def release(self) -> None:
        """Gives the network's memory back, 0.8 GB for Boson's, on a GPU to others too; `encode` builds it anew."""
        import torch

        if self._model is None:
            return
        self._model = None
        gc.collect()  # its modules and their hooks refer to each other
        with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps what lies between other pieces, 0.3 GB
            ctypes.CDLL(None).malloc_trim(0)
        if torch.device(self._device).type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """Codes int16 [8, frames] of a mono waveform float32 [samples]. Raises ConfigError as `build` does."""
        from .boson_tokenizer import exact_float32

        self.build()
        # Under one frame upstream's convolutions have nothing to stand on.
        short = int(np.ceil(sample_rate / self.frame_rate)) - len(waveform)
        if short > 0:
            waveform = np.pad(waveform, (0, short))
        with exact_float32(self._device):
            codes = self._model.encode(waveform.astype(np.float32), sample_rate)
        return codes.cpu().numpy().astype(np.int16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform float32 [samples] of codes [8, frames].

        Raises ValueError for codes that there are not, ConfigError as `build` does.
        """
        import torch

        from .boson_tokenizer import exact_float32

        check_codes(codes, self)
        self.build()
        with exact_float32(self._device):
            return self._model.decode(torch.from_numpy(codes.astype(np.int64))[None])[0, 0]

    def _files_now(self) -> list[tuple[int, ...]]:
        """What tells another content of the files, or other files in their place."""
        stats = [path.stat() for path in (self._config_path, self._weights_path)]
        return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]

    @contextlib.contextmanager
    def _unchanged_files(self) -> Iterator[None]:
        """Around all that reads them again: codes of one file under the fingerprint of another would never be found
        out."""
        try:
            yield
            changed = self._files_now() != self._found
        except OSError as error:
            raise ConfigError([f"--codec: {self._weights_path.parent} cannot be read: {error}"]) from error
        if changed:
            raise ConfigError([f"--codec: files in {self._weights_path.parent} were changed meanwhile; start again"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError

    if revision is None and repo == DEFAULT_CODEC:
        revision = DEFAULT_CODEC_REVISION
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(CODEC_FILES)))
        # Only where it is the codec: a repository may hold a file of that name that is something else, and large.
        if _is_renamed(folder):
            snapshot_download(repo, revision=revision, allow_patterns=["model.safetensors"])
        return folder
    except HFValidationError as error:
        raise ValueError(f"codec {repo!r} is neither a folder here nor the name of a repository on the hub") from error


def _is_renamed(folder: Path) -> bool:
    """Whether the folder's config.json is of transformers' layout; one that cannot be read is not."""
    from .codec_layout import is_renamed

    try:
        raw = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # what reads it next says what is wrong with it
    return isinstance(raw, dict) and is_renamed(raw)


def _load_folder(folder: Path, device: str, warn: Callable[[str], None]) -> Codec:
    files = {path.name for path in folder.iterdir()}
    if "sample_codec.json" in files:
        from .sample import SampleCodec

        return SampleCodec.load(folder)
    if "config.json" in files:
        weights = "model.safetensors" if _is_renamed(folder) else "model.pth"
        if weights in files:
            return BosonCodec(folder, device, warn, weights)
        raise ValueError(
            f"codec folder {folder} has config.json but no {weights}, which belongs to it; "
            f"{DEFAULT_CODEC} at revision {DEFAULT_CODEC_REVISION} has both"
        )
    raise ValueError(
        f"{folder} is no codec: it lacks config.json and model.pth (Boson's), or sample_codec.json (a sample codec)"
        if "model.pth" not in files
        else f"codec folder {folder} has model.pth but lacks config.json"
    )
