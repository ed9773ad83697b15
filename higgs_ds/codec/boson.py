"""Boson's own codec, whose network is built when the first clip has to be encoded."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import reading
from ..files import sha256, stamp
from ..options.sections import DEFAULT_CODEC, DEFAULT_CODEC_REVISION
from .base import check_codes


class BosonCodec:
    """Boson's own codec, `HiggsAudioTokenizer` of boson_multimodal, built by the first `encode` or `decode`."""

    def __init__(self, weights: Sequence[Path], device: str = "cpu", *, is_bundled: bool = False):
        """Reads the config.json beside `weights` and the tensors that these files list.

        Args:
            is_bundled: the files are a Higgs TTS 3 checkpoint's, and hold other weights too.

        Raises ValueError or OSError for damaged files.
        """
        from .boson_tokenizer import read_tokenizer_config, read_weights

        self._config_path, self._weights_paths = weights[0].with_name("config.json"), weights
        self._device, self._is_bundled = device, is_bundled
        self.files = self._files_now()  # all that the fingerprint follows from
        self._config = read_tokenizer_config(self._config_path)
        read_weights(weights)
        self._model: Any = None  # upstream's `HiggsAudioTokenizer`, once built
        self.num_codebooks = self._config.n_q
        self.codebook_size = self._config.bins
        self.frame_rate = self._config.frame_rate
        self.sample_rate = self._config.sample_rate

    @functools.cached_property
    def fingerprint(self) -> str:
        """By the whole content of both files; of a bundled codec by its tensors, which all merged voices share.

        Raises:
            ConfigError: the files cannot be read or have changed.
        """
        from .boson_tokenizer import digest_of, read_weights

        with self._unchanged_files():
            if self._is_bundled:
                return f"boson:{digest_of(read_weights(self._weights_paths))}"
            return f"boson:{sha256(*self._weights_paths, self._config_path)}"

    def build(self) -> None:
        """Builds the network, unless it is there. Raises ConfigError for weights that do not fit config.json."""
        from .boson_tokenizer import build_tokenizer

        if self._model is not None:
            return
        fits = f"its config.json ({DEFAULT_CODEC} at revision {DEFAULT_CODEC_REVISION} does)"
        with self._unchanged_files(), reading(f"--codec: {self._weights_paths[0]} does not fit {fits}"):
            model = build_tokenizer(self._config, self._weights_paths, self._device)
        self._model = model  # of unchanged files

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
        """Codes int16 [8, frames] of a mono waveform float32 [samples]."""
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
        """Waveform float32 [samples] of codes [8, frames]. Raises ValueError for codes out of range."""
        import torch

        from .boson_tokenizer import exact_float32

        check_codes(codes, self)  # type: ignore[arg-type]  # a cached property can be set, as `Codec` wants it
        self.build()
        with exact_float32(self._device):
            return self._model.decode(torch.from_numpy(codes.astype(np.int64))[None])[0, 0]

    def _files_now(self) -> tuple[tuple[int, int, int], ...]:
        """Marks of the files as they are: another content, or other files in their place, has others."""
        return stamp(self._config_path), *map(stamp, self._weights_paths)

    @contextlib.contextmanager
    def _unchanged_files(self) -> Iterator[None]:
        """Refuses files that changed: codes of one file under another's fingerprint would never be found out."""
        with reading(f"--codec: files in {self._config_path.parent} cannot be used"):
            yield
            if self._files_now() != self.files:
                raise ValueError("they were changed meanwhile; start again")
