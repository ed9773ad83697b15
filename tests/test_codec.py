import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from higgs_ds import sample_codec
from higgs_ds.audio import read_audio
from higgs_ds.codec import DEFAULT_CODEC, DEFAULT_CODEC_REVISION, BosonCodec, check_codes, load_codec
from higgs_ds.manifest import read_manifest
from higgs_ds.sample_codec import SampleCodec

ROOT = Path(__file__).parents[1]


def clips_of(name: str) -> list[tuple[np.ndarray, int]]:
    rows, faults = read_manifest(ROOT / "examples/speech" / name)
    assert not faults
    return [read_audio(ref) for row in rows for _, ref in row.audio_refs]


@pytest.fixture(scope="module")
def clips():
    return clips_of("manifest.jsonl")


@pytest.fixture(scope="module")
def codec(clips):
    return SampleCodec.fit(clips)


@pytest.fixture
def folder(codec, tmp_path):
    codec.save(tmp_path / "codec")
    return tmp_path / "codec"


def log_mel_error(codec: SampleCodec, clip: tuple[np.ndarray, int]) -> tuple[float, float]:
    """Mean distance of log-mel (nepers) that quantising makes, and that decoding and measuring again makes."""
    true = sample_codec._frames(*clip)
    codes = codec.encode(*clip)
    quantised = sum(book[row] for book, row in zip(codec._codebooks, codes, strict=True))
    heard = sample_codec._frames(codec.decode(codes), codec.sample_rate)
    return np.abs(quantised - true).mean(), np.abs(heard - true).mean()


# The bounds of the next two tests are what was measured (0.038 and 0.091; 0.265 and 0.264), and a fifth.
def test_clips_it_was_fitted_on_come_back_nearly_as_they_were(codec, clips):
    quantised, heard = np.mean([log_mel_error(codec, clip) for clip in clips[:10]], axis=0)
    assert quantised < 0.046 and heard < 0.11
    for clip in clips[:3]:
        decoded = codec.decode(codec.encode(*clip))
        spectra = sample_codec._frames(*clip).ravel(), sample_codec._frames(decoded, codec.sample_rate).ravel()
        assert np.corrcoef(*spectra)[0, 1] > 0.98


def test_other_clips_of_the_speaker_stay_near(codec):
    quantised, heard = np.mean([log_mel_error(codec, clip) for clip in clips_of("val.jsonl")], axis=0)
    assert quantised < 0.32 and heard < 0.32


def test_each_codebook_refines_the_ones_before(codec, clips):
    residual, left = sample_codec._frames(*clips[0]), []
    for book, row in zip(codec._codebooks, codec.encode(*clips[0]), strict=True):
        residual -= book[row]
        left.append(np.abs(residual).mean())
    assert left == sorted(left, reverse=True) and left[-1] < left[0] / 5


def test_encoding_a_decoded_clip_gives_it_again(codec, clips):
    codes = codec.encode(*clips[0])
    again = codec.encode(codec.decode(codes), codec.sample_rate)
    assert again.shape == codes.shape
    assert (again[0] == codes[0]).mean() > 0.9  # the codebook that carries most; measured 1.0


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 24000, 44100, 48000])
def test_frames_are_the_40_ms_begun(codec, sample_rate):
    assert codec.encode(np.zeros(1, dtype=np.float32), sample_rate).shape == (8, 1)
    for samples, frames in ((sample_rate, 25), (sample_rate + 1, 26), (sample_rate * 2 // 25, 2)):
        codes = codec.encode(np.full(samples, 0.1, dtype=np.float32), sample_rate)
        assert codes.shape == (8, frames) and codes.dtype == np.int16
        waveform = codec.decode(codes)
        assert waveform.shape == (frames * 960,) and waveform.dtype == np.float32 and np.isfinite(waveform).all()


def test_the_same_loudness_whatever_the_rate(codec, clips):
    waveform, sample_rate = clips[0]
    decoded = codec.decode(codec.encode(waveform, sample_rate))
    assert np.sqrt(np.mean(decoded**2)) == pytest.approx(np.sqrt(np.mean(waveform**2)), rel=0.1)


def test_waveforms_it_cannot_take(codec):
    for waveform in (np.zeros(0), np.zeros((100, 2))):
        with pytest.raises(ValueError, match="must be mono"):
            codec.encode(waveform, 16000)


def test_the_same_clips_and_seed_give_the_same_codec_in_any_process(codec, clips, folder):
    """Also with another number of threads, which sum in another order."""
    script = """
import hashlib, sys
from pathlib import Path
from higgs_ds.audio import read_audio
from higgs_ds.manifest import read_manifest
from higgs_ds.sample_codec import SampleCodec
rows, _ = read_manifest("examples/speech/manifest.jsonl")
clips = [read_audio(ref) for row in rows for _, ref in row.audio_refs]
codec = SampleCodec.load(sys.argv[1])
print(SampleCodec.fit(clips[:8], codebook_entries=64).fingerprint)
print(hashlib.sha256(b"".join(codec.encode(*clip).tobytes() for clip in clips)).hexdigest())
"""
    seen = set()
    for threads in ("1", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", script, str(folder)]
        seen.add(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)
    assert len(seen) == 1
    assert SampleCodec.fit(clips[:8], codebook_entries=64).fingerprint == seen.pop().decode().split()[0]


def test_another_seed_gives_another_codec(clips):
    fingerprints = {SampleCodec.fit(clips[:2], codebook_entries=4, seed=seed).fingerprint for seed in (0, 1)}
    assert len(fingerprints) == 2


def test_more_frames_than_needed_are_thinned_out(clips, monkeypatch):
    monkeypatch.setattr(sample_codec, "MAX_FIT_FRAMES", 40)
    first, second = (SampleCodec.fit(clips[:2], codebook_entries=8) for _ in range(2))
    assert first.fingerprint == second.fingerprint


def test_few_frames_give_few_entries(clips):
    waveform, sample_rate = clips[0]
    codec = SampleCodec.fit([(waveform[: sample_rate // 5], sample_rate)])
    assert codec.codebook_size <= 5
    codes = codec.encode(waveform, sample_rate)
    check_codes(codes, codec)
    silent = SampleCodec.fit([(np.zeros(16000), 16000)])
    assert silent.codebook_size == 1 and np.abs(silent.decode(silent.encode(np.zeros(16000), 16000))).max() < 1e-3


def test_an_entry_that_a_smaller_codebook_lacks_adds_nothing(codec):
    uneven = SampleCodec([codec._codebooks[0], *[book[:4] for book in codec._codebooks[1:]]])
    codes = np.zeros((8, 3), dtype=np.int16)
    codes[3] = 200
    without = SampleCodec([*uneven._codebooks[:3], np.zeros((4, 320)), *uneven._codebooks[4:]])
    assert np.array_equal(uneven.decode(codes), without.decode(codes))


@pytest.mark.parametrize("entries", [0, -1, 1025])
def test_fit_refuses_entries_out_of_range(clips, entries):
    with pytest.raises(ValueError, match=f"1 to 1024, found {entries}"):
        SampleCodec.fit(clips[:1], codebook_entries=entries)


def test_fit_refuses_no_clips():
    with pytest.raises(ValueError, match="there were none"):
        SampleCodec.fit([])


def test_saved_and_loaded_it_is_the_same_codec(codec, clips, folder):
    loaded = load_codec(str(folder))
    assert isinstance(loaded, SampleCodec) and loaded.fingerprint == codec.fingerprint
    assert (loaded.num_codebooks, loaded.codebook_size, loaded.frame_rate, loaded.sample_rate) == (8, 256, 25, 24000)
    codes = codec.encode(*clips[0])
    assert np.array_equal(loaded.encode(*clips[0]), codes)
    assert np.array_equal(loaded.decode(codes), codec.decode(codes))
    assert sorted(os.listdir(folder)) == ["codebooks.safetensors", "sample_codec.json"]


def test_load_refuses_damaged_settings(folder):
    path = folder / "sample_codec.json"
    saved = json.loads(path.read_text())
    for text, complaint in (
        ("{", "sample_codec.json is not JSON"),
        ("[]", "settings are None, this version has"),
        (json.dumps({**saved, "settings": {**saved["settings"], "mels": 64}}), "'mels': 64.*fit the codec again"),
        (json.dumps({**saved, "sha256": "0" * 64}), "is not what sample_codec.json was written for"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            load_codec(str(folder))


def test_load_refuses_damaged_tensors(folder):
    path = folder / "codebooks.safetensors"
    good = load_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_codec(str(folder))
    save_torch_file({name: torch.from_numpy(book).bfloat16() for name, book in good.items()}, path)
    with pytest.raises(ValueError, match="cannot be read as safetensors.*BF16"):
        load_codec(str(folder))
    book = good["codebook_3"]
    nan = book.copy()
    nan[0, 0] = np.nan
    for name, tensor, complaint in (
        ("codebook_3", book[:, :319], r"codebook_3 must be finite float32 .*found float32 \[256, 319\]"),
        ("codebook_3", book[0], r"found float32 \[320\]"),
        ("codebook_3", book[:0], r"found float32 \[0, 320\]"),
        ("codebook_3", book.astype(np.float64), "found float64"),
        ("codebook_3", nan, "must be finite"),
        ("codebook_3", book + np.float32(0.01), "is not what sample_codec.json was written for"),
        ("codebook_9", book, "must hold .*, found .*codebook_9"),
    ):
        save_file({**good, name: tensor}, path)
        with pytest.raises(ValueError, match=complaint):
            load_codec(str(folder))
    path.unlink()
    with pytest.raises(ValueError, match=r"it has no codebooks\.safetensors"):
        load_codec(str(folder))


@pytest.mark.parametrize(
    ("codes", "complaint"),
    [
        (np.zeros((8, 2), dtype=np.float32), "must be whole numbers, found float32"),
        (np.zeros((7, 2), dtype=np.int16), r"shape \[8, frames\], found \[7, 2\]"),
        (np.zeros(8, dtype=np.int16), r"shape \[8, frames\], found \[8\]"),
        (np.zeros((8, 0), dtype=np.int16), "no frames"),
        (np.full((8, 2), 256, dtype=np.int16), r"must be 0\.\.255, found 256"),
        (np.full((8, 2), -1, dtype=np.int16), r"must be 0\.\.255, found -1"),
    ],
)
def test_codes_are_checked_before_they_are_decoded(codec, codes, complaint):
    for action in (codec.decode, lambda codes: check_codes(codes, codec)):
        with pytest.raises(ValueError, match=complaint):
            action(codes)
    check_codes(np.array([[0, 255]] * 8), codec)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], "it lacks config.json and model.pth"),
        (["model.pth"], "has model.pth but lacks config.json"),
        (["config.json"], f"no model.pth; .*at revision {DEFAULT_CODEC_REVISION}"),
        (["config.json", "model.safetensors"], f"the layout of newer transformers.*{DEFAULT_CODEC_REVISION}"),
    ],
)
def test_a_folder_that_is_no_codec_is_told_what_it_lacks(tmp_path, files, complaint):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=complaint):
        load_codec(str(tmp_path))


def test_names_that_lead_nowhere(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match="neither a folder here nor the name of a repository"):
        load_codec(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="has no revision: leave 'main' out"):
        load_codec(str(folder), revision="main")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be loaded.*Not a directory"):
        load_codec(str(tmp_path / "file"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--codec: 'someone/absent' cannot be loaded"):
        load_codec("someone/absent")


def test_the_default_repository_is_read_at_the_pinned_revision(folder, monkeypatch):
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        assert "*" not in "".join(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load_codec(DEFAULT_CODEC)
    load_codec(DEFAULT_CODEC, revision="main")
    load_codec("someone/codec")
    assert asked == [(DEFAULT_CODEC, DEFAULT_CODEC_REVISION), (DEFAULT_CODEC, "main"), ("someone/codec", None)]


class SmallHubert:
    """What `AutoModel` would fetch as bosonai/hubert_base, with random weights: the one thing here that is not real."""

    @staticmethod
    def from_pretrained(name, trust_remote_code):
        from transformers import HubertConfig, HubertModel

        assert name == "bosonai/hubert_base"
        small = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "conv_dim": (16,) * 7}
        return HubertModel(HubertConfig(hidden_size=768, num_conv_pos_embeddings=16, **small))


@pytest.fixture(scope="module")
def boson_folder(tmp_path_factory):
    """Upstream's own model in its smallest useful form (16 kHz, one frame = 640 samples), saved as Boson's codec is."""
    from boson_multimodal.audio_processing import higgs_audio_tokenizer as upstream

    folder = tmp_path_factory.mktemp("boson")
    config = {"D": 16, "codebook_dim": 8, "ratios": [8, 8, 10], "sample_rate": 16000, "bins": 64, "n_q": 8}
    config |= {"semantic_techer": "hubert_base_general", "target_bandwidths": [0.5, 1]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "AutoModel", SmallHubert)
        torch.manual_seed(0)
        weights = upstream.HiggsAudioTokenizer(**config, device="cpu").state_dict()
        for name, weight in weights.items():
            if name.endswith("_codebook.inited"):
                weight.fill_(1)  # else the first clip would initialise the codebooks
            if name.endswith("_codebook.embed"):
                weight.normal_()
        torch.save(weights, folder / "model.pth")
        yield folder


def changed_copy(folder: Path, target: Path, change) -> Path:
    """A copy of the codec whose state dict `change` has been over."""
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = torch.load(folder / "model.pth", weights_only=True)
    change(weights)
    torch.save(weights, target / "model.pth")
    return target


def test_boson_codec_gives_what_upstream_gives(boson_folder, clips):
    from boson_multimodal.audio_processing.higgs_audio_tokenizer import load_higgs_audio_tokenizer

    codec = load_codec(str(boson_folder))
    assert isinstance(codec, BosonCodec)
    assert (codec.num_codebooks, codec.codebook_size, codec.frame_rate, codec.sample_rate) == (8, 64, 25, 16000)
    model = load_higgs_audio_tokenizer(str(boson_folder), device="cpu")
    spoken = clips[0][0][5000:14000]
    for sample_rate in (16000, 24000):  # as it is, and resampled
        codes = codec.encode(spoken, sample_rate)
        check_codes(codes, codec)
        assert codes.dtype == np.int16 and abs(codes.shape[1] - len(spoken) * 25 / sample_rate) <= 1
        expected = model.encode(spoken, sample_rate)
        assert np.array_equal(codes, expected.numpy())
        waveform = codec.decode(codes)
        assert waveform.dtype == np.float32 and waveform.shape == (codes.shape[1] * 640,)
        assert np.array_equal(waveform, model.decode(expected[None])[0, 0])
    for samples in (1, 639):  # upstream itself fails below one frame
        assert codec.encode(np.full(samples, 0.1, dtype=np.float32), 16000).shape == (8, 1)
    with pytest.raises(ValueError, match=r"must be 0\.\.63, found 64"):
        codec.decode(np.full((8, 2), 64))


def test_boson_fingerprint_follows_both_files(boson_folder, tmp_path):
    def fingerprint(folder):
        return BosonCodec.fingerprint.func(SimpleNamespace(_files=(folder / "config.json", folder / "model.pth")))

    first = fingerprint(boson_folder)
    assert first == fingerprint(boson_folder) and first.startswith("boson:")
    copy = changed_copy(boson_folder, tmp_path, lambda weights: weights["fc_prior.bias"].add_(1))
    assert fingerprint(copy) != first
    (copy / "model.pth").write_bytes((boson_folder / "model.pth").read_bytes())
    assert fingerprint(copy) == first
    (copy / "config.json").write_text((boson_folder / "config.json").read_text() + " ")
    assert fingerprint(copy) != first


def test_a_weight_without_a_place_or_a_place_without_a_weight_is_refused(boson_folder, tmp_path):
    def rename(weights):
        weights["quantizer.vq.layers.0.project_in.renamed"] = weights.pop("quantizer.vq.layers.0.project_in.weight")

    with pytest.raises(ValueError) as caught:
        load_codec(str(changed_copy(boson_folder, tmp_path, rename)))
    assert (
        "missing ['quantizer.vq.layers.0.project_in.weight'], unexpected ['quantizer.vq.layers.0.project_in.renamed']"
        in str(caught.value)
    )


def test_what_older_torch_and_training_call_otherwise_is_no_fault(boson_folder, tmp_path, clips):
    """Weight norm has two spellings in torch, and HuBERT's mask embedding is there for training only."""

    def older(weights):
        del weights["semantic_model.masked_spec_embed"]
        convolution = "semantic_model.encoder.pos_conv_embed.conv"
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            weights[f"{convolution}.{old}"] = weights.pop(f"{convolution}.parametrizations.weight.{new}")

    copy = changed_copy(boson_folder, tmp_path, older)
    assert np.array_equal(load_codec(str(copy)).encode(*clips[0]), load_codec(str(boson_folder)).encode(*clips[0]))


def test_weights_of_another_size_are_refused(boson_folder, tmp_path):
    def widen(weights):
        weights["fc_prior.bias"] = torch.zeros(3)

    with pytest.raises(ValueError, match=r"model\.pth does not hold (.|\n)*size mismatch for fc_prior\.bias"):
        load_codec(str(changed_copy(boson_folder, tmp_path, widen)))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("content", [b"", b"not a zip", {"payload": Payload()}, [1, 2]])
def test_a_model_file_is_never_executed(boson_folder, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes((boson_folder / "config.json").read_bytes())
    if isinstance(content, bytes):
        (tmp_path / "model.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth does not hold the weights of Boson's codec"):
        load_codec(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("config", ["{", "[]", '{"acoustic_model_config": {}}', '{"n_q": 8, "bins": [8, 8]}'])
def test_a_config_that_is_not_bosons(boson_folder, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"config\.json(: bins must be| is no config of Boson's codec)"):
        load_codec(str(tmp_path))
