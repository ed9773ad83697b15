import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from higgs_ds.audio import read_audio
from higgs_ds.codes import CodeCache, MissingCodesError
from higgs_ds.manifest import AudioRef, read_manifest
from higgs_ds.sample_codec import SampleCodec

SPEECH = Path(__file__).parents[1] / "examples/speech/manifest.jsonl"
REFS = [ref for row in read_manifest(SPEECH)[0] for _, ref in row.audio_refs][:6]


class CountingCodec(SampleCodec):
    """The sample codec, counting what it is asked for."""

    encoded = 0

    def encode(self, waveform, sample_rate):
        self.encoded += 1
        return super().encode(waveform, sample_rate)


@pytest.fixture(scope="module")
def codebooks():
    return SampleCodec.fit(map(read_audio, REFS), codebook_entries=16)._codebooks


@pytest.fixture
def codec(codebooks):
    return CountingCodec(codebooks)


def cache_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_clip_is_encoded_once(tmp_path, codec):
    cache = CodeCache(tmp_path, codec)
    told = []
    assert cache.ensure(REFS + REFS, progress=lambda done, total: told.append((done, total))) == {}
    assert codec.encoded == 6
    assert told == [(done, 6) for done in range(1, 7)]
    for ref in REFS:
        assert np.array_equal(cache.get(ref), SampleCodec.encode(codec, *read_audio(ref)))
        assert cache.get(ref).dtype == np.int16

    codec.encoded = 0
    assert CodeCache(tmp_path, codec).ensure(REFS) == {}  # another run
    assert codec.encoded == 0


def test_the_same_content_under_another_name_is_not_encoded_again(tmp_path, codec):
    copy = tmp_path / "copy.flac"
    copy.write_bytes(REFS[0].path.read_bytes())
    cache = CodeCache(tmp_path / "codes", codec)
    cache.ensure([REFS[0], AudioRef(path=copy)])
    assert codec.encoded == 1
    cache.ensure([AudioRef(path=copy, duration_sec=0.5)])  # a slice is another clip
    assert codec.encoded == 2
    assert cache.get(AudioRef(path=copy, duration_sec=0.5)).shape == (8, 13)


def test_shards_divide_the_clips(tmp_path, codec):
    caches = [CodeCache(tmp_path, codec) for _ in range(4)]
    counts = []
    for shard, cache in enumerate(caches):
        before = codec.encoded
        assert cache.ensure(REFS + REFS, shard=shard, num_shards=4) == {}
        counts.append(codec.encoded - before)
    assert counts == [2, 2, 1, 1]
    assert all(cache.get(ref).shape[0] == 8 for cache in caches for ref in REFS)


def test_codes_of_another_codec_are_not_taken(tmp_path, codec):
    CodeCache(tmp_path, codec).ensure(REFS[:1])
    other = SampleCodec.fit([read_audio(REFS[0])], codebook_entries=4)
    with pytest.raises(MissingCodesError, match="encode the clip first, with CodeCache.ensure$"):
        CodeCache(tmp_path, other).get(REFS[0])


def damage_nothing_there(path):
    path.write_bytes(b"")


def damage_cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_not_npy(path):
    path.write_bytes(b"PK\x03\x04 an archive")


def damage_dtype(path):
    np.save(path, np.load(path).astype(np.int64))


def damage_rows(path):
    np.save(path, np.load(path)[:7])


def damage_range(path):
    np.save(path, np.load(path) + np.int16(16))


def damage_negative(path):
    np.save(path, np.load(path) - np.int16(16))


def damage_no_frames(path):
    np.save(path, np.load(path)[:, :0])


def damage_objects(path):
    np.save(path, np.array([["not codes"]], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [value for name, value in sorted(globals().items()) if name.startswith("damage_")])
def test_a_damaged_file_is_refused_and_made_anew(tmp_path, codec, damage):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS[:2])
    good = cache.get(REFS[0])
    damage(cache._path(cache._hash(REFS[0])))
    with pytest.raises(ValueError, match=r"\.npy is damaged \(.*\); delete it"):
        cache.get(REFS[0])
    codec.encoded = 0
    assert cache.ensure(REFS[:2]) == {}
    assert codec.encoded == 1
    assert np.array_equal(cache.get(REFS[0]), good)
    assert len(cache_files(tmp_path)) == 2


def test_problems_are_told_by_clip_and_the_others_are_encoded(tmp_path, codec):
    def clip(name, samples, **options):
        soundfile.write(tmp_path / name, samples, 16000, **options)
        return AudioRef(path=tmp_path / name)

    text = tmp_path / "text.wav"
    text.write_text("hello")
    bad = {
        AudioRef(path=tmp_path / "absent.wav"): "is missing",
        AudioRef(path=text): "cannot be decoded: Format not recognised",
        clip("empty.wav", np.zeros(0)): "is empty",
        clip("nan.wav", np.array([0.0, np.nan]), subtype="FLOAT"): "holds NaN or infinite samples",
        clip("long.flac", np.zeros(31 * 16000 + 3200)): "lasts 31.2 s, over --max_duration_sec 30",
    }
    cache = CodeCache(tmp_path / "codes", codec)
    assert cache.ensure([*bad, REFS[0]], max_duration_sec=30.0) == bad
    assert codec.encoded == 1 and len(cache_files(tmp_path / "codes")) == 1


def test_the_duration_limit_also_holds_for_cached_clips(tmp_path, codec):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS[:1])
    assert cache.ensure(REFS[:1], max_duration_sec=1.5) == {REFS[0]: "lasts 1.8 s, over --max_duration_sec 1.5"}
    assert cache.ensure(REFS[:1], max_duration_sec=1.81) == {}


def test_codes_that_the_codec_does_not_have_are_not_stored(tmp_path, codec):
    codec.encode = lambda waveform, sample_rate: np.full((8, 3), 16, dtype=np.int16)
    problems = CodeCache(tmp_path, codec).ensure(REFS[:1])
    assert problems == {REFS[0]: "codes must be 0..15, found 16"}
    assert cache_files(tmp_path) == []


def test_get_reads_the_clip_only_once(tmp_path, codec):
    clip = tmp_path / "clip.flac"
    clip.write_bytes(REFS[0].path.read_bytes())
    cache = CodeCache(tmp_path / "codes", codec)
    cache.ensure([AudioRef(path=clip)])
    clip.unlink()
    assert cache.get(AudioRef(path=clip)).shape[0] == 8


def test_processes_fill_one_folder_at_a_time(tmp_path, codec, codebooks):
    SampleCodec(codebooks).save(tmp_path / "codec")
    script = """
import sys
from higgs_ds.codec import load_codec
from higgs_ds.codes import CodeCache
from higgs_ds.manifest import read_manifest
refs = [ref for row in read_manifest(sys.argv[1])[0] for _, ref in row.audio_refs][:6]
assert CodeCache(sys.argv[3], load_codec(sys.argv[2])).ensure(refs) == {}
"""
    command = [sys.executable, "-c", script, str(SPEECH), str(tmp_path / "codec"), str(tmp_path / "codes")]
    processes = [subprocess.Popen(command, cwd=SPEECH.parents[2], env={**os.environ}) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    cache = CodeCache(tmp_path / "codes", codec)
    assert all(np.array_equal(cache.get(ref), codec.encode(*read_audio(ref))) for ref in REFS)
    assert len(cache_files(tmp_path / "codes")) == 6
