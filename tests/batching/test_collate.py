"""Tokens, labels and batches against upstream's own functions, element by element."""

import copy
import dataclasses

import pytest
import torch
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample

from higgs_ds.batching.collate import Collator, build_sample
from higgs_ds.data.manifest import AudioRef, Row, Turn, speech_messages
from higgs_ds.model.higgs_v2.prompt import tokenize
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec

GENERATOR = torch.Generator().manual_seed(0)


def clip(name: str) -> AudioRef:
    return AudioRef(path=f"/nowhere/{name}.wav", raw_audio=None, offset_sec=None, duration_sec=None)


def row(messages, start_index=None, line=1) -> Row:
    return Row(tuple(messages), start_index, None, "m.jsonl", line)


def as_upstream(turns) -> list[dict]:
    def piece(content):
        if isinstance(content, str):
            return {"type": "text", "text": content}
        return {"type": "audio", "audio_url": str(content.path)}

    return [
        {"role": turn.role, "content": [piece(p) for p in turn.content], "recipient": turn.recipient} for turn in turns
    ]


SPEECH, _ = speech_messages("How are you?", clip("target"), scene="A quiet room.")
CLONE, CLONE_START = speech_messages("And now this.", clip("target"), ref_text="Said before.", ref_audio=clip("ref"))
DIALOG = (
    Turn("system", ("Listen: ", clip("sys"))),
    Turn("user", ("What is it?", clip("question"))),
    Turn("assistant", ("It is ", clip("a"), " and ", clip("b"))),
    Turn("assistant", ("Once more.",)),
    Turn("user", ("Thanks — ünïcode ☂",)),
    Turn("assistant", (clip("c"),), "tool"),
)
TEXT = (Turn("user", ("2 + 2?",)), Turn("assistant", ("4",)))
CASES = {
    "speech": (SPEECH, None),
    "clone": (CLONE, CLONE_START),
    "dialog": (DIALOG, None),
    "dialog from turn 3": (DIALOG, 3),
    "text": (TEXT, None),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_labels_are_upstreams(name, tokenizer):
    turns, start = CASES[name]
    ours = tokenize(turns, start, tokenizer)
    theirs = prepare_chatml_sample({"messages": as_upstream(turns), "start_index": start}, tokenizer)
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    assert [str(ref.path) for ref in ours[2]] == [content.audio_url for content in theirs[2]]
    assert any(label >= 0 for label in ours[1])


def codes_for(ref) -> torch.Tensor:
    frames = 3 + len(str(ref.path)) % 5
    return torch.randint(0, 1024, (8, frames), generator=torch.Generator().manual_seed(sum(map(ord, str(ref.path)))))


def upstream_sample(sample) -> ChatMLDatasetSample:
    lengths = [codes.shape[1] for codes in sample.codes]
    return ChatMLDatasetSample(
        input_ids=sample.input_ids.clone(),
        label_ids=sample.label_ids.clone(),
        audio_ids_concat=torch.cat(sample.codes, 1) if lengths else torch.zeros((8, 0), dtype=torch.long),
        audio_ids_start=torch.tensor([0, *lengths[:-1]]).cumsum(0) if lengths else torch.zeros(0, dtype=torch.long),
        audio_waveforms_concat=torch.zeros(0),
        audio_waveforms_start=torch.zeros(0),
        audio_sample_rate=torch.zeros(0),
        audio_speaker_indices=torch.zeros(0),
    )


def upstream_collator(config, **changes) -> HiggsAudioSampleCollator:
    settings = dict(
        whisper_processor=None,
        audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx,
        pad_token_id=config.pad_token_id,
        audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id,
        encode_whisper_embed=config.encode_whisper_embed,
        return_audio_in_tokens=config.encode_audio_in_tokens,
        audio_num_codebooks=config.audio_num_codebooks,
        use_delay_pattern=config.use_delay_pattern,
    )
    return HiggsAudioSampleCollator(**(settings | changes))


def samples_of(names, tokenizer):
    return [build_sample(row(*CASES[name], line=i + 1), tokenizer, codes_for, tokenize) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    "names",
    [["speech"], ["text"], ["speech", "clone", "dialog", "text"], ["dialog from turn 3", "dialog"], ["text", "text"]],
)
@pytest.mark.parametrize("changes", [{}, {"use_delay_pattern": False}, {"encode_audio_in_tokens": False}])
def test_batch_is_upstreams(names, changes, tokenizer, tiny_config):
    config = copy.deepcopy(tiny_config)
    for key, value in changes.items():
        setattr(config, key, value)
    samples = samples_of(names, tokenizer)
    ours = Collator(HiggsV2Spec.from_config(config))(samples)
    theirs = upstream_collator(config)([upstream_sample(sample) for sample in samples])
    for field in dataclasses.fields(theirs):
        mine, wanted = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(wanted, torch.Tensor):
            assert mine.dtype == wanted.dtype, field.name
            assert torch.equal(mine, wanted), field.name
        else:
            assert mine is None and wanted is None, field.name
    assert {field.name for field in dataclasses.fields(theirs)} == set(ours.upstream_fields())


def test_a_sample_is_never_written_to(tokenizer, tiny_config):
    """Upstream's collator masks the sample's own labels; a cached sample then trains on no audio in epoch 2."""
    samples = samples_of(["speech", "clone"], tokenizer)
    before = copy.deepcopy(samples)
    first, second = (Collator(HiggsV2Spec.from_config(tiny_config))(samples) for _ in range(2))
    for old, new in zip(before, samples, strict=True):
        assert torch.equal(old.label_ids, new.label_ids) and torch.equal(old.input_ids, new.input_ids)
        assert all(torch.equal(a, b) for a, b in zip(old.codes, new.codes, strict=True))
    assert torch.equal(first.label_audio_ids, second.label_audio_ids) and sum(second.codebook_counts) > 0


def test_a_reference_is_not_trained_and_a_filler_has_nothing_to_learn(tokenizer, tiny_config):
    (sample,) = samples_of(["clone"], tokenizer)
    batch = Collator(HiggsV2Spec.from_config(tiny_config))([sample])
    reference, target = (codes.shape[1] + 2 + 7 for codes in sample.codes)
    assert (batch.label_audio_ids[:, :reference] == -100).all()
    assert (batch.label_audio_ids[:, reference:] != -100).sum() == 8 * (target - 9 + 1)
    batch = Collator(HiggsV2Spec.from_config(tiny_config))(samples_of(["speech"], tokenizer), filler=True)
    assert batch.text_count == sum(batch.codebook_counts) == 0 < batch.audio_out_ids.shape[1]


def test_counts_are_what_is_predicted(tokenizer, tiny_config):
    samples = samples_of(["speech", "dialog"], tokenizer)
    batch = Collator(HiggsV2Spec.from_config(tiny_config))(samples)
    clips = [samples[0].codes[-1], *samples[1].codes[2:]]
    assert batch.codebook_counts == [sum(codes.shape[1] + 1 for codes in clips)] * 8
    assert batch.text_count == int((batch.label_ids != -100).sum())
    assert batch.num_tokens > batch.input_ids.shape[0]
