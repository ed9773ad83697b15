"""Clips in formats that only PyAV can read, not libsndfile."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import words_of
from .sound_headers import AudioError

# Limit on decoding to find the length of a container whose header has none.
MOST_SAMPLES = 1 << 28
# Lengths in headers are rounded, and include samples that a decoder drops or adds at the ends.
LENGTH_TOLERANCE_SEC = 0.25
# Single-file containers. Playlists are excluded: they would open or download other files.
DEMUXERS = (
    "mov,matroska,avi,asf,flv,mpegts,mpeg,aac,ac3,eac3,amr,amrnb,amrwb,mp3,ape,tta,wv,dsf,iff,caf,wav,w64,ogg,aiff,au,"
    "flac"
)
# Formats without a stored length, which FFmpeg only guesses: such a file is complete if it decodes to its end.
STREAMS = frozenset("mpegts mpeg aac ac3 eac3 amr amrnb amrwb mp3 flac".split())

_CLOCK = re.compile(r"(\d+):(\d{2}):(\d{2}(?:\.\d*)?)")


class TrackError(AudioError):
    """None of several sound tracks is chosen, or one that does not exist."""


class ContainerFile:
    """One sound track of a file, read by PyAV, with the part of `soundfile.SoundFile`'s interface that clips need."""

    def __init__(self, source: Path | io.BytesIO, track: int | None = None):
        """Opens a file. Raises AudioError if PyAV cannot open it, or if it has no sound or less than its header says.

        Raises TrackError if it has several tracks and `track`, counted from 0, is not given, or is out of range.
        """
        import av

        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
        with _decoding():
            self._container = av.open(str(source) if isinstance(source, Path) else source, "r", options=options)
            if not self._container.streams.audio:
                raise AudioError("cannot be decoded: it has no sound")
            self._stream = self._container.streams.audio[_chosen(self._container.streams.audio, track)]
            self.samplerate = int(self._stream.rate)
            self.channels = max(1, int(self._stream.channels or 1))
            self._samples: np.ndarray | None = None  # [samples, channels]
            self._at = 0
            is_guess = not STREAMS.isdisjoint(self._container.format.name.split(","))
            stated = [] if is_guess else self._stated_sec()
            if len(stated) == 1:
                self.frames = round(stated[0] * self.samplerate)
            else:
                self._decode(MOST_SAMPLES // self.channels, stated)

    def __enter__(self) -> ContainerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def decode(self) -> None:
        """Decodes the file and sets `frames` to the exact count.

        Raises AudioError if it cannot be decoded, or is shorter or longer than its header says.
        """
        if self._samples is None:
            tolerance = round(LENGTH_TOLERANCE_SEC * self.samplerate)
            self._decode(self.frames + tolerance, [self.frames / self.samplerate])

    def seekable(self) -> bool:
        return True

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """Returns the next samples, float32 [samples, channels]."""
        assert dtype == "float32" and always_2d and self._samples is not None
        samples = self._samples[self._at : self._at + frames]
        self._at += len(samples)
        return samples

    def _stated_sec(self) -> list[float]:
        """Returns the length in seconds by the header: two candidates for a track that starts late, [] if unknown.

        Matroska only states when a track ends, and some writers store its length there.
        """
        stream = self._stream
        if stream.duration and stream.time_base:
            return [float(stream.duration * stream.time_base)]
        end = _stated_end(stream.metadata)
        if end is None and len(self._container.streams) == 1 and self._container.duration:
            end = self._container.duration / 1e6  # in microseconds
        if not end:
            return []
        start = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
        return [end - start] if start <= LENGTH_TOLERANCE_SEC and end > start else [end - start, end]

    def _decode(self, most: int, stated: list[float]) -> None:
        """Decodes all samples. Raises AudioError for more than `most`, or for another length than stated."""
        import av

        parts: list[np.ndarray] = [np.zeros((self.channels, 0), np.float32)]
        count = 0
        with _decoding():
            resampler = av.AudioResampler(format="fltp", layout=self._stream.layout, rate=self.samplerate)
            for frame in self._container.decode(self._stream):
                parts += [part.to_ndarray() for part in resampler.resample(frame)]
                count += frame.samples
                if count > most:
                    sec = most / self.samplerate
                    raise AudioError(f"cannot be decoded: it is longer than the {sec:.2f} s in its header")
            parts += [part.to_ndarray() for part in resampler.resample(None)]
            self._samples = np.concatenate(parts, axis=1).T
        self.frames = len(self._samples)
        present = self.frames / self.samplerate
        if stated and not any(abs(present - sec) <= LENGTH_TOLERANCE_SEC for sec in stated):
            raise AudioError(f"cannot be decoded: it ends after {present:.2f} s of {stated[0]:.2f} s")
        if not present:
            raise AudioError("cannot be decoded: it has no sound")


def _chosen(tracks: tuple, track: int | None) -> int:
    if len(tracks) > 1 and track is None:
        titles = (
            f"{i}: {t.metadata.get('title') or t.metadata.get('language') or t.name}" for i, t in enumerate(tracks)
        )
        raise TrackError(
            f"has {len(tracks)} sound tracks ({', '.join(titles)}); choose one with --audio_track or the row's "
            "`audio_track`"
        )
    if (track or 0) >= len(tracks):
        raise TrackError(f"has {len(tracks)} sound tracks; track {track} (counted from 0) is out of range")
    return track or 0


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turns any exception of PyAV into an AudioError with its message."""
    try:
        yield
    except AudioError:
        raise
    except Exception as error:
        raise AudioError(f"cannot be decoded: {words_of(error)}") from error


def _stated_end(tags: dict[str, str]) -> float | None:
    """Returns the seconds of Matroska's tag DURATION, `00:01:02.345000000`; its name may have a language suffix."""
    for name, value in tags.items():
        if name.upper().startswith("DURATION") and (found := _CLOCK.fullmatch(value.strip())):
            hours, minutes, seconds = map(float, found.groups())
            return 3600 * hours + 60 * minutes + seconds
    return None
