"""The sample codec: 8 codebooks at 25 frames a second, like Boson's, fitted in seconds on the clips at hand.

It stands in where the weights of Boson's codec cannot be had (tests, a first try offline), so that everything after
the codec runs for real. A frame is 40 ms as four log-mel spectra 10 ms apart; the eight codebooks are residual vector
quantisation of that by k-means; Griffin-Lim turns it back into sound. Clips that it was not fitted on lose clarity.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soxr

from ..errors import reading
from ..files import replacing, write_text
from .base import check_codes

NUM_CODEBOOKS = 8
SAMPLE_RATE = 24000
FRAME_RATE = 25
SLOTS = 4  # spectra a frame
HOP = SAMPLE_RATE // FRAME_RATE // SLOTS  # 240 samples, 10 ms
WINDOW = 960  # 40 ms: fine enough in frequency for the harmonics of a voice, a whole number of hops
MELS = 80
FLOOR = 3e-4  # amplitude (full scale is 1) below which a mel band counts as silent
FRAME_DIM = SLOTS * MELS

MAX_FIT_FRAMES = 40_000  # 27 minutes: k-means gains little from more, and its time grows with them
KMEANS_STEPS = 20
NNLS_STEPS = 30
GRIFFIN_LIM_STEPS = 60
GRIFFIN_LIM_MOMENTUM = 0.99

SETTINGS_FILE = "sample_codec.json"
TENSORS_FILE = "codebooks.safetensors"
# Whatever the codes depend on besides the codebooks. `format` counts changes of the arithmetic itself.
SETTINGS = {
    "format": 1,
    "num_codebooks": NUM_CODEBOOKS,
    "sample_rate": SAMPLE_RATE,
    "frame_rate": FRAME_RATE,
    "slots": SLOTS,
    "window": WINDOW,
    "mels": MELS,
    "floor": FLOOR,
}


class SampleCodec:
    """A `Codec` over eight codebooks, each [entries, 320]; entries may differ between them. See `fit` and `load`."""

    num_codebooks = NUM_CODEBOOKS
    frame_rate = float(FRAME_RATE)
    sample_rate = SAMPLE_RATE

    def __init__(self, codebooks: list[np.ndarray]):
        self._tensors = [np.ascontiguousarray(book, dtype=np.float32) for book in codebooks]
        # Distances are compared in float64, so that which entry is nearest hangs on no summation order.
        self._codebooks = [book.astype(np.float64) for book in self._tensors]
        self.codebook_size = max(len(book) for book in codebooks)
        self._checksum = _checksum(self._tensors)
        self.fingerprint = f"sample:{self._checksum}"

    @classmethod
    def fit(cls, clips: Iterable[tuple[np.ndarray, int]], *, codebook_entries: int = 256, seed: int = 0) -> SampleCodec:
        """A codec for these clips: mono waveforms [samples], each with its sample rate.

        The same clips and seed give the same codebooks to the bit. Where there are fewer different frames than
        `codebook_entries`, there are fewer entries. Raises ValueError for an unusable clip.
        """
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        frames = [_frames(waveform, sample_rate).astype(np.float32) for waveform, sample_rate in clips]
        residual = np.concatenate(frames).astype(np.float64)  # [frames, 320]
        if len(residual) > MAX_FIT_FRAMES:
            kept = np.random.default_rng(seed).choice(len(residual), MAX_FIT_FRAMES, replace=False)
            residual = residual[np.sort(kept)]

        codebooks = []
        # One thread: partial sums of several would be added in another order, and the codebooks would differ.
        with threadpool_limits(limits=1):
            for codebook in range(NUM_CODEBOOKS):
                entries = min(codebook_entries, len(np.unique(residual, axis=0)))
                kmeans = KMeans(entries, n_init=1, max_iter=KMEANS_STEPS, random_state=seed + codebook)
                # unique() also drops equal entries, which would make "the nearest" ambiguous.
                book = np.unique(kmeans.fit(residual).cluster_centers_.astype(np.float32), axis=0)
                codebooks.append(book)
                residual -= book[_nearest(residual, book.astype(np.float64))]
        return cls(codebooks)

    def encode(self, waveform: np.ndarray, sample_rate: int) -> np.ndarray:
        """Codes int16 [8, frames] of a mono waveform [samples]; one frame for each 40 ms begun."""
        residual = _frames(waveform, sample_rate)
        codes = np.empty((NUM_CODEBOOKS, len(residual)), dtype=np.int16)
        for codebook, book in enumerate(self._codebooks):
            codes[codebook] = _nearest(residual, book)
            residual -= book[codes[codebook]]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform float32 [frames * 960] at 24 kHz of codes [8, frames]. Raises ValueError for codes out of range."""
        check_codes(codes, self)
        frames = np.zeros((codes.shape[1], FRAME_DIM))
        for codebook, book in zip(codes, self._codebooks, strict=True):
            # A model may say an entry that a smaller codebook of these lacks: it adds nothing.
            known = codebook < len(book)
            frames[known] += book[codebook[known]]
        return _griffin_lim(_magnitudes(frames.reshape(-1, MELS))).astype(np.float32)

    def build(self) -> None:
        """Nothing to do: the codebooks are there, 20 MB at most."""

    release = build

    def save(self, folder: str | Path) -> None:
        """Writes the codec into a folder, which is made if it is not there."""
        from safetensors.numpy import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / TENSORS_FILE) as beside:
            beside.write_bytes(save({f"codebook_{codebook}": book for codebook, book in enumerate(self._tensors)}))
        # The settings last: it is by them that a folder is known to hold a codec.
        settings = {"settings": SETTINGS, "sha256": self._checksum}
        write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> SampleCodec:
        """The codec that `save` wrote. Raises ConfigError naming the folder if it is damaged or of another version."""
        from safetensors.numpy import load

        folder = Path(folder)
        with reading(f"--codec: {folder} holds no usable sample codec, fit it again"):
            saved = json.loads((folder / SETTINGS_FILE).read_bytes())
            if saved["settings"] != SETTINGS:
                raise ValueError(f"{SETTINGS_FILE} has settings {saved['settings']}, this version has {SETTINGS}")
            tensors = load((folder / TENSORS_FILE).read_bytes())
            codec = cls([tensors[f"codebook_{codebook}"] for codebook in range(NUM_CODEBOOKS)])
            if saved["sha256"] != codec._checksum:
                raise ValueError(f"{TENSORS_FILE} is not what {SETTINGS_FILE} was written for")
        return codec


def _checksum(tensors: list[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode())
    for book in tensors:
        digest.update(str(book.shape).encode())
        digest.update(book.astype("<f4").tobytes())
    return digest.hexdigest()


def _nearest(points: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Index [points] of the entry nearest to each; |p - e|² without |p|², which is the same for every entry."""
    return np.argmin((book**2).sum(axis=1) / 2 - points @ book.T, axis=1)


def _frames(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """Log-mel frames [frames, 320], float64, of a mono waveform [samples]."""
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"a waveform must be mono [samples] and not empty, found shape {list(waveform.shape)}")
    num_frames = -(-len(waveform) * FRAME_RATE // sample_rate)  # rounded up
    samples = soxr.resample(waveform.astype(np.float64), sample_rate, SAMPLE_RATE)
    padded = np.zeros(num_frames * SLOTS * HOP + WINDOW - HOP)
    start = (WINDOW - HOP) // 2  # each window is centred on its hop
    samples = samples[: len(padded) - 2 * start]
    padded[start : start + len(samples)] = samples
    power = np.abs(_stft(padded)) ** 2 @ _mel_filters()  # [frames * 4, 80]
    # A soft floor, log of sqrt(power + floor²), because it can be undone exactly.
    return (np.log(power + FLOOR**2) / 2).reshape(num_frames, FRAME_DIM)


def _magnitudes(log_mel: np.ndarray) -> np.ndarray:
    """Spectral magnitudes [spectra, 481] that give these mel bands [spectra, 80], none of them below 0."""
    mel_power = np.maximum(np.exp(2 * log_mel) - FLOOR**2, 0)
    filters = _mel_filters()
    power = np.maximum(mel_power @ np.linalg.pinv(filters), 1e-12)
    # Multiplicative steps of non-negative least squares (Lee & Seung): they only ever scale what is above 0.
    target = mel_power @ filters.T
    for _ in range(NNLS_STEPS):
        power *= target / np.maximum(power @ filters @ filters.T, 1e-20)
    return np.sqrt(power)


def _griffin_lim(magnitude: np.ndarray) -> np.ndarray:
    """Waveform [spectra * 240] whose spectra have these magnitudes [spectra, 481]."""
    import torch
    from torchaudio.functional import griffinlim

    # torchaudio's windows are centred on the hops' borders: one more at each end, and half a hop cut off.
    scaled = torch.from_numpy(np.pad(magnitude, ((1, 1), (0, 0)), mode="edge").T * (_hann().sum() / 2))
    how = {"n_iter": GRIFFIN_LIM_STEPS, "momentum": GRIFFIN_LIM_MOMENTUM, "length": None, "rand_init": False}
    waveform = griffinlim(scaled, torch.from_numpy(_hann()), WINDOW, HOP, WINDOW, power=1.0, **how)
    return waveform.numpy()[HOP // 2 :][: len(magnitude) * HOP]


def _stft(samples: np.ndarray) -> np.ndarray:
    """Spectra [spectra, 481] of windows 240 samples apart; a full-scale sine has magnitude 1."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    return np.fft.rfft(windows * _hann()) * (2 / _hann().sum())


@functools.cache
def _hann() -> np.ndarray:
    return np.hanning(WINDOW + 1)[:-1]  # periodic


@functools.cache
def _mel_filters() -> np.ndarray:
    """[481, 80]: triangles even in mel (HTK's formula) from 0 to 12 kHz, each with sum 1."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MELS + 2) / 2595) - 1)
    frequencies = np.arange(WINDOW // 2 + 1)[:, None] * SAMPLE_RATE / WINDOW
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    return filters / filters.sum(axis=0)
