"""Sound quality: DNSMOS, and measures without a model (loudness, silence, clipping)."""

from __future__ import annotations

import numpy as np

from .clips import JUDGE_RATE, Clip, library

FRAME_SEC = 0.01
SILENCE_DB = 40.0  # frames this far below the loudest frame are silent
FULL_SCALE = 0.999  # samples from here on count as clipped
BLOCK_SEC, LEAST_SEC = 0.4, 0.05  # block and shortest clip to measure loudness of


class Dnsmos:
    """Sound quality from 1 (bad) to 5, by the networks in speechmos' wheel."""

    def __init__(self) -> None:
        """Raises ConfigError if speechmos is missing."""
        self._library = library("speechmos.dnsmos", "--sound", "speechmos")

    def judge(self, clip: Clip) -> dict[str, object]:
        """Returns a clip's fields, none for a silent clip. Raises any error of the library."""
        if clip.is_silent:
            return {}
        scores = self._library.run(clip.for_judges(), JUDGE_RATE)
        names = {"dnsmos": "ovrl_mos", "dnsmos_signal": "sig_mos", "dnsmos_background": "bak_mos"}
        return {name: float(scores[key]) for name, key in (names | {"dnsmos_p808": "p808_mos"}).items()}


def levels(clip: Clip) -> dict[str, object]:
    """Returns loudness in LUFS, seconds of silence (leading, longest pause, trailing), share of clipped samples."""
    if clip.is_silent:
        return {}
    leading, pause, trailing = _silences(clip)
    return {
        "loudness": loudness_of(clip.waveform, clip.sample_rate),
        "silence_before": leading,
        "silence_within": pause,
        "silence_behind": trailing,
        "clipped": float((np.abs(clip.waveform) >= FULL_SCALE).mean()),
    }


def loudness_of(waveform: np.ndarray, sample_rate: int) -> float | None:
    """Measures loudness in LUFS by ITU-R BS.1770; None if the waveform is too short or too quiet."""
    import pyloudnorm

    seconds = len(waveform) / sample_rate
    if seconds < LEAST_SEC:
        return None
    meter = pyloudnorm.Meter(sample_rate, block_size=min(BLOCK_SEC, 0.99 * seconds))
    with np.errstate(divide="ignore"):
        found = float(meter.integrated_loudness(waveform.astype(np.float64)))
    return found if np.isfinite(found) else None


def _silences(clip: Clip) -> tuple[float, float, float]:
    """Seconds of leading silence, of the longest pause, and of trailing silence."""
    size = max(1, round(FRAME_SEC * clip.sample_rate))
    frames = np.pad(clip.waveform, (0, -len(clip.waveform) % size)).reshape(-1, size).astype(np.float64)
    power = (frames**2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-SILENCE_DB / 10))
    pauses = np.diff(loud) - 1
    counts = loud[0], max(pauses, default=0), len(power) - 1 - loud[-1]
    leading, pause, trailing = (float(count * size / clip.sample_rate) for count in counts)
    return leading, pause, trailing
