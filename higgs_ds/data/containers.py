"""Clips that libsndfile does not read and PyAV does."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import words_of
from .sound_headers import AudioError

# Of a container without a length in its header, what is decoded at most to find it.
MOST_SAMPLES = 1 << 28
# A length in the header is rounded, and counts what a decoder drops or adds at the ends.
LENGTH_TOLERANCE_SEC = 0.25
# Containers of one file. Playlists are left out: they would open other files, or fetch them.
DEMUXERS = (
    "mov,matroska,avi,asf,flv,mpegts,mpeg,aac,ac3,eac3,amr,amrnb,amrwb,mp3,ape,tta,wv,dsf,iff,caf,wav,w64,ogg,aiff,au,"
    "flac"
)
# Those without a length of their own: FFmpeg guesses it, and so they are whole where they decode to their end.
STREAMS = frozenset("mpegts mpeg aac ac3 eac3 amr amrnb amrwb mp3 flac".split())

_CLOCK = re.compile(r"(\d+):(\d{2}):(\d{2}(?:\.\d*)?)")


class TrackError(AudioError):
    """No sound track of several is chosen, or one that is not there."""


class ContainerFile:
    """The chosen or only sound of a file that PyAV opens, as much of `soundfile.SoundFile` as clips need."""

    def __init__(self, source: Path | io.BytesIO, track: int | None = None):
        """Raises AudioError for what PyAV cannot open, what holds no sound, or less than its header says.

        TrackError where it holds several sounds and no `track`, from 0, or another is chosen.
        """
        import av

        options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
        with _decoding():
            self._container = av.open(str(source) if isinstance(source, Path) else source, "r", options=options)
            if not self._container.streams.audio:
                raise AudioError("cannot be decoded: it holds no sound")
            self._stream = self._container.streams.audio[_chosen(self._container.streams.audio, track)]
            self.samplerate = int(self._stream.rate)
            self.channels = max(1, int(self._stream.channels or 1))
            self._samples: np.ndarray | None = None  # [samples, channels]
            self._at = 0
            is_guess = not STREAMS.isdisjoint(self._container.format.name.split(","))
            promised = [] if is_guess else self._promised_sec()
            if len(promised) == 1:
                self.frames = round(promised[0] * self.samplerate)
            else:
                self._decode(MOST_SAMPLES // self.channels, promised)

    def __enter__(self) -> ContainerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def decode(self) -> None:
        """Decodes the file, which then has exactly the frames that are in it.

        Raises AudioError for a file that cannot be decoded, or holds less or more than its header says.
        """
        if self._samples is None:
            tolerance = round(LENGTH_TOLERANCE_SEC * self.samplerate)
            self._decode(self.frames + tolerance, [self.frames / self.samplerate])

    def seekable(self) -> bool:
        return True

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """The next samples, float32 [samples, channels]."""
        assert dtype == "float32" and always_2d and self._samples is not None
        samples = self._samples[self._at : self._at + frames]
        self._at += len(samples)
        return samples

    def _promised_sec(self) -> list[float]:
        """Seconds by the header; of a sound that starts late two, since some state its end and some its length.

        Matroska says of a track only when it ends, its start beside it.
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

    def _decode(self, most: int, promised: list[float]) -> None:
        """All samples; raises AudioError for more than `most`, or for less than is promised."""
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
                    raise AudioError(f"cannot be decoded: it goes on after the {sec:.2f} s that its header says")
            parts += [part.to_ndarray() for part in resampler.resample(None)]
            self._samples = np.concatenate(parts, axis=1).T
        self.frames = len(self._samples)
        there = self.frames / self.samplerate
        if promised and not any(abs(there - sec) <= LENGTH_TOLERANCE_SEC for sec in promised):
            raise AudioError(f"cannot be decoded: it ends after {there:.2f} s of {promised[0]:.2f} s")
        if not there:
            raise AudioError("cannot be decoded: it holds no sound")


def _chosen(tracks: tuple, track: int | None) -> int:
    if len(tracks) > 1 and track is None:
        titles = (
            f"{i}: {t.metadata.get('title') or t.metadata.get('language') or t.name}" for i, t in enumerate(tracks)
        )
        raise TrackError(
            f"holds {len(tracks)} sound tracks ({', '.join(titles)}); choose one with --audio_track or the row's "
            "`audio_track`"
        )
    if (track or 0) >= len(tracks):
        raise TrackError(f"holds {len(tracks)} sound tracks, counted from 0; its track {track} is not there")
    return track or 0


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turns whatever PyAV raises inside into an AudioError, in its own words."""
    try:
        yield
    except AudioError:
        raise
    except Exception as error:
        raise AudioError(f"cannot be decoded: {words_of(error)}") from error


def _stated_end(tags: dict[str, str]) -> float | None:
    """Seconds of Matroska's tag DURATION, `00:01:02.345000000`, under which writers add a language."""
    for name, value in tags.items():
        if name.upper().startswith("DURATION") and (found := _CLOCK.fullmatch(value.strip())):
            hours, minutes, seconds = map(float, found.groups())
            return 3600 * hours + 60 * minutes + seconds
    return None
