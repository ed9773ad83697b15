"""Rows loaded by several ranks together: the same as on one rank, each clip encoded once, nothing lost."""

import base64
import json
import shutil
import threading

import numpy as np
import pytest
import torch

from higgs_ds.batching.collate import Collator
from higgs_ds.batching.token_counts import LengthIndex
from higgs_ds.codec.load import load_codec
from higgs_ds.data import rows as rows_module
from higgs_ds.data.code_cache import CodeCache, CodeStore
from higgs_ds.data.manifest import read_manifest
from higgs_ds.data.rows import RowOptions, load_rows
from higgs_ds.distributed.ranks import Ranks
from higgs_ds.errors import ConfigError
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from tests.conftest import SPEECH


class ThreadRanks(Ranks):
    """Ranks as threads of one process, which record their output."""

    said = ""

    def say(self, text):
        self.said += text + "\n"

    def gather(self, value):
        GATHERED[self.rank] = value
        BARRIER.wait(60)
        values = [GATHERED[rank] for rank in range(self.world_size)]
        BARRIER.wait(60)
        return values


GATHERED: dict[int, object] = {}
BARRIER = threading.Barrier(1)


def on_ranks(world_size: int, run) -> list:
    """Calls `run(ranks)` on each rank; returns results and ConfigErrors."""
    global BARRIER
    BARRIER = threading.Barrier(world_size)
    results: list = [None] * world_size

    def one(rank: int) -> None:
        try:
            results[rank] = run(ThreadRanks(rank, world_size, rank, torch.device("cpu")))
        except ConfigError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def manifests(tmp_path):
    """(training, validation): every kind of row and of fault; some clips occur in many rows."""
    speech = [json.loads(line) for line in SPEECH.read_text().splitlines()][:12]
    for row in speech:
        row["language"] = "en"
        target = tmp_path / row["audio"]
        target.parent.mkdir(exist_ok=True)
        shutil.copy(SPEECH.parent / row["audio"], target)
    (tmp_path / "noise.wav").write_bytes(b"RIFF, and no more")
    inline = base64.b64encode((tmp_path / speech[0]["audio"]).read_bytes()).decode()
    second = {"offset": 0, "duration": 1.0}
    talk = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Sag „ü“ "}, {"type": "audio", "audio_url": "noise.wav"}],
        },
        {"role": "assistant", "content": {"type": "audio", "audio_url": "_", "raw_audio": inline} | second},
    ]
    good_talk = [{"role": "user", "content": "語"}, talk[1], {"role": "assistant", "content": "ok"}]
    reference = {"ref_audio": speech[1]["audio"], "ref_text": speech[1]["text"]}
    of_its_own = {"ref_audio": speech[0]["audio"], "ref_text": speech[0]["text"]}
    lines = [*map(json.dumps, speech), "", "{not json", json.dumps({"messages": talk}), "  \t"]
    lines += [json.dumps({"messages": good_talk}, ensure_ascii=False), json.dumps({"audio": "gone.wav", "text": "a"})]
    lines += [
        json.dumps(row | (of_its_own if i == 1 else reference) | {"text": f"again, {i}"})
        for i, row in enumerate(speech)
    ]
    lines += [json.dumps(speech[2] | {"text": "long " * 300})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    val = [
        speech[3] | {"text": "ein Übergang 語"},
        speech[4] | {"text": "a\u2028b"},
        speech[5],
        speech[6] | {"audio": 3},
    ]
    (tmp_path / "val.json").write_text(json.dumps(val, ensure_ascii=False, indent=1))
    return [str(tmp_path / "train.jsonl"), str(tmp_path / "val.json")]


@pytest.fixture
def load(manifests, codec_dir, tokenizer, tiny_config, tmp_path):
    def load(world_size: int, *, trained: int = 1, skip_bad_rows: bool = True) -> list:
        def one(ranks):
            cache = CodeCache(tmp_path / "codes", load_codec(str(codec_dir)))
            sets = load_rows(
                manifests,
                RowOptions(max_duration_sec=30.0, max_tokens=1000, skip_bad_rows=skip_bad_rows),
                trained=trained,
                cache=cache,
                ranks=ranks,
                lengths=LengthIndex(cache, tokenizer, Collator(HiggsV2Spec.from_config(tiny_config))),
            )
            return sets, ranks.said, cache

        return on_ranks(world_size, one)

    return load


@pytest.mark.parametrize("chunk_rows", [3, 16384])
@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_load_the_same_rows_as_one(
    load, manifests, monkeypatch, tokenizer, tiny_config, world_size, chunk_rows
):
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", chunk_rows)
    results = load(world_size)
    faults = read_manifest(manifests[0])[1] + read_manifest(manifests[1])[1]
    usable = [
        [row for row in read_manifest(manifest)[0] if "noise.wav" not in str(row) and "long long" not in str(row)]
        for manifest in manifests
    ]
    assert [len(part) for part in usable] == [25, 3] and len(faults) == 3
    for sets, warned, cache in results:
        index = LengthIndex(cache, tokenizer, Collator(HiggsV2Spec.from_config(tiny_config)))
        for rows, wanted in zip(sets, usable, strict=True):
            assert list(rows) == wanted
            for row, plain, tokens in zip(rows, wanted, rows.tokens, strict=True):
                assert (row.line, row.origin) == (plain.line, plain.origin)
                for (_, ref), (_, unkeyed) in zip(row.audio_refs, plain.audio_refs, strict=True):
                    assert unkeyed.key is None and ref.key == cache.key(unkeyed)
                    assert cache.get(ref).shape == (8, cache.frames(ref))
                assert tokens == index.tokens(plain)
        for fault in faults:
            assert str(fault) in warned
        assert "train.jsonl:15: messages[0].content[1]" in warned
        assert "train.jsonl: language: not read, in 25 rows" in warned
        assert "takes" in warned and "over --max_tokens_per_batch 1000" in warned
    everything = [ref.key for rows in results[0][0] for row in rows for _, ref in row.audio_refs]
    assert sum(cache.encoded for _, _, cache in results) == len(set(everything))
    again = load(world_size)
    assert sum(cache.encoded for _, _, cache in again) == 0
    for name in ("numbers", "keys", "clip_ends", "tokens"):
        for sets, _, _ in again:
            for rows, before in zip(sets, results[0][0], strict=True):
                assert np.array_equal(getattr(rows, name), getattr(before, name))


@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_of_several_manifests_are_concatenated(load, manifests, world_size):
    alone, _, _ = load(1)[0]
    for (rows, val), _, cache in load(world_size, trained=2):
        assert len(val) == 0 and rows.counts == [25, 3] and list(rows) == [*alone[0], *alone[1]]
        assert rows.tokens.tolist() == [*alone[0].tokens, *alone[1].tokens]
        for row in rows:
            assert all(cache.get(ref).shape[0] == 8 for _, ref in row.audio_refs)
        speakers = rows.voices["speaker"]
        assert speakers[0] != 0 and not set(speakers[:25]) & set(speakers[25:]) - {0}
        kept = np.arange(28) % 2 == 0
        assert rows.only(kept).counts == [13, 1] and list(rows.only(kept)) == list(rows)[::2] == rows[::2]


def test_codes_of_other_ranks_are_found_without_rereading_the_index(load, monkeypatch):
    """Otherwise every data worker would read it."""
    results = load(3)
    assert sum(cache.encoded > 0 for _, _, cache in results) > 1
    monkeypatch.delattr(CodeStore, "read_index")
    for (train, _), _, cache in results:
        assert all(cache.get(ref).shape[0] == 8 for row in train for _, ref in row.audio_refs)


def test_copy_of_the_target_clip_is_refused_as_reference(load, manifests, tmp_path):
    speech = [json.loads(line) for line in SPEECH.read_text().splitlines()][:3]
    own, other = speech[0]["audio"], speech[1]["audio"]
    shutil.copy(tmp_path / own, tmp_path / "copy.flac")
    (tmp_path / "link.flac").symlink_to(tmp_path / own)
    names = ["copy.flac", "link.flac", f"audio/../{own}", other]
    rows = [speech[0] | {"ref_audio": name, "ref_text": "Hi."} for name in names]
    clips = [[{"type": "audio", "audio_url": name}] for name in ("copy.flac", own, "link.flac", other)]
    say = {"role": "user", "content": "Say."}
    talks = [
        [*({"role": "user", "content": clip} for clip in clips[i:]), say, {"role": "assistant", "content": clips[1]}]
        for i in (2, 3)
    ]
    several = [say, {"role": "assistant", "content": [*clips[0], *clips[2]]}]  # several clips, so no target clip
    rows += [{"messages": talk} for talk in (*talks, several)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for (train, _), warned, _ in load(2):
        assert [row.line for row in train] == [4, 6, 7]
        found = [line.split(": ", 1)[1] for line in warned.splitlines() if "has the same content as the row's" in line]
        of_speech = "ref_audio: has the same content as the row's target clip; give another clip of the voice, or none"
        assert found == [of_speech] * 3 + [of_speech.replace("ref_audio", "messages[0].content[0]")]


def test_faults_are_the_same_on_every_rank(load):
    errors = load(2, skip_bad_rows=False)
    assert all(isinstance(error, ConfigError) for error in errors)
    assert errors[0].problems == errors[1].problems
    assert errors[0].problems[-1].startswith("5 bad rows; nothing was trained")


def test_unreadable_clip_is_a_fault_of_its_rows(load, tmp_path):
    (tmp_path / "empty.wav").touch()
    rows = [
        {"audio": audio, "text": "Hi."} for audio in ("empty.wav", {"bytes": "a-b="}, {"path": "x", "bytes": "===="})
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [error] = load(1, skip_bad_rows=False)
    found = [problem.removeprefix(f"{tmp_path}/train.jsonl:") for problem in error.problems[:3]]
    assert found[0] == "1: audio: cannot be decoded: Format not recognised"
    assert [line[:25] for line in found[1:]] == ["2: audio: is not base64: ", "3: audio: is not base64: "]


def test_ranks_with_different_files_are_refused(load, manifests, codec_dir, tmp_path):
    copy, gone = tmp_path / "copy.jsonl", tmp_path / "gone.jsonl"
    copy.write_text((tmp_path / "train.jsonl").read_text() + "\n")

    def one(ranks):
        of_rank = [manifests[0], manifests[0], str(copy), str(gone)][ranks.rank]
        return load_rows(
            [of_rank],
            RowOptions(max_duration_sec=30.0, skip_bad_rows=True),
            cache=CodeCache(tmp_path / "codes", load_codec(str(codec_dir))),
            ranks=ranks,
        )

    for error in on_ranks(4, one):
        assert "differs on ranks 2, 3 from rank 0; copy the same file to all nodes" in error.problems[0]
        assert [p for p in error.problems[1:] if p.startswith("rank 3: ") and "cannot be read" in p] == error.problems[
            1:
        ]
        assert len(error.problems) == 2


def test_manifest_may_change_after_loading(load, manifests):
    ((train, val), _, _) = load(1)[0]
    before = [list(train), list(val)]
    for manifest in manifests:
        with open(manifest, "r+b") as file:
            file.truncate(10)
    assert [list(train), list(val)] == before


def test_shared_clips_and_last_rows_are_divided_among_ranks():
    for world_size in (1, 2, 8):
        for count in (1, 7, 1000, 100_000):
            shares = [rows_module._share(range(5, 5 + count), rank, world_size) for rank in range(world_size)]
            assert sorted(i for share in shares for i in share) == list(range(5, 5 + count))
            if count >= 1000:
                tail = [sum(i >= 5 + count - count // 10 for i in share) for share in shares]
                assert max(tail) - min(tail) <= rows_module.BLOCK_ROWS
