"""Tokens of a row as counted ahead are those that the collator makes and the model computes."""

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from higgs_ds.batching.collate import Collator, build_sample
from higgs_ds.batching.token_counts import LengthIndex
from higgs_ds.codec.load import load_codec
from higgs_ds.data.code_cache import CodeCache
from higgs_ds.data.manifest import Row, Turn, read_manifest
from higgs_ds.model.higgs_v2.prompt import tokenize
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from tests.conftest import SPEECH


@pytest.fixture(scope="module")
def rows():
    speech = read_manifest(SPEECH)[0][:6]
    a, b = (speech[i].audio_refs[0][1] for i in (0, 1))
    talk = (
        Turn("system", ("Be brief.",)),
        Turn("user", ("Ünïcode 語 ", a, "?")),
        Turn("assistant", ("Yes. ", b)),
        Turn("assistant", (a,), recipient="all"),
    )
    text = (Turn("user", ("Say nothing.",)), Turn("assistant", ("Nothing.",)))
    return [*speech, Row(talk, None, None, "m", 1), Row(talk, 3, "x", "m", 2), Row(text, 0, None, "m", 3)]


@pytest.fixture(scope="module")
def cache(rows, codec_dir, tmp_path_factory):
    cache = CodeCache(tmp_path_factory.mktemp("codes"), load_codec(str(codec_dir)))
    assert cache.ensure([ref for row in rows for _, ref in row.audio_refs]) == {}
    return cache


def collator_of(config, **changes) -> Collator:
    return Collator(dataclasses.replace(HiggsV2Spec.from_config(config), **changes))


@pytest.mark.parametrize(("delay", "audio_in", "books"), [(True, True, 8), (False, True, 3), (True, False, 8)])
def test_a_row_is_as_long_as_the_collator_makes_it(rows, cache, tokenizer, tiny_config, delay, audio_in, books):
    collator = collator_of(tiny_config, use_delay_pattern=delay, audio_in_codes=audio_in, num_codebooks=books)
    counted = LengthIndex(cache, tokenizer, collator).count(rows)
    assert counted.dtype == np.int32

    def sample(row):
        return build_sample(row, tokenizer, lambda ref: torch.from_numpy(cache.get(ref).astype("int64")), tokenize)

    assert counted.tolist() == [collator([sample(row)]).num_tokens for row in rows]
    assert counted.sum() == collator([sample(row) for row in rows]).num_tokens


def test_a_row_is_as_long_as_the_model_computes_it(rows, cache, tokenizer, tiny_dir, tiny_config):
    from higgs_ds.model.higgs_v2 import checkpoint as model

    base = model.load_base(tiny_dir, tiny_config, "fp32")
    collator = Collator(HiggsV2Spec.from_config(tiny_config))
    counted = LengthIndex(cache, tokenizer, collator).count(rows[:6])
    for row, tokens in zip(rows[:6], counted, strict=True):
        sample = build_sample(row, tokenizer, lambda ref: torch.from_numpy(cache.get(ref).astype("int64")), tokenize)
        with torch.no_grad():
            out = base(**{k: v for k, v in collator([sample]).model_inputs().items() if k not in ("reward",)})
        assert int(out.attention_mask.sum()) == tokens


class CountingTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def encode(self, text, **options):
        self.calls += 1
        return self.tokenizer.encode(text, **options)


def test_a_second_start_does_not_tokenize_again(rows, codec_dir, tokenizer, tiny_config, tmp_path):
    cache = CodeCache(tmp_path, load_codec(str(codec_dir)))
    cache.ensure([ref for row in rows for _, ref in row.audio_refs])

    def count(some_rows, backend=tokenizer.backend_tokenizer, **changes):
        counting = CountingTokenizer(tokenizer)
        counting.backend_tokenizer = backend
        index = LengthIndex(cache, counting, collator_of(tiny_config, **changes))
        return index.count(some_rows).tolist(), counting.calls

    wanted, calls = count(rows)
    assert calls > 0 and count(rows) == (wanted, 0)
    assert count(rows[::-1]) == (wanted[::-1], 0)  # by row, not by manifest

    first = rows[0].messages
    changed = dataclasses.replace(rows[0], messages=(*first[:-2], Turn("user", ("Other words.",)), first[-1]))
    assert count([changed, *rows[1:]])[1] > 0
    other_clip = dataclasses.replace(rows[0], messages=(*first[:-1], rows[2].messages[-1]))
    assert count([other_clip])[0] != count([rows[0]])[0]
    other = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    other.add_tokens(["Say nothing."])
    assert count(rows, backend=other)[1] > 0  # another tokenizer counts anew
    shorter, calls = count(rows, use_delay_pattern=False)
    assert calls > 0 and all(a <= b for a, b in zip(shorter, wanted, strict=True)) and shorter != wanted

    for file in cache.folder.glob("*.lengths"):
        content = bytearray(file.read_bytes())
        content[40] ^= 1  # the first row's count
        file.write_bytes(content)
    again, calls = count(rows)
    assert again == wanted and calls > 0
