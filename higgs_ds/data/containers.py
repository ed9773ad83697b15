"""Clips that libsndfile does not read and PyAV does."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import reason_of

# Of a container without a length in its header, what is decoded at most to find it.
MOST_SAMPLES = 1 << 28
# A length in the header is rounded, and counts what a decoder drops or adds at the ends.
LENGTH_TOLERANCE_SEC = 0.25
# Containers of one file. Playlists are left out: they would open other files, or fetch them.
DEMUXERS = (
    "mov,matroska,avi,asf,flv,mpegts,mpeg,aac,ac3,eac3,amr,amrnb,amrwb,mp3,ape,tta,wv,dsf,iff,caf,wav,w64,ogg,aiff,au"
)

_CLOCK = re.compile(r"(\d+):(\d{2}):(\d{2}(?:\.\d*)?)")


class ContainerError(Exception):
    """What PyAV cannot open or decode, as a short text."""


class ContainerFile:
    """The first sound of a file that PyAV opens, as much of `soundfile.SoundFile` as clips need."""

    def __init__(self, source: Path | BinaryIO):
        """Raises ContainerError for what PyAV cannot open or what holds no sound."""
        import av

        self._error = av.error.FFmpegError
        self._source = source
        try:
            self._container = _opened(source)
        except (self._error, ValueError) as error:
            raise ContainerError(reason_of(error)) from error
        streams = self._container.streams.audio
        if not streams or not streams[0].rate:
            self._container.close()
            raise ContainerError("it holds no sound")
        self._stream = streams[0]
        self.samplerate = int(self._stream.rate)
        self.channels = max(1, int(self._stream.channels or 1))
        self._samples: np.ndarray | None = None  # [samples, channels]
        self._at = 0
        try:
            seconds = self._header_sec()
        except (self._error, ValueError) as error:
            raise ContainerError(reason_of(error)) from error
        if seconds is None:
            self._decode(MOST_SAMPLES // self.channels)
        self.frames = len(self._samples) if seconds is None else round(seconds * self.samplerate)

    def __enter__(self) -> ContainerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def decode(self) -> None:
        """Decodes the file, which then has exactly the frames that are in it.

        Raises ContainerError for a file that cannot be decoded, or holds less or more than its header says.
        """
        if self._samples is None:
            header, tolerance = self.frames, round(LENGTH_TOLERANCE_SEC * self.samplerate)
            self._decode(header + tolerance)
            there = len(self._samples) / self.samplerate
            if there == 0 or len(self._samples) < header - tolerance:
                raise ContainerError(f"it ends after {there:.2f} s of {header / self.samplerate:.2f} s")
            self.frames = len(self._samples)

    def seekable(self) -> bool:
        return True

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """The next samples, float32 [samples, channels]."""
        assert dtype == "float32" and always_2d
        samples = self._samples[self._at : self._at + frames]
        self._at += len(samples)
        return samples

    def _header_sec(self) -> float | None:
        """From the first sample to the last. Matroska says of a track only when it ends, its start beside it."""
        stream = self._stream
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        start = float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0
        end = _stated_end(stream.metadata)
        if end is None and len(self._container.streams) == 1 and self._container.duration:
            end = self._container.duration / 1e6  # in microseconds
        if end is not None and start <= LENGTH_TOLERANCE_SEC:
            return max(0.0, end - start) or None
        there = self._packets_sec()
        # Some writers state a track's own length: of the two the one that is there, and neither where it was cut off.
        return there if end is None or abs(there - end) <= LENGTH_TOLERANCE_SEC else max(0.0, end - start) or None

    def _packets_sec(self) -> float | None:
        """From the start of the sound's first packet to the end of its last, without decoding any."""
        with _opened(self._source, anew=True) as container:
            stream = container.streams.audio[0]
            spans = [(p.pts, p.pts + (p.duration or 0)) for p in container.demux(stream) if p.pts is not None]
        if not spans or not stream.time_base:
            return None
        return float((max(end for _, end in spans) - min(start for start, _ in spans)) * stream.time_base) or None

    def _decode(self, most: int) -> None:
        """All samples; raises ContainerError for more than `most`."""
        import av

        parts, count = [np.zeros((self.channels, 0), np.float32)], 0
        try:
            resampler = av.AudioResampler(format="fltp", layout=self._stream.layout, rate=self.samplerate)
            for frame in self._container.decode(self._stream):
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray())
                    count += parts[-1].shape[1]
                if count > most:
                    raise ContainerError(f"it goes on after the {most / self.samplerate:.2f} s that its header says")
            parts += [part.to_ndarray() for part in resampler.resample(None)]
            self._samples = np.concatenate(parts, axis=1).T
        except (self._error, ValueError) as error:  # ValueError: frames of another rate or layout than the first
            raise ContainerError(reason_of(error)) from error


def _opened(source: Path | BinaryIO, anew: bool = False):
    """PyAV's container of a file, or of bytes; `anew` leaves another that reads the same bytes where it is."""
    import av

    if isinstance(source, Path):
        source = str(source)
    elif anew:
        source = io.BytesIO(source.getbuffer())
    return av.open(source, options={"format_whitelist": DEMUXERS, "protocol_whitelist": "file"})


def _stated_end(tags: dict[str, str]) -> float | None:
    """Seconds of Matroska's tag DURATION, `00:01:02.345000000`, under which writers add a language."""
    for name, value in tags.items():
        if name.upper().startswith("DURATION") and (found := _CLOCK.fullmatch(value.strip())):
            hours, minutes, seconds = map(float, found.groups())
            return 3600 * hours + 60 * minutes + seconds
    return None
