import base64
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from higgs_ds.corpus.audio import AudioError, content_hash, duration_sec, read_audio, write_wav
from higgs_ds.corpus.manifest import AudioRef, read_manifest

SPEECH = Path(__file__).parents[2] / "examples/speech/manifest.jsonl"


def tone(samples: int, channels: int = 1) -> np.ndarray:
    """A different level in each channel, [samples, channels]."""
    wave = 0.1 * np.sin(np.arange(samples) / 10)
    return wave[:, None] * np.arange(1, channels + 1)


def write(path: Path, waveform: np.ndarray, sample_rate: int = 16000, **options) -> AudioRef:
    soundfile.write(path, waveform, sample_rate, **options)
    return AudioRef(path=path)


def problem(ref: AudioRef, action=read_audio) -> str:
    with pytest.raises(AudioError) as caught:
        action(ref)
    return str(caught.value)


def in_base64(path: Path, **fields) -> AudioRef:
    return AudioRef(raw_audio=base64.b64encode(path.read_bytes()).decode(), **fields)


def test_a_shipped_clip_reads_as_its_manifest_says():
    rows, _ = read_manifest(SPEECH)
    ref = rows[0].audio_refs[0][1]
    waveform, sample_rate = read_audio(ref)
    assert (sample_rate, waveform.dtype, waveform.ndim) == (16000, np.float32, 1)
    assert len(waveform) / sample_rate == duration_sec(ref) == pytest.approx(1.801, abs=1e-3)
    assert 0.1 < np.abs(waveform).max() <= 1


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_path_and_base64_give_the_same_mono_samples(tmp_path, suffix):
    by_path = write(tmp_path / f"clip.{suffix}", tone(16000, channels=2))
    by_bytes = in_base64(by_path.path)
    waveform, sample_rate = read_audio(by_path)
    assert sample_rate == 16000 and waveform.dtype == np.float32
    assert np.array_equal(read_audio(by_bytes)[0], waveform)
    assert duration_sec(by_bytes) == duration_sec(by_path) == 1.0
    assert np.abs(waveform - tone(16000)[:, 0] * 1.5).max() < (1e-4 if suffix in ("wav", "flac") else 0.05)


def test_a_slice_is_cut_to_the_sample_and_stops_at_the_end(tmp_path):
    path = write(tmp_path / "clip.wav", tone(16000)).path
    whole, _ = read_audio(AudioRef(path=path))
    part = AudioRef(path=path, offset_sec=0.25, duration_sec=0.5)
    assert np.array_equal(read_audio(part)[0], whole[4000:12000]) and duration_sec(part) == 0.5
    rest = AudioRef(path=path, offset_sec=0.75, duration_sec=9.0)
    assert np.array_equal(read_audio(rest)[0], whole[12000:]) and duration_sec(rest) == 0.25


def test_long_audio_is_read_over_several_blocks(tmp_path):
    clip = np.random.default_rng(0).uniform(-1, 1, (1 << 20, 3)).astype(np.float32)
    waveform, _ = read_audio(write(tmp_path / "clip.wav", clip, 48000, subtype="FLOAT"))
    assert np.array_equal(waveform, clip.mean(axis=1))


@pytest.mark.parametrize("action", [read_audio, duration_sec])
def test_what_has_no_samples(tmp_path, action):
    path = write(tmp_path / "clip.wav", tone(16000)).path
    assert problem(write(tmp_path / "empty.wav", tone(0)), action) == "is empty"
    short = problem(AudioRef(path=path, offset_sec=0.5, duration_sec=1e-6), action)
    assert short == "is empty: 1e-06 s from 0.5 s hold no sample"
    assert problem(AudioRef(path=path, offset_sec=1.0), action) == "has offset 1 s, past its end at 1.00 s"
    assert problem(AudioRef(path=path, offset_sec=-1.0), action) == "has offset -1.0 s, must be 0 or more"
    assert problem(AudioRef(path=path, duration_sec=float("nan")), action) == "has duration nan s, must be 0 or more"


@pytest.mark.parametrize("action", [read_audio, duration_sec, content_hash])
def test_what_is_no_file(tmp_path, action):
    assert problem(AudioRef(path=tmp_path / "absent.wav"), action) == "is missing"
    assert problem(AudioRef(path=tmp_path), action) == "is not a file"
    os.mkfifo(tmp_path / "pipe.wav")
    assert problem(AudioRef(path=tmp_path / "pipe.wav"), action) == "is not a file"
    assert problem(AudioRef(raw_audio="no base64!"), action).startswith("is not base64: ")


@pytest.mark.parametrize("action", [read_audio, duration_sec])
def test_what_is_no_audio(tmp_path, action):
    text = tmp_path / "text.wav"
    text.write_text("hello world" * 100)
    assert problem(AudioRef(path=text), action) == "cannot be decoded: Format not recognised"
    assert problem(in_base64(text), action) == "cannot be decoded: Format not recognised"
    headerless = tmp_path / "clip.raw"
    headerless.write_bytes(bytes(3200))
    assert ".raw has no header" in problem(AudioRef(path=headerless), action)


@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg"])
def test_a_clip_cut_off_is_not_taken_for_a_shorter_one(tmp_path, suffix):
    path = write(tmp_path / f"clip.{suffix}", tone(48000)).path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert problem(AudioRef(path=path)).startswith("cannot be decoded: ")


def test_a_header_that_lies_costs_no_memory(tmp_path):
    path = write(tmp_path / "clip.flac", tone(48000)).path
    flac = bytearray(path.read_bytes())
    flac[21] |= 0x0F  # the 36 bits of STREAMINFO that count samples: 49 days
    flac[22:26] = b"\xff" * 4
    path.write_bytes(flac)
    assert duration_sec(AudioRef(path=path)) > 4e6
    assert problem(AudioRef(path=path)).startswith("cannot be decoded: ")

    flac[21] &= 0xF0  # 0 stands for "unknown", as an encoder writes that cannot seek back
    flac[22:26] = bytes(4)
    path.write_bytes(flac)
    assert "does not say in its header how long it is" in problem(AudioRef(path=path), duration_sec)

    for sample_rate in (1, 2**31 - 1):  # resampling from such would not end
        wrong = write(tmp_path / f"{sample_rate}.wav", tone(1000), sample_rate)
        assert problem(wrong) == f"has a sample rate of {sample_rate} Hz, must be 4000 to 768000"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers(tmp_path, bad):
    clip = tone(1000)
    clip[500] = bad
    assert problem(write(tmp_path / "clip.wav", clip, subtype="FLOAT")) == "holds NaN or infinite samples"


def test_content_hash_follows_bytes_and_slice_only(tmp_path):
    clip = write(tmp_path / "a.wav", tone(1000))
    copy = tmp_path / "b.wav"
    copy.write_bytes(clip.path.read_bytes())
    one_hash = content_hash(clip)
    same = [AudioRef(path=copy), in_base64(copy), AudioRef(path=copy, offset_sec=0.0)]
    assert {content_hash(ref) for ref in same} == {one_hash}
    other = [
        AudioRef(path=copy, offset_sec=0.01),
        AudioRef(path=copy, duration_sec=0.01),
        AudioRef(path=copy, offset_sec=0.01, duration_sec=0.01),
        write(tmp_path / "c.wav", tone(999)),
    ]
    assert len({one_hash, *map(content_hash, other)}) == 5


def test_write_wav_is_16_bit_and_whole(tmp_path):
    path = tmp_path / "out.wav"
    waveform = np.array([0.0, 0.5, -0.5, 3.0, -3.0], dtype=np.float32)  # beyond full scale: clipped, not wrapped
    write_wav(path, waveform, 24000)
    assert soundfile.info(path).subtype == "PCM_16" and soundfile.info(path).samplerate == 24000
    assert np.abs(read_audio(AudioRef(path=path))[0] - waveform.clip(-1, 1)).max() < 1e-4
    assert os.listdir(tmp_path) == ["out.wav"]


@pytest.mark.parametrize("waveform", [np.array([0.0, np.nan]), np.zeros((2, 2))])
def test_write_wav_refuses_and_leaves_nothing(tmp_path, waveform):
    with pytest.raises(ValueError, match="must be mono"):
        write_wav(tmp_path / "out.wav", waveform, 24000)
    assert os.listdir(tmp_path) == []
