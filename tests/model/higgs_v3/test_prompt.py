"""Tokens, streams and labels of a row, and rows that the format does not support."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from higgs_ds.batching.collate import Collator
from higgs_ds.batching.token_counts import LengthIndex, count_tokens
from higgs_ds.codec.load import load_codec
from higgs_ds.data.chatml import AudioRef, Turn, speech_messages
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.controls import control_tokens, find_control, without_tags
from higgs_ds.data.manifest import Manifest, read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.model.higgs_v3.prompt import CONTROL_TAGS, tokenize, undelayed
from tests.conftest import SPEECH

CLIP, REF = AudioRef(Path("/a.wav")), AudioRef(Path("/b.wav"))
CLIPS = sorted(SPEECH.parent.rglob("*.wav")) + sorted(SPEECH.parent.rglob("*.flac"))
B, E = 1024, 1025


def test_token_counts_do_not_depend_on_earlier_rows(v3_base, codec_dir, tmp_path):
    """Shared texts are encoded only once; this must not mix up rows."""
    rows = read_manifest(SPEECH)[0][:6]
    cache = CodeCache(tmp_path, load_codec(str(codec_dir)))
    assert cache.ensure([ref for row in rows for _, ref in row.audio_refs]) == {}
    counted = LengthIndex(cache, v3_base.tokenizer, Collator(v3_base.spec)).count(rows)
    assert counted.tolist() == [count_tokens(row, v3_base.spec, v3_base.tokenizer, cache.frames) for row in rows]


class Names:
    """A tokenizer with readable tokens."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [text]


def test_pieces_of_a_prompt_are_encoded_separately():
    ids, labels, clips = tokenize(*speech_messages("Hello.", CLIP), Names())
    assert ids == ["<|tts|>", "<|text|>", "Hello.", "<|audio|>"] and clips == [CLIP]
    assert labels == [-100, -100, -100, "<|audio|>"]
    turns, start = speech_messages("Hello.", CLIP, ref_text="Before.", ref_audio=REF)
    ids, labels, clips = tokenize(turns, start, Names())
    assert ids == ["<|tts|>", "<|ref_text|>", "Before.", "<|ref_audio|>", "<|text|>", "Hello.", "<|audio|>"]
    assert clips == [REF, CLIP] and labels[:-1] == [-100] * 6 and labels[-1] == "<|audio|>"
    alone = (Turn("user", (REF, " as it is ")), Turn("assistant", (CLIP,)))
    assert tokenize(alone, None, Names())[0] == ["<|tts|>", "<|ref_audio|>", "<|text|>", " as it is ", "<|audio|>"]
    assert tokenize(alone, 2, Names())[1] == [-100] * 5  # all context
    assert tokenize(turns[:-1], None, Names())[0][-2:] == ["<|text|>", "Hello."]  # a prompt to speak from


@pytest.mark.parametrize(
    ("messages", "start", "words"),
    [
        (speech_messages("x", CLIP, scene="A cave.")[0], None, "scene"),
        ((Turn("user", ("x",)), Turn("assistant", (CLIP,), "someone")), None, "recipient"),
        (speech_messages("x", CLIP, ref_text="y", ref_audio=REF)[0], None, "two clips to learn"),
        (speech_messages("x", CLIP, ref_text="y", ref_audio=REF)[0], 1, "two clips to learn"),
        ((Turn("user", ("x",)), Turn("assistant", ("words",))), None, "not one clip"),
        ((Turn("user", ("x", CLIP)), Turn("assistant", (CLIP,))), None, "clip in a user turn"),
        ((Turn("user", ("x",)), Turn("user", ("y",)), Turn("assistant", (CLIP,))), None, "at most one reference"),
    ],
)
def test_unsupported_rows_are_refused_with_the_reason(messages, start, words, v3_base):
    with pytest.raises(ConfigError, match=words):
        tokenize(messages, start, Names())
    assert words in v3_base.spec.problem_of(messages, start)


def test_every_control_tag_is_one_token_and_an_unknown_one_is_text(v3_base):
    def encode(text):
        return v3_base.tokenizer.encode(text, add_special_tokens=False)

    assert len(set(CONTROL_TAGS)) == 43 and all(len(encode(tag)) == 1 for tag in CONTROL_TAGS)
    assert len(encode("<|sfx:laughter|>Haha")) == 5
    controls = control_tokens(v3_base.tokenizer)
    text = "<|sfx:laughter|>Ha <|sfx:laugh|>, <|prosody:pause|>then"
    assert find_control(text, controls) is None and without_tags(text, controls) == "Ha <|sfx:laugh|>, then"
    assert find_control("a <|ref_audio|>", controls).startswith("contains <|ref_audio|>")


def test_only_unknown_tags_cause_a_warning(v3_base, tmp_path):
    rows = [{"text": text, "audio": str(CLIPS[0])} for text in ("<|style:singing|>La.", "<|style:humming|>Hm.")]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = Manifest(str(manifest), controls=control_tokens(v3_base.tokenizer))
    assert [read.check(number)[1] for number in range(2)] == [[], []]
    (warning,) = read._rules.texts.warnings("rows.jsonl")
    assert "<|style:humming|>" in warning.problem and "1 row" in warning.problem


def test_three_frames_are_ten_rows_behind_the_text_token(v3_base):
    codes = torch.arange(24).view(8, 3)
    rows, labels = v3_base.spec.stream(codes), v3_base.spec.stream_labels(codes, True)
    assert rows.shape == labels.shape == (8, 11) and v3_base.spec.stream_length(3) == 11
    assert rows[0].tolist() == [B, 0, 1, 2, E, E, E, E, E, E, E]
    assert rows[3].tolist() == [B, B, B, B, 9, 10, 11, E, E, E, E]
    assert rows[7].tolist() == [B, B, B, B, B, B, B, B, 21, 22, 23]  # the last codebook has no EOC
    # Labels equal the rows, without BOC and without the text token's row.
    assert (labels == torch.where(rows == B, -100, rows)).all() and (labels[:, 0] == -100).all()
    assert (v3_base.spec.stream_labels(codes, False) == -100).all()
    assert torch.equal(undelayed(rows[:, 1:]), codes)


def test_the_counts_of_a_batch_follow_the_format(v3_base):
    from higgs_ds.batching.collate import Collator, Sample

    spec = v3_base.spec
    ids, labels, _ = tokenize(*speech_messages("Hi", CLIP, ref_text="a", ref_audio=REF), v3_base.tokenizer)
    codes = tuple(torch.zeros(8, frames, dtype=torch.long) for frames in (4, 9))
    batch = Collator(spec, round_to=1, with_index=True)([Sample(torch.tensor(ids), torch.tensor(labels), codes, "x")])
    assert batch.text_count == 0 and batch.codebook_counts == [9 + 7 - c for c in range(8)]
    # <|tts|> <|ref_text|> a <|ref_audio|> 11 rows <|text|> H i <|audio|> 16 rows; the last one predicts nothing.
    assert batch.num_tokens == batch.index.num_rows == 3 + 1 + 11 + 3 + 1 + 16
    assert spec.layer_parameters == 2 * 64 * 64 * (2 + 1) + 3 * 64 * 256
