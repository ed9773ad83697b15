"""Reading of users' audio: containers, channels, slices, wrong headers and refused files."""

import base64
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from higgs_ds.data import containers
from higgs_ds.data.audio import AudioError, content_hash, duration_sec, read_audio, write_wav
from higgs_ds.data.manifest import AudioRef, read_manifest

SPEECH = Path(__file__).parents[2] / "examples/speech/manifest.jsonl"


def tone(samples: int, channels: int = 1) -> np.ndarray:
    """Returns channels of different levels, [samples, channels]."""
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


def test_shipped_clip_matches_its_manifest():
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


def test_slice_is_exact_to_the_sample_and_ends_at_the_files_end(tmp_path):
    path = write(tmp_path / "clip.wav", tone(16000)).path
    whole, _ = read_audio(AudioRef(path=path))
    part = AudioRef(path=path, offset_sec=0.25, duration_sec=0.5)
    assert np.array_equal(read_audio(part)[0], whole[4000:12000]) and duration_sec(part) == 0.5
    rest = AudioRef(path=path, offset_sec=0.75, duration_sec=9.0)
    assert np.array_equal(read_audio(rest)[0], whole[12000:]) and duration_sec(rest) == 0.25


@pytest.mark.parametrize("action", [read_audio, duration_sec])
def test_clip_without_samples_is_refused(tmp_path, action):
    path = write(tmp_path / "clip.wav", tone(16000)).path
    assert problem(write(tmp_path / "empty.wav", tone(0)), action) == "is empty"
    short = problem(AudioRef(path=path, offset_sec=0.5, duration_sec=1e-6), action)
    assert short == "is empty: 1e-06 s from 0.5 s contain no sample"
    assert problem(AudioRef(path=path, offset_sec=1.0), action) == "has offset 1 s, past its end at 1.00 s"
    assert problem(AudioRef(path=path, offset_sec=-1.0), action) == "has offset -1.0 s, must be 0 or more"
    assert problem(AudioRef(path=path, duration_sec=float("nan")), action) == "has duration nan s, must be 0 or more"


@pytest.mark.parametrize("action", [read_audio, duration_sec, content_hash])
def test_missing_file_is_refused(tmp_path, action):
    assert problem(AudioRef(path=tmp_path / "absent.wav"), action) == "is missing"
    assert problem(AudioRef(path=tmp_path), action) == "is not a file"
    os.mkfifo(tmp_path / "pipe.wav")
    assert problem(AudioRef(path=tmp_path / "pipe.wav"), action) == "is not a file"
    assert problem(AudioRef(raw_audio="no base64!"), action).startswith("is not base64: ")


@pytest.mark.parametrize("action", [read_audio, duration_sec])
def test_file_without_audio_is_refused(tmp_path, action):
    text = tmp_path / "text.wav"
    text.write_text("hello world" * 100)
    assert problem(AudioRef(path=text), action) == "cannot be decoded: Format not recognised"
    assert problem(in_base64(text), action) == "cannot be decoded: Format not recognised"
    headerless = tmp_path / "clip.raw"
    headerless.write_bytes(bytes(3200))
    assert ".raw has no header" in problem(AudioRef(path=headerless), action)


@pytest.mark.parametrize("suffix", ["flac", "mp3", "ogg"])
@pytest.mark.parametrize("seconds", [3, 20])  # an Ogg with one page of sound, and with several
def test_truncated_clip_is_refused(tmp_path, suffix, seconds):
    noise = np.random.default_rng(0).normal(0, 0.1, seconds * 16000)
    path = write(tmp_path / f"clip.{suffix}", noise).path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert problem(AudioRef(path=path)).startswith("cannot be decoded: " if suffix == "flac" else "is truncated")


def test_wrong_header_does_not_exhaust_memory(tmp_path):
    path = write(tmp_path / "clip.flac", tone(48000)).path
    flac = bytearray(path.read_bytes())
    flac[21] |= 0x0F  # the 36 bits of STREAMINFO that count samples: 49 days
    flac[22:26] = b"\xff" * 4
    path.write_bytes(flac)
    assert duration_sec(AudioRef(path=path)) > 4e6
    assert problem(AudioRef(path=path)).startswith("cannot be decoded: ")

    for sample_rate in (1, 2**31 - 1):  # resampling from these would not end
        wrong = write(tmp_path / f"{sample_rate}.wav", tone(1000), sample_rate)
        assert problem(wrong) == f"has a sample rate of {sample_rate} Hz, must be 4000 to 768000 Hz"


def encoded(
    path: Path, waveform: np.ndarray, *, sample_rate: int = 16000, codec: str, tracks: int = 1, **options
) -> Path:
    """Writes a file with PyAV; each track has different sound."""
    with av.open(str(path), "w", **options) as container:
        streams = [container.add_stream(codec, rate=sample_rate, layout="mono") for _ in range(tracks)]
        for number, stream in enumerate(streams):
            stream.codec_context.format = stream.codec_context.codec.audio_formats[0]
            frame = av.AudioFrame.from_ndarray(((number + 1) * waveform[None]).astype(np.float32), "fltp", "mono")
            frame.sample_rate = sample_rate
            resampler = av.AudioResampler(stream.codec_context.format, "mono", sample_rate, 1024)
            for part in (*resampler.resample(frame), *resampler.resample(None)):
                container.mux(stream.encode(part))
            container.mux(stream.encode(None))
    return path


def without_length(path: Path) -> Path:
    """Writes a shipped clip four times over, in a format without a sample count."""
    waveform = np.tile(soundfile.read(SPEECH.parent / "audio/conf-full.flac", dtype="float32")[0], 4)
    if path.suffix == ".flac":
        soundfile.write(path, waveform, 16000)
        content = bytearray(path.read_bytes())
        content[21] &= 0xF0  # the 36 bits of STREAMINFO that count samples: 0 stands for "unknown"
        content[22:26] = bytes(4)
        path.write_bytes(content)
        return path
    if path.suffix == ".aac":
        return encoded(path, waveform, codec="aac", format="adts")
    return encoded(path, waveform, codec="mp3", options={"write_xing": "0", "id3v2_version": "0"})


@pytest.mark.parametrize("suffix", ["mp3", "aac", "flac"])
def test_file_without_length_is_accepted_unless_truncated(tmp_path, suffix):
    path = without_length(tmp_path / f"clip.{suffix}")
    seconds = duration_sec(AudioRef(path=path))
    waveform, sample_rate = read_audio(AudioRef(path=path))
    assert len(waveform) / sample_rate == seconds == pytest.approx(6.65, abs=0.15)
    assert np.abs(waveform[-sample_rate:]).max() > 0.01
    assert len(read_audio(in_base64(path))[0]) == len(waveform)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 50])
    assert problem(AudioRef(path=path)).startswith("is truncated" if suffix == "mp3" else "cannot be decoded: ")


@pytest.mark.parametrize("counted", ["0", "1"])
def test_concatenated_mp3s_are_read_to_the_end(tmp_path, counted):
    waveform = soundfile.read(SPEECH.parent / "audio/conf-full.flac", dtype="float32")[0]
    path = encoded(tmp_path / "one.mp3", waveform, codec="mp3", options={"write_xing": counted})
    seconds = duration_sec(AudioRef(path=path))
    path.write_bytes(2 * path.read_bytes())
    assert duration_sec(AudioRef(path=path)) == pytest.approx(2 * seconds, abs=0.25)
    assert len(read_audio(AudioRef(path=path))[0]) / 16000 == pytest.approx(2 * seconds, abs=0.25)


def test_chained_ogg_and_truncated_sphere_are_refused_but_padding_is_accepted(tmp_path):
    waveform = soundfile.read(SPEECH.parent / "audio/conf-full.flac", dtype="float32")[0]
    parts = []
    for name in ("a.ogg", "b.ogg"):
        soundfile.write(tmp_path / name, waveform, 16000, format="OGG", subtype="VORBIS")
        parts.append((tmp_path / name).read_bytes())
    (tmp_path / "c.ogg").write_bytes(b"".join(parts))
    assert len(read_audio(AudioRef(tmp_path / "a.ogg"))[0]) == len(waveform)
    assert "several concatenated streams" in problem(AudioRef(tmp_path / "c.ogg"))
    head = f"NIST_1A\n   1024\nsample_rate -i 16000\nchannel_count -i 1\nsample_count -i {len(waveform)}\n"
    head += "sample_n_bytes -i 2\nsample_byte_format -s2 01\nsample_coding -s3 pcm\nend_head\n"
    content = head.encode().ljust(1024) + (waveform * 32767).astype("<i2").tobytes()
    (tmp_path / "c.sph").write_bytes(content)
    assert len(read_audio(AudioRef(tmp_path / "c.sph"))[0]) == len(waveform)
    (tmp_path / "c.sph").write_bytes(content[: len(content) // 2])
    assert "is truncated: it has" in problem(AudioRef(tmp_path / "c.sph"))
    path = without_length(tmp_path / "clip.mp3")
    seconds = duration_sec(AudioRef(path))
    path.write_bytes(bytes(500) + path.read_bytes())
    assert duration_sec(AudioRef(path)) == seconds
    without_length(tmp_path / "clip.aac").rename(tmp_path / "aac.mp3")
    assert duration_sec(AudioRef(tmp_path / "aac.mp3")) > 6
    assert "track 1 (counted from 0) is out of range" in problem(AudioRef(tmp_path / "a.ogg", audio_track=1))


def test_one_of_several_sound_tracks_must_be_chosen(tmp_path):
    waveform = soundfile.read(SPEECH.parent / "audio/conf-full.flac", dtype="float32")[0] / 4
    path = encoded(tmp_path / "obs.mp4", waveform, codec="aac", tracks=2)
    for action in (duration_sec, read_audio):
        assert "has 2 sound tracks" in problem(AudioRef(path=path), action)
        assert "track 2 (counted from 0) is out of range" in problem(AudioRef(path=path, audio_track=2), action)
    first, second = (read_audio(AudioRef(path=path, audio_track=n))[0] for n in (0, 1))
    assert np.abs(second).max() > 1.5 * np.abs(first).max()
    assert len({content_hash(AudioRef(path=path, audio_track=n)) for n in (None, 0, 1)}) == 3


def test_channels_of_two_speakers_are_mixed_only_on_request(tmp_path):
    voice = soundfile.read(SPEECH.parent / "audio/conf-full.flac", dtype="float32")[0]
    quiet = np.zeros_like(voice)
    call = np.stack([np.r_[voice, quiet], np.r_[quiet, voice]], axis=1)
    path = write(tmp_path / "call.flac", call).path
    assert "has different sound on its 2 channels" in problem(AudioRef(path=path))
    assert "channel 2 (counted from 0) is out of range" in problem(AudioRef(path=path, channel=2))
    for channel, wanted in ((0, call[:, 0]), (1, call[:, 1]), (-1, call.mean(axis=1))):
        assert np.abs(read_audio(AudioRef(path=path, channel=channel))[0] - wanted).max() < 1e-3
    apart = np.stack([voice, 0.5 * np.roll(voice, 40)], axis=1)  # one voice, two microphones
    assert len(read_audio(write(tmp_path / "stereo.flac", apart))[0]) == len(voice)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinite_samples_are_refused(tmp_path, bad):
    clip = tone(1000)
    clip[500] = bad
    assert problem(write(tmp_path / "clip.wav", clip, subtype="FLOAT")) == "contains NaN or infinite samples"


def test_content_hash_depends_only_on_bytes_and_slice(tmp_path):
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


def test_write_wav_writes_16_bit(tmp_path):
    path = tmp_path / "out.wav"
    waveform = np.array([0.0, 0.5, -0.5, 3.0, -3.0], dtype=np.float32)  # beyond full scale: clipped, not wrapped
    write_wav(path, waveform, 24000)
    assert soundfile.info(path).subtype == "PCM_16" and soundfile.info(path).samplerate == 24000
    assert np.abs(read_audio(AudioRef(path=path))[0] - waveform.clip(-1, 1)).max() < 1e-4
    assert os.listdir(tmp_path) == ["out.wav"]


@pytest.mark.parametrize("waveform", [np.array([0.0, np.nan]), np.zeros((2, 2))])
def test_write_wav_leaves_no_file_after_an_error(tmp_path, waveform):
    with pytest.raises(ValueError, match="must be mono"):
        write_wav(tmp_path / "out.wav", waveform, 24000)
    assert os.listdir(tmp_path) == []


def patched(path: Path, place: int, value: int) -> AudioRef:
    content = bytearray(path.read_bytes())
    content[place : place + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)
    return AudioRef(path=path)


@pytest.mark.parametrize("riff", [None, 0, 0xFFFFFFFF, 40])
@pytest.mark.parametrize("data", [0, 4000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36, 32044])
def test_wav_with_wrong_sizes_is_read_to_its_end(tmp_path, riff, data):
    """As ffmpeg does for files written to a pipe."""
    clip = np.random.default_rng(0).normal(0, 0.1, 16000)
    path = write(tmp_path / "clip.wav", clip).path
    whole, _ = read_audio(AudioRef(path=path))
    ref = patched(path, 40, data)
    if riff is not None:
        patched(path, 4, riff)
    for same in (ref, in_base64(path)):
        assert np.array_equal(read_audio(same)[0], whole) and duration_sec(same) == 1.0


EXTRA = [
    b"TAG" + b"x" * 125,
    b"ID3\x04\x00\x00\x00\x00\x02\x01" + b"x" * 200,
    b"LIST\xf4\x01\x00\x00INFOISFT" + b"x" * 200,  # truncated
    b"bext" + b"\xff" * 40,
    b"odd \x08\x00\x00\x0012345678",
    bytes(4096),
    b"\0",
]


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("bits", ["PCM_16", "PCM_U8"])
def test_bytes_after_a_correct_data_chunk_are_not_sound(tmp_path, extra, bits):
    samples = 16000 if bits == "PCM_16" else 15999  # an odd number of bytes, without padding
    path = write(tmp_path / "clip.wav", np.random.default_rng(0).normal(0, 0.1, samples), subtype=bits).path
    whole, _ = read_audio(AudioRef(path=path))
    path.write_bytes(path.read_bytes()[: 44 + samples * (2 if bits == "PCM_16" else 1)] + extra)
    for ref in (AudioRef(path=path), in_base64(path)):
        assert np.array_equal(read_audio(ref)[0], whole) and duration_sec(ref) == len(whole) / 16000


@pytest.mark.parametrize("kind", ["RF64", "W64", "AIFF", "AU", "CAF", "WAV"])
@pytest.mark.parametrize("action", [read_audio, duration_sec])
def test_file_shorter_than_its_header_is_refused(tmp_path, kind, action):
    for endian in ("LITTLE", "BIG") if kind == "AU" else ("FILE",):
        ref = write(tmp_path / "clip", tone(48000), format=kind, subtype="PCM_16", endian=endian)
        assert len(read_audio(ref)[0]) == 48000 and duration_sec(ref) == 3.0
        content = ref.path.read_bytes()
        ref.path.write_bytes(content[:-48000])
        how_much = {"WAV": "ends after 1.50 s of 3.00 s", "CAF": "file is malformed"}.get(kind, "ends after 50")
        assert how_much in problem(ref, action)
        if kind != "CAF":
            ref.path.write_bytes(content[:-320])  # 10 ms: inaudible
            assert duration_sec(ref) == pytest.approx(2.99, abs=0.001)
        for length in (12, 40, 60):  # within the header
            ref.path.write_bytes(content[:length])
            problem(ref, action)


def test_silence_is_refused_also_after_mixing_down(tmp_path):
    assert problem(write(tmp_path / "a.wav", tone(16000) * 1e-3)).startswith("is silent (its loudest sample is 0.0001")
    opposite = tone(16000, channels=2) * [1, -0.5]
    assert problem(write(tmp_path / "b.wav", opposite)).startswith("is silent: its 2 channels cancel out when averaged")
    read_audio(write(tmp_path / "c.wav", tone(16000) * 0.02))  # quiet: it peaks at -54 dB
    assert problem(write(tmp_path / "d.wav", tone(16000) * 0 + 0.3)) == "is silent (all samples are 0.3)"
    read_audio(write(tmp_path / "e.wav", tone(16000) + 0.3))


def test_integers_written_as_floats_are_refused(tmp_path):
    loud = write(tmp_path / "a.wav", tone(16000) * 32767, subtype="FLOAT")
    assert problem(loud).startswith("peaks at 3277, samples must be within -1 to 1")
    opposite = tone(16000, channels=2) * [450, -224]
    assert problem(write(tmp_path / "c.wav", opposite, subtype="FLOAT")).startswith("peaks at 45, samples must be")
    read_audio(write(tmp_path / "b.wav", tone(16000) * 12, subtype="FLOAT"))  # overshoots by 20 %, as a decoder may


def encode(path: Path, codec: str, sample_rate: int = 48000, picture_sec: int = 0, start: float = 0.0) -> None:
    """Writes a tone of 2 s to a container, with PyAV."""
    seconds = 2.0
    wave = (0.3 * np.sin(np.arange(round(seconds * sample_rate)) * 2 * np.pi * 440 / sample_rate)).astype(np.float32)
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=sample_rate, layout="mono")
        if picture_sec:
            picture = container.add_stream("mpeg4", rate=25, width=64, height=64, pix_fmt="yuv420p")
            image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            container.mux([packet for frame in [image] * 25 * picture_sec for packet in picture.encode(frame)])
            container.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.rate, frame.pts = sample_rate, round(start * sample_rate)
        frame.time_base = Fraction(1, sample_rate)
        form, size = sound.codec_context.format.name, sound.codec_context.frame_size or 1024
        parts = av.AudioResampler(format=form, layout="mono", rate=sample_rate, frame_size=size)
        for part in [*parts.resample(frame), *parts.resample(None)]:
            container.mux(sound.encode(part))
        container.mux(sound.encode(None))


CONTAINERS = [
    ("m4a", "aac", 0, 0.0),
    ("webm", "libopus", 0, 0.0),
    ("mp4", "aac", 1, 0.0),
    ("mkv", "pcm_s16le", 0, 0.0),
    ("mkv", "aac", 4, 0.0),  # the picture is longer than the sound
    ("mkv", "libopus", 4, 1.0),  # the sound begins later
    ("mka", "libopus", 0, 5.0),
]


@pytest.mark.parametrize(("suffix", "codec", "picture_sec", "start"), CONTAINERS)
@pytest.mark.parametrize("tagged", [True, False])  # True: the track states its length
def test_containers_unknown_to_libsndfile_are_decoded(tmp_path, monkeypatch, suffix, codec, picture_sec, start, tagged):
    if not tagged:
        monkeypatch.setattr(containers, "_stated_end", lambda tags: None)
    path = tmp_path / f"clip.{suffix}"
    encode(path, codec, picture_sec=picture_sec, start=start)
    for ref in (AudioRef(path=path), in_base64(path)):
        waveform, sample_rate = read_audio(ref)
        assert sample_rate == 48000 and waveform.dtype == np.float32
        assert len(waveform) / sample_rate == pytest.approx(2.0, abs=0.06)
        assert duration_sec(ref) == pytest.approx(len(waveform) / sample_rate, abs=0.06)
        spectrum = np.abs(np.fft.rfft(waveform[4800:52800]))
        assert spectrum.argmax() == 440 and waveform[9600:76800].std() == pytest.approx(0.3 * 2**-0.5, rel=0.02)
    part = AudioRef(path=path, offset_sec=0.5, duration_sec=1.0)
    assert np.array_equal(read_audio(part)[0], waveform[24000:72000]) and duration_sec(part) == 1.0


@pytest.mark.parametrize("kind", ["GSM610", "G721_32", "IMA_ADPCM", "MS_ADPCM", "ULAW"])
def test_wav_of_any_encoding_is_read_whole_and_from_an_offset(tmp_path, kind):
    path = write(tmp_path / "clip.wav", tone(16000)[:, 0], 8000, subtype=kind).path
    for ref in (AudioRef(path=path), in_base64(path)):
        waveform, _ = read_audio(ref)
        assert len(waveform) / 8000 == duration_sec(ref) == pytest.approx(2.0, abs=0.1)
        part = AudioRef(ref.path, ref.raw_audio, offset_sec=0.5, duration_sec=1.0)
        assert np.array_equal(read_audio(part)[0], waveform[4000:12000])


IN_KNOWN = [("wav", "ac3"), ("wav", "g726"), ("wav", "libmp3lame"), ("caf", "alac"), ("ogg", "flac")]


@pytest.mark.parametrize(("suffix", "codec"), IN_KNOWN)
def test_codecs_unknown_to_libsndfile_are_decoded(tmp_path, suffix, codec):
    path = tmp_path / f"clip.{suffix}"
    sample_rate = 8000 if codec == "g726" else 48000
    encode(path, codec, sample_rate=sample_rate)
    for ref in (AudioRef(path=path), in_base64(path)):
        waveform, _ = read_audio(ref)
        assert len(waveform) / sample_rate == pytest.approx(2.0, abs=0.06)
        assert duration_sec(ref) == pytest.approx(2.0, abs=0.06)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert problem(AudioRef(path=path)).startswith("cannot be decoded: " if suffix == "caf" else "is truncated")


def test_late_track_with_a_length_of_its_own(tmp_path, monkeypatch):
    """As written by mkvmerge."""
    encode(tmp_path / "clip.mka", "libopus", start=5.0)
    monkeypatch.setattr(containers, "_stated_end", lambda tags: 2.0)
    assert duration_sec(AudioRef(tmp_path / "clip.mka")) == pytest.approx(2.0, abs=0.05)
    assert len(read_audio(AudioRef(tmp_path / "clip.mka"))[0]) == pytest.approx(96000, abs=2000)


@pytest.mark.parametrize(("suffix", "codec", "start"), [("m4a", "aac", 0), ("webm", "libopus", 0), ("mkv", "aac", 5.0)])
def test_truncated_container_is_refused(tmp_path, suffix, codec, start):
    path = tmp_path / f"clip.{suffix}"
    encode(path, codec, start=start)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert problem(AudioRef(path=path)).startswith("cannot be decoded: ")


def test_playlist_opens_no_other_file(tmp_path):
    encode(tmp_path / "clip.ts", "aac")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path}/clip.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    (tmp_path / "list.txt").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/clip.ts'\n")
    read_audio(AudioRef(path=tmp_path / "clip.ts"))
    for name in ("list.m3u8", "list.txt"):
        for ref in (AudioRef(path=tmp_path / name), in_base64(tmp_path / name)):
            assert problem(ref) == "cannot be decoded: Format not recognised"
