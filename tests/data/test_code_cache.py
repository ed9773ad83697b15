"""Codes on disk: found again and correct, also with concurrent or killed writers."""

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from higgs_ds.codec.sample import SampleCodec
from higgs_ds.data import code_cache as codes
from higgs_ds.data import records
from higgs_ds.data.audio import content_hash, read_audio
from higgs_ds.data.code_cache import INDEX, CodeCache, CodeStore, MissingCodesError
from higgs_ds.data.manifest import AudioRef, read_manifest

SPEECH = Path(__file__).parents[2] / "examples/speech/manifest.jsonl"
REFS = [ref for row in read_manifest(SPEECH)[0] for _, ref in row.audio_refs][:6]


class CountingCodec(SampleCodec):
    """The sample codec, counting its calls."""

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


def test_each_clip_is_encoded_once(tmp_path, codec):
    cache = CodeCache(tmp_path, codec)
    assert cache.ensure(REFS + REFS) == {}
    assert codec.encoded == 6
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


def test_codes_of_another_codec_are_not_used(tmp_path, codec):
    CodeCache(tmp_path, codec).ensure(REFS[:1])
    other = SampleCodec.fit([read_audio(REFS[0])], codebook_entries=4)
    with pytest.raises(MissingCodesError, match="encode the clip first, with CodeCache.ensure$"):
        CodeCache(tmp_path, other).get(REFS[0])


def damage_cut_off(codes, index):
    codes.write_bytes(codes.read_bytes()[: 8 * 10 * 2])


def damage_a_bit(codes, index):
    content = bytearray(codes.read_bytes())
    content[100] ^= 1
    codes.write_bytes(content)


def damage_range(codes, index):
    """Invalid codes with a valid checksum."""
    rewrite(codes, index, np.fromfile(codes, "<i2") + np.int16(16))


def rewrite(codes, index, values):
    records = np.fromfile(index, INDEX)
    codes.unlink()
    index.unlink()
    store = CodeStore(codes.parent, SimpleNamespace(num_codebooks=8))
    for record in records:
        first = int(record["offset"]) // 2
        store.add(record["key"].tobytes(), values[first : first + 8 * int(record["frames"])].reshape(8, -1))
    store.close_writer()


@pytest.mark.parametrize("damage", [value for name, value in sorted(globals().items()) if name.startswith("damage_")])
def test_corrupt_codes_are_refused_and_encoded_again(tmp_path, codec, damage):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS[:2])
    good = cache.get(REFS[0])
    damage(*(next(cache.folder.glob(pattern)) for pattern in ("*.codes", "*.index")))
    for reader in (cache, CodeCache(tmp_path, codec)):  # an open one, which has read the codes before, and a new one
        with pytest.raises(ValueError, match=r"\.codes is corrupt at byte 0 \(.*\); start again to re-encode it"):
            reader.get(REFS[0])
    codec.encoded = 0
    assert cache.ensure(REFS[:2]) == {}
    assert 1 <= codec.encoded <= 2
    assert np.array_equal(cache.get(REFS[0]), good)
    assert np.array_equal(CodeCache(tmp_path, codec).get(REFS[0]), good)
    codec.encoded = 0
    assert CodeCache(tmp_path, codec).ensure(REFS[:2]) == {} and codec.encoded == 0


@pytest.mark.parametrize("byte", range(0, INDEX.itemsize, 3))
def test_corrupt_index_loses_at_most_one_clip(tmp_path, codec, byte):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS[:3])
    (index,) = cache.folder.glob("*.index")
    content = bytearray(index.read_bytes())
    content[INDEX.itemsize + byte] ^= 0x10
    index.write_bytes(content)
    again = CodeCache(tmp_path, codec)
    lost = [ref for ref in REFS[:3] if not holds(again, ref)]
    assert len(lost) == 1
    assert all(np.array_equal(again.get(ref), cache.get(ref)) for ref in REFS[:3] if ref not in lost)


def holds(cache: CodeCache, ref: AudioRef) -> bool:
    try:
        cache.get(ref)
    except MissingCodesError:
        return False
    return True


def test_partial_record_is_skipped_and_later_ones_are_read(tmp_path, codec):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS[:2])
    (index,) = cache.folder.glob("*.index")
    index.write_bytes(index.read_bytes()[:-1])  # as left by a killed writer
    codec.encoded = 0
    assert CodeCache(tmp_path, codec).ensure(REFS[:3]) == {} and codec.encoded == 2
    codec.encoded = 0
    assert CodeCache(tmp_path, codec).ensure(REFS[:3]) == {} and codec.encoded == 0


@pytest.mark.parametrize("size", [0, 7])
def test_writer_killed_before_its_first_record_has_no_effect(tmp_path, codec, size):
    """Its files exist without a record; another process may also read them at that moment."""
    for suffix in (".index", ".codes"):
        file = CodeCache(tmp_path, codec).folder / f"killed{suffix}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(size))
    (tmp_path / "killed.hashes").write_bytes(bytes(size))
    cache = CodeCache(tmp_path, codec)
    assert cache.ensure(REFS[:2]) == {} and cache.encoded == 2
    assert CodeCache(tmp_path, codec).get(REFS[0]).shape == cache.get(REFS[0]).shape


def test_full_disk_raises_and_earlier_codes_stay(tmp_path, codec, monkeypatch):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS[:1])

    def full(file, content):
        if len(content) > INDEX.itemsize:
            os.write(file, bytes(content[:10]))
            raise OSError(28, "No space left on device")
        os.write(file, content)

    monkeypatch.setattr(codes, "write_all", full)
    with pytest.raises(OSError, match="No space left"):
        cache.ensure(REFS[:3])
    monkeypatch.undo()
    codec.encoded = 0
    assert cache.ensure(REFS[:3]) == {} and codec.encoded == 2
    assert all(np.array_equal(cache.get(ref), SampleCodec.encode(codec, *read_audio(ref))) for ref in REFS[:3])


def test_file_is_read_again_only_if_changed(tmp_path, codec, monkeypatch):
    clip = tmp_path / "clip.flac"
    clip.write_bytes(REFS[0].path.read_bytes())
    os.utime(clip, ns=(1, 10**18))
    reads = []
    monkeypatch.setattr(codes, "content_hash", lambda ref: reads.append(ref) or content_hash(ref))

    def prepared():
        reads.clear()
        cache = CodeCache(tmp_path / "codes", codec)
        assert cache.ensure([AudioRef(path=clip)]) == {}
        return cache, len(reads)

    assert prepared()[1] == 1
    cache, count = prepared()
    assert count == 0 and np.array_equal(cache.get(AudioRef(path=clip)), codec.encode(*read_audio(REFS[0])))
    clip.write_bytes(REFS[1].path.read_bytes())
    os.utime(clip, ns=(1, 10**18 + 1))
    cache, count = prepared()
    assert count == 1 and np.array_equal(cache.get(AudioRef(path=clip)), codec.encode(*read_audio(REFS[1])))
    clip.touch()  # a recent change: another one may have the same time stamp
    assert prepared()[1] == 1 and prepared()[1] == 1


def test_million_clips_take_little_memory_and_time(tmp_path):
    """Index only, without codes: 1,000,000 records and one lookup."""
    count = 1_000_000
    table = np.zeros(count, INDEX)
    table["key"] = np.random.RandomState(0).randint(0, 1 << 62, size=(count, 4))
    table["frames"] = 100
    table["check"] = records.checksums(table)
    (tmp_path / "x.index").write_bytes(table.tobytes())
    tracemalloc.start()
    started = time.process_time()
    read = records.Records(tmp_path, ".index", INDEX)
    took, (now, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read) == count and read.find(table["key"][777].tobytes()) == [777]
    assert (read.find_each(table["key"][::1000]) == np.arange(0, count, 1000)).all()
    assert now < 100e6 and peak < 500e6 and took < 10


def test_frames_of_known_clips_do_not_reread_the_index(tmp_path, codec, monkeypatch):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS)
    keys = np.frombuffer(b"".join(map(cache.key, REFS)), np.uint8).reshape(-1, 32)
    frames = cache.frames_each(keys)  # added since the index was read
    assert frames.tolist() == [cache.frames(ref) for ref in REFS]
    monkeypatch.delattr(CodeStore, "read_index")
    assert cache.frames_each(keys).tolist() == frames.tolist()


def test_problems_are_returned_by_clip_and_other_clips_are_encoded(tmp_path, codec):
    def clip(name, samples, **options):
        soundfile.write(tmp_path / name, samples, 16000, **options)
        return AudioRef(path=tmp_path / name)

    text = tmp_path / "text.wav"
    text.write_text("hello")
    bad = {
        AudioRef(path=tmp_path / "absent.wav"): "is missing",
        AudioRef(path=text): "cannot be decoded: Format not recognised",
        clip("empty.wav", np.zeros(0)): "is empty",
        clip("nan.wav", np.array([0.0, np.nan]), subtype="FLOAT"): "contains NaN or infinite samples",
        clip("long.flac", np.zeros(31 * 16000 + 3200)): "lasts 31.2 s, over --max_duration_sec 30",
    }
    cache = CodeCache(tmp_path / "codes", codec)
    assert cache.ensure([*bad, REFS[0]], max_duration_sec=30.0) == bad
    assert codec.encoded == 1 and len(list(cache.folder.glob("*.codes"))) == 1


def test_duration_limit_applies_to_cached_clips(tmp_path, codec):
    cache = CodeCache(tmp_path, codec)
    cache.ensure(REFS[:1])
    assert cache.ensure(REFS[:1], max_duration_sec=1.5) == {REFS[0]: "lasts 1.8 s, over --max_duration_sec 1.5"}
    assert cache.ensure(REFS[:1], max_duration_sec=1.81) == {}


def test_invalid_codes_are_not_stored(tmp_path, codec):
    codec.encode = lambda waveform, sample_rate: np.full((8, 3), 16, dtype=np.int16)
    problems = CodeCache(tmp_path, codec).ensure(REFS[:1])
    assert list(problems) == REFS[:1] and "0..15" in problems[REFS[0]]
    assert not [path for path in cache_files(tmp_path) if path.suffix != ".hashes"]


def test_get_reads_the_clip_only_once(tmp_path, codec):
    clip = tmp_path / "clip.flac"
    clip.write_bytes(REFS[0].path.read_bytes())
    cache = CodeCache(tmp_path / "codes", codec)
    cache.ensure([AudioRef(path=clip)])
    clip.unlink()
    assert cache.get(AudioRef(path=clip)).shape[0] == 8


def test_processes_fill_one_folder_concurrently(tmp_path, codec, codebooks):
    SampleCodec(codebooks).save(tmp_path / "codec")
    script = """
import sys
from higgs_ds.codec.load import load_codec
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.manifest import read_manifest
refs = [ref for row in read_manifest(sys.argv[1])[0] for _, ref in row.audio_refs][:6]
assert CodeCache(sys.argv[3], load_codec(sys.argv[2])).ensure(refs) == {}
"""
    command = [sys.executable, "-c", script, str(SPEECH), str(tmp_path / "codec"), str(tmp_path / "codes")]
    processes = [subprocess.Popen(command, cwd=SPEECH.parents[2], env={**os.environ}) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    cache = CodeCache(tmp_path / "codes", codec)
    assert all(np.array_equal(cache.get(ref), codec.encode(*read_audio(ref))) for ref in REFS)
    assert len(list(cache.folder.glob("*.codes"))) in (1, 2)  # one file each, unless one process came too late
