"""Reading, measuring, hashing and writing of clips."""

import base64
import hashlib
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from ..errors import reason_of
from ..files import replacing
from .chatml import MIX, AudioRef
from .containers import LENGTH_TOLERANCE_SEC, ContainerFile, TrackError
from .sound_headers import TRUNCATED_SEC, AudioError, present_share, repaired, without_count

# A header may claim any rate; resampling a small file from 1 Hz could exhaust memory.
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4000, 768_000
# More samples than any clip has; libsndfile reports such counts for streams without a length in their header.
UNKNOWN_LENGTH = 1 << 48
READ_SAMPLES = 1 << 20
# Channels of one sound are loud at the same time; channels with one speaker each are not.
LEVEL_SEC, LEAST_LEVELS, SAME_SOUND = 0.05, 8, 0.5
SILENT_PEAK = 1e-3  # -60 dB of full scale: below the peak of any recorded speech
# Lossy decoders overshoot full scale by about 10 %; integers stored as floats exceed it by factors of thousands.
LARGEST_PEAK = 2.0
# Format and subtype of written files, by suffix.
SOUND_FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
# WAVs in other encodings count whole blocks in their header, more samples than the decoder returns.
WHOLE_SAMPLES = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
HASH_BYTES = 1 << 20
MALFORMED = 3  # libsndfile's SF_ERR_MALFORMED_FILE


def read_audio(ref: AudioRef, *, may_be_silent: bool = False) -> tuple[np.ndarray, int]:
    """Reads a clip as a mono waveform, float32 [samples], with its sample rate in Hz.

    Takes the chosen channel, or the mean of all. A slice that extends past the end is cut there.
    Raises AudioError for a clip that is missing, truncated or empty, for NaN, infinite or far too large samples, for
    an offset past the end, and for different voices on the channels if none is chosen. Also, unless `may_be_silent`,
    for silence, as of channels that cancel out: it would teach the model to say nothing.
    """
    with _opened(ref) as file:
        start, stop = _slice(file, ref)
        if isinstance(file, ContainerFile):
            file.decode()
            start, stop = _slice(file, ref)  # decoding has determined its length
        _go_to(file, start)
        # In blocks, so that memory follows the actual length, not the one that the header claims.
        block = max(1, READ_SAMPLES // file.channels)
        mono: list[np.ndarray] = []
        levels: list[np.ndarray] = []
        channel = ref.channel if ref.channel is not None else None if file.channels > 1 else MIX
        left, channel_peak = stop - start, 0.0
        while left > 0:
            samples = file.read(min(left, block), dtype="float32", always_2d=True)  # [samples, channels]
            if len(samples) == 0 and mono and left / file.samplerate <= _rounded_sec(file):
                break
            if len(samples) == 0:
                at, whole = (stop - left) / file.samplerate, file.frames / file.samplerate
                raise AudioError(f"is truncated: it ends after {at:.2f} s of {whole:.2f} s")
            if channel is None:
                levels.append(_levels(samples, file.samplerate))
            elif channel != MIX:
                samples = samples[:, channel : channel + 1]
            mono.append(samples.mean(axis=1))
            channel_peak = max(channel_peak, float(np.abs(samples).max()))
            left -= len(samples)
        waveform, sample_rate = np.concatenate(mono), file.samplerate
        if levels and _differ(np.concatenate(levels)):
            raise AudioError(
                f"has different sound on its {file.channels} channels; choose one, from 0, with --channel "
                "or the row's `channel` (-1: all mixed)"
            )
    if not np.isfinite(waveform).all():
        raise AudioError("contains NaN or infinite samples")
    if channel_peak > LARGEST_PEAK:
        raise AudioError(f"peaks at {channel_peak:.4g}, samples must be within -1 to 1; rescale the file")
    if may_be_silent:
        return waveform, sample_rate
    level = float(waveform.mean(dtype=np.float64))
    peak = float(np.abs(waveform - np.float32(level)).max())  # without a constant offset, which some sound cards add
    if peak < SILENT_PEAK and abs(level) >= SILENT_PEAK:
        raise AudioError(f"is silent (all samples are {level:.2g})")
    if peak < SILENT_PEAK <= channel_peak:
        raise AudioError(f"is silent: its {file.channels} channels cancel out when averaged; choose one with --channel")
    if peak < SILENT_PEAK:
        raise AudioError(f"is silent (its loudest sample is {channel_peak:.2g} of full scale)")
    return waveform, sample_rate


def duration_sec(ref: AudioRef) -> float:
    """Returns a clip's length in seconds from its header, as `read_audio` will cut it. Raises AudioError."""
    with _opened(ref) as file:
        start, stop = _slice(file, ref)
        return (stop - start) / file.samplerate


def content_hash(ref: AudioRef) -> str:
    """Returns the SHA-256 in hex of the file's bytes and the slice: equal for the same clip under any name.

    Raises AudioError if the file is unreadable.
    """
    if ref.raw_audio is not None:
        content = hashlib.sha256(_decoded_base64(ref.raw_audio))
    else:
        content = hashlib.sha256()
        try:
            with _existing(ref).open("rb") as file:
                while chunk := file.read(HASH_BYTES):
                    content.update(chunk)
        except OSError as error:
            raise AudioError(f"cannot be read: {reason_of(error)}") from error
    return hashlib.sha256(content.digest() + ref.span.encode()).hexdigest()


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Writes a mono waveform [samples] as 16-bit WAV; see `write_sound`."""
    _write(path, waveform, sample_rate, *SOUND_FORMATS[".wav"])


def write_sound(path: str | Path, waveform: np.ndarray, sample_rate: int) -> None:
    """Writes a mono waveform [samples] in the format of the file's suffix, one of `SOUND_FORMATS`.

    Clips samples to -1..1. The write is atomic. Raises OSError if it fails, ValueError for a waveform that is not
    one-dimensional or not finite, KeyError for another suffix.
    """
    _write(path, waveform, sample_rate, *SOUND_FORMATS[Path(path).suffix.lower()])


def _write(path: str | Path, waveform: np.ndarray, sample_rate: int, kind: str, subtype: str) -> None:
    waveform = np.asarray(waveform)
    if waveform.ndim != 1 or not np.isfinite(waveform).all():
        raise ValueError(f"{path}: a waveform must be mono [samples] and finite, found shape {list(waveform.shape)}")
    try:
        with (
            replacing(Path(path), synced=False) as beside,
            soundfile.SoundFile(beside, "w", sample_rate, 1, subtype=subtype, format=kind) as file,
        ):
            # Not all at once: libsndfile's Vorbis encoder copies each block to the stack.
            for start in range(0, len(waveform), sample_rate):
                file.write(np.clip(waveform[start : start + sample_rate], -1, 1))
    except soundfile.SoundFileError as error:
        raise OSError(_reason(error)) from error
    except AssertionError as error:  # raised by soundfile if fewer samples were written than given
        raise OSError("the file was only written in part; the disk may be full") from error


@contextmanager
def _opened(ref: AudioRef) -> Iterator[soundfile.SoundFile | ContainerFile]:
    """Opens a clip's file; errors on opening and while the caller reads become AudioErrors."""
    source = io.BytesIO(_decoded_base64(ref.raw_audio)) if ref.raw_audio is not None else _existing(ref)
    try:
        with _sound(repaired(source), ref.audio_track) as file:
            if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
                raise AudioError(
                    f"has a sample rate of {file.samplerate} Hz, must be {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz"
                )
            if ref.sample_rate not in (None, file.samplerate):
                raise AudioError(
                    f"has a sample rate of {file.samplerate} Hz, but the row says {ref.sample_rate}; correct the row"
                )
            if ref.channel is not None and ref.channel >= file.channels:
                raise AudioError(
                    f"has {file.channels} channels; channel {ref.channel} (counted from 0) is out of range"
                )
            if file.frames >= UNKNOWN_LENGTH:
                raise AudioError("has no length in its header; convert it to a plain WAV or FLAC")
            if isinstance(file, soundfile.SoundFile) and file.format not in ("WAV", "WAVEX"):
                share = present_share(file.extra_info)
                if file.frames / file.samplerate * (1 - share) > TRUNCATED_SEC * share:
                    raise AudioError(f"is truncated: it ends after {100 * share:.3g} % of its sound")
            yield file
    except soundfile.SoundFileError as error:
        raise AudioError(f"cannot be decoded: {_reason(error)}") from error
    except OSError as error:
        raise AudioError(f"cannot be read: {reason_of(error)}") from error


def _levels(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Returns each channel's RMS over time: [samples, channels] -> [parts of LEVEL_SEC, channels]."""
    size = max(1, round(LEVEL_SEC * sample_rate))
    parts = samples[: len(samples) // size * size].reshape(-1, size, samples.shape[1])
    return np.sqrt(np.square(parts).mean(axis=1))


def _differ(levels: np.ndarray) -> bool:
    """Returns True if two channels are audible, but not at the same times; `levels` [parts, channels]."""
    heard = levels[:, levels.max(axis=0, initial=0.0) >= SILENT_PEAK]
    if len(heard) < LEAST_LEVELS or heard.shape[1] < 2 or (heard.std(axis=0) < 0.1 * heard.mean(axis=0)).any():
        return False
    return bool(np.corrcoef(heard.T).min() < SAME_SOUND)


def _sound(source: Path | io.BytesIO, track: int | None) -> soundfile.SoundFile | ContainerFile:
    """Opens a file with libsndfile, or with PyAV if libsndfile does not know its container, codec or length.

    Raises libsndfile's error if PyAV fails too, or if libsndfile reports a malformed file, since PyAV would silently
    decode the rest of a truncated one.
    """
    if (content := without_count(source)) is not None:
        return ContainerFile(content, track)
    try:
        sound = soundfile.SoundFile(source)
        if track:
            raise TrackError(f"has one sound track; track {track} (counted from 0) is out of range")
        return sound
    except soundfile.LibsndfileError as error:
        if error.code == MALFORMED:
            raise
        if not isinstance(source, Path):
            source.seek(0)
        try:
            return ContainerFile(source, track)
        except TrackError:
            raise
        except AudioError:
            raise error from None


def _go_to(file: soundfile.SoundFile | ContainerFile, frame: int) -> None:
    """Moves from the file's start to a sample, by reading where an encoding is not seekable."""
    if file.seekable():
        file.seek(frame)
        return
    while frame > 0:
        skipped = len(file.read(min(frame, READ_SAMPLES), dtype="float32", always_2d=True))
        if skipped == 0:
            raise AudioError("is truncated: it ends before its offset")
        frame -= skipped


def _rounded_sec(file: soundfile.SoundFile | ContainerFile) -> float:
    """Returns the seconds that a complete file may be shorter than its header says."""
    if not isinstance(file, soundfile.SoundFile) or file.format not in ("WAV", "WAVEX", "W64", "RF64"):
        return 0.0
    return 0.0 if file.subtype.startswith(WHOLE_SAMPLES) else LENGTH_TOLERANCE_SEC


def _reason(error: soundfile.SoundFileError) -> str:
    return getattr(error, "error_string", str(error)).removeprefix("Error : ").rstrip(".")


def _slice(file: soundfile.SoundFile | ContainerFile, ref: AudioRef) -> tuple[int, int]:
    """Returns the clip's first sample in its file and the one after its last, at least one apart."""
    for name, value in (("offset", ref.offset_sec), ("duration", ref.duration_sec)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise AudioError(f"has {name} {value} s, must be 0 or more")
    if file.frames == 0:
        raise AudioError("is empty")
    offset_sec, whole_sec = ref.offset_sec or 0.0, file.frames / file.samplerate
    if offset_sec >= whole_sec:
        raise AudioError(f"has offset {offset_sec:g} s, past its end at {whole_sec:.2f} s")
    end_sec = whole_sec if ref.duration_sec is None else min(offset_sec + ref.duration_sec, whole_sec)
    start, stop = round(offset_sec * file.samplerate), round(end_sec * file.samplerate)
    if start >= stop:
        raise AudioError(f"is empty: {end_sec - offset_sec:g} s from {offset_sec:g} s contain no sample")
    return start, stop


def _existing(ref: AudioRef) -> Path:
    path = ref.path
    if path is None or not os.path.isfile(path):  # opening a pipe would block
        raise AudioError("is missing" if path is None or not os.path.exists(path) else "is not a file")
    if path.suffix.lower() == ".raw":
        raise AudioError("cannot be decoded: .raw has no header; convert it to WAV or FLAC")
    return path


def _decoded_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise AudioError(f"is not base64: {error}") from error
