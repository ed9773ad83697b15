"""Sound quality: DNSMOS, and measures that need no model: loudness, silence, clipping."""

from __future__ import annotations

import numpy as np

from .clips import JUDGE_RATE, Clip, library

FRAME_SEC = 0.01
SILENCE_DB = 40.0  # below the loudest frame, where silence begins
FULL_SCALE = 0.999  # where a sample counts as clipped
BLOCK_SEC, LEAST_SEC = 0.4, 0.05  # of loudness


class Dnsmos:
    """The judge of the sound, by the networks in speechmos' wheel: 1 (bad) to 5."""

    def __init__(self) -> None:
        """Raises ConfigError where speechmos is missing."""
        self._library = library("speechmos.dnsmos", "--sound", "speechmos")

    def judge(self, clip: Clip) -> dict[str, object]:
        """Fields of a clip's line; none for a clip without sound. Raises whatever the library does."""
        if clip.is_silent:
            return {}
        scores = self._library.run(clip.for_judges(), JUDGE_RATE)
        names = {"dnsmos": "ovrl_mos", "dnsmos_signal": "sig_mos", "dnsmos_background": "bak_mos"}
        return {name: float(scores[key]) for name, key in (names | {"dnsmos_p808": "p808_mos"}).items()}


def levels(clip: Clip) -> dict[str, object]:
    """Loudness in LUFS, seconds of silence before, within (the longest) and behind, share of samples that clip."""
    if clip.is_silent:
        return {}
    before, within, behind = _silences(clip)
    return {
        "loudness": loudness_of(clip.waveform, clip.sample_rate),
        "silence_before": before,
        "silence_within": within,
        "silence_behind": behind,
        "clipped": float((np.abs(clip.waveform) >= FULL_SCALE).mean()),
    }


def loudness_of(waveform: np.ndarray, sample_rate: int) -> float | None:
    """In LUFS, by ITU-R BS.1770; None for what is too short or too soft to have one."""
    import pyloudnorm

    seconds = len(waveform) / sample_rate
    if seconds < LEAST_SEC:
        return None
    meter = pyloudnorm.Meter(sample_rate, block_size=min(BLOCK_SEC, 0.99 * seconds))
    with np.errstate(divide="ignore"):
        found = float(meter.integrated_loudness(waveform.astype(np.float64)))
    return found if np.isfinite(found) else None


def _silences(clip: Clip) -> tuple[float, float, float]:
    size = max(1, round(FRAME_SEC * clip.sample_rate))
    frames = np.pad(clip.waveform, (0, -len(clip.waveform) % size)).reshape(-1, size).astype(np.float64)
    power = (frames**2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-SILENCE_DB / 10))
    pauses = np.diff(loud) - 1
    of_frames = loud[0], max(pauses, default=0), len(power) - 1 - loud[-1]
    before, within, behind = (float(count * size / clip.sample_rate) for count in of_frames)
    return before, within, behind
