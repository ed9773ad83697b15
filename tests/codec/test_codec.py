"""What a codec promises: the same codes everywhere, from either layout of its files, without a hub."""

import hashlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from boson_multimodal.audio_processing import higgs_audio_tokenizer
from safetensors.numpy import load_file, save_file
from transformers import HubertConfig, HubertModel

from higgs_ds.codec import sample as sample_codec
from higgs_ds.codec.base import check_codes
from higgs_ds.codec.boson import BosonCodec
from higgs_ds.codec.boson_tokenizer import TokenizerConfig
from higgs_ds.codec.load import load_codec
from higgs_ds.codec.sample import SampleCodec
from higgs_ds.data.audio import read_audio
from higgs_ds.data.manifest import read_manifest
from higgs_ds.errors import ConfigError
from higgs_ds.options.sections import DEFAULT_CODEC, DEFAULT_CODEC_REVISION
from tests.conftest import SPEECH
from tests.support.ranks import assert_all

ROOT = Path(__file__).parents[2]


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


def test_clips_come_back_nearly_as_they_were(codec, clips):
    """Within what was measured (0.038 and 0.091; of other clips 0.265 and 0.264), and a fifth."""
    quantised, heard = np.mean([log_mel_error(codec, clip) for clip in clips[:5]], axis=0)
    assert quantised < 0.046 and heard < 0.11
    assert max(np.mean([log_mel_error(codec, clip) for clip in clips_of("val.jsonl")], axis=0)) < 0.32
    for clip in clips[:3]:
        codes = codec.encode(*clip)
        decoded = codec.decode(codes)
        # The first codebook carries most; measured 1.0.
        assert (codec.encode(decoded, codec.sample_rate)[0] == codes[0]).mean() > 0.9
        spectra = sample_codec._frames(*clip).ravel(), sample_codec._frames(decoded, codec.sample_rate).ravel()
        assert np.corrcoef(*spectra)[0, 1] > 0.98


def test_frames_are_the_40_ms_begun(codec):
    for samples, rate, frames in ((1, 16000, 1), (16000, 16000, 25), (22051, 22050, 26), (22050 * 2 // 25, 22050, 2)):
        codes = codec.encode(np.full(samples, 0.1, dtype=np.float32), rate)
        assert codes.shape == (8, frames) and codes.dtype == np.int16
        waveform = codec.decode(codes)
        assert waveform.shape == (frames * 960,) and waveform.dtype == np.float32 and np.isfinite(waveform).all()


def test_the_same_clips_and_seed_give_the_same_codec_in_any_process(codec, clips, folder):
    """Also with another number of threads, which sum in another order."""
    script = """
import hashlib, sys
from higgs_ds.codec.sample import SampleCodec
from tests.codec.test_codec import clips_of
clips = clips_of("manifest.jsonl")[:8]
print(SampleCodec.fit(clips, codebook_entries=64).fingerprint)
codec = SampleCodec.load(sys.argv[1])
print(hashlib.sha256(b"".join(codec.encode(*clip).tobytes() for clip in clips)).hexdigest())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"}
    command = [sys.executable, "-c", script, str(folder)]
    there = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    codes = b"".join(codec.encode(*clip).tobytes() for clip in clips[:8])
    here = [SampleCodec.fit(clips[:8], codebook_entries=64).fingerprint, hashlib.sha256(codes).hexdigest()]
    assert there.split() == here


def test_few_frames_give_few_entries(clips):
    waveform, sample_rate = clips[0]
    codec = SampleCodec.fit([(waveform[: sample_rate // 5], sample_rate)])
    assert codec.codebook_size <= 5
    codes = codec.encode(waveform, sample_rate)
    check_codes(codes, codec)
    silent = SampleCodec.fit([(np.zeros(16000), 16000)])
    assert silent.codebook_size == 1 and np.abs(silent.decode(silent.encode(np.zeros(16000), 16000))).max() < 1e-3
    # An entry that a smaller codebook lacks adds nothing.
    books = [codec._codebooks[0], *[book[:1] for book in codec._codebooks[1:]]]
    codes = np.zeros((8, 3), dtype=np.int16)
    codes[3] = codec.codebook_size - 1
    without = SampleCodec([*books[:3], np.zeros((1, 320)), *books[4:]])
    assert np.array_equal(SampleCodec(books).decode(codes), without.decode(codes))


def test_saved_and_loaded_it_is_the_same_codec(codec, clips, folder):
    loaded = load_codec(str(folder))
    assert isinstance(loaded, SampleCodec) and loaded.fingerprint == codec.fingerprint
    assert (loaded.num_codebooks, loaded.codebook_size, loaded.frame_rate, loaded.sample_rate) == (8, 256, 25, 24000)
    codes = codec.encode(*clips[0])
    assert np.array_equal(loaded.encode(*clips[0]), codes)
    assert np.array_equal(loaded.decode(codes), codec.decode(codes))
    assert sorted(os.listdir(folder)) == ["codebooks.safetensors", "sample_codec.json"]


def test_a_damaged_or_foreign_sample_codec_is_one_line(folder):
    settings, codebooks = folder / "sample_codec.json", folder / "codebooks.safetensors"
    good, books = settings.read_text(), load_file(codebooks)
    for text in ("{", good.replace('"mels": 80', '"mels": 64')):
        settings.write_text(text)
        with pytest.raises(ConfigError, match="holds no usable sample codec, fit it again: [^\n]*$"):
            load_codec(str(folder))
    settings.write_text(good)
    save_file(books | {"codebook_3": books["codebook_3"] + np.float32(0.01)}, codebooks)
    with pytest.raises(ConfigError, match="is not what sample_codec.json was written for"):
        load_codec(str(folder))


def test_codes_are_checked_before_they_are_decoded(codec):
    shapes = np.zeros((8, 2), np.float32), np.zeros((7, 2), np.int16), np.zeros((8, 0), np.int16)
    for codes in (*shapes, np.full((8, 2), 256), np.full((8, 2), -1)):
        with pytest.raises(ValueError, match=r"must be whole numbers 0\.\.255 of shape \[8, frames\], found"):
            codec.decode(codes)
    check_codes(np.array([[0, 255]] * 8), codec)


def test_names_that_lead_nowhere(tmp_path, folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="it has no config.json and model.pth"):
        load_codec(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="a folder is looked for first, then the hub"):
        load_codec(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="has no revision: leave 'main' out"):
        load_codec(str(folder), revision="main")
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


# Boson's own codec, as config.json of the pinned revision describes it: its real architecture and sizes.
REAL_CONFIG = {
    "sample_rate": 24000,
    "ratios": [8, 5, 4, 2, 3],
    "D": 256,
    "n_filters": 32,
    "n_q": 8,
    "bins": 1024,
    "codebook_dim": 64,
    "semantic_techer": "hubert_base_general",
    "target_bandwidths": [0.5, 1, 1.5, 2, 4],
}
REAL_WEIGHTS, REAL_BYTES = 602, 805_705_896


class InstalledHubert:
    """For upstream's own constructor and loader, which the tests compare with."""

    @staticmethod
    def from_pretrained(name, trust_remote_code):
        return HubertModel(HubertConfig())


@pytest.fixture(scope="module")
def boson_folder(tmp_path_factory):
    """Upstream's own model with random weights, saved as Boson's codec is: 0.8 GB."""
    folder = tmp_path_factory.mktemp("boson")
    (folder / "config.json").write_text(json.dumps(REAL_CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(higgs_audio_tokenizer, "AutoModel", InstalledHubert)
        torch.manual_seed(0)
        weights = higgs_audio_tokenizer.HiggsAudioTokenizer(**REAL_CONFIG, device="cpu").state_dict()
    for name, weight in weights.items():
        if name.endswith("_codebook.inited"):
            weight.fill_(1)  # else the first clip would initialise the codebooks
        if name.endswith("_codebook.embed"):
            weight.normal_()
    torch.save(weights, folder / "model.pth")
    del weights, weight
    yield folder
    (folder / "model.pth").unlink()


@pytest.fixture(scope="module")
def boson_codec(boson_folder):
    return load_codec(str(boson_folder))


@pytest.fixture(scope="module")
def hollow(boson_folder):
    """Weights of the right names and shapes, each one value that is stretched: a file of 0.2 MB."""
    real = torch.load(boson_folder / "model.pth", weights_only=True, mmap=True)
    return {name: torch.ones(()).expand(weight.shape) for name, weight in real.items()}


def saved(folder: Path, weights) -> Path:
    (folder / "config.json").write_text(json.dumps(REAL_CONFIG))
    torch.save(weights, folder / "model.pth")
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """No name is resolved, nothing is connected to, and no class is made from code of a repository."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise AssertionError(f"no network here: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.dynamic_module_utils, "get_class_from_dynamic_module", refuse)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    yield
    assert not tried


def memory_mb() -> float:
    """Of this process, without what it maps from files."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1000


def test_the_real_codec_needs_neither_the_hub_nor_its_code(boson_folder, clips, no_network, monkeypatch, capsys):
    before = memory_mb()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    codec = load_codec(str(boson_folder))
    assert isinstance(codec, BosonCodec) and codec._model is None and memory_mb() - before < 50
    assert (codec.num_codebooks, codec.codebook_size, codec.frame_rate, codec.sample_rate) == (8, 1024, 25, 24000)

    spoken = clips[0][0][5000:14000]
    codes = codec.encode(spoken, 16000)
    assert codes.dtype == np.int16 and codes.shape == (8, 14)
    check_codes(codes, codec)
    model = codec._model
    assert type(model.semantic_model) is HubertModel and not model.training
    weights = model.state_dict()
    assert len(weights) == REAL_WEIGHTS and sum(weight.nbytes for weight in weights.values()) == REAL_BYTES
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not any(weight.requires_grad for weight in model.parameters())
    waveform = codec.decode(codes)
    assert waveform.dtype == np.float32 and waveform.shape == (14 * 960,) and np.isfinite(waveform).all()
    for samples in (1, 639):  # upstream itself fails below one frame
        assert codec.encode(np.full(samples, 0.1, dtype=np.float32), 16000).shape == (8, 1)
    assert capsys.readouterr().err == "" and torch.equal(torch.get_rng_state(), state)

    # Its memory comes back, and it still works after.
    held = memory_mb()
    gone = weakref.ref(model)
    del model, weights
    codec.release()
    assert gone() is None and held - memory_mb() > 0.95 * REAL_BYTES / 1e6
    assert np.array_equal(codec.encode(spoken, 16000), codes)
    codec.release()

    # Upstream's own loader, given the same class of HuBERT, says the same.
    monkeypatch.setattr(higgs_audio_tokenizer, "AutoModel", InstalledHubert)
    upstream = higgs_audio_tokenizer.load_higgs_audio_tokenizer(str(boson_folder), device="cpu")
    expected = upstream.encode(spoken, 16000)
    assert np.array_equal(codes, expected.numpy())
    assert np.array_equal(waveform, upstream.decode(expected[None])[0, 0])


def test_the_config_is_the_one_that_upstream_takes():
    """Fails when upstream's constructor takes something else, or means something else by silence."""
    taken = inspect.signature(higgs_audio_tokenizer.HiggsAudioTokenizer.__init__).parameters.values()
    assert {p.name: p.default for p in taken if p.name not in ("self", "device")} == TokenizerConfig().model_dump()
    source = inspect.getsource(higgs_audio_tokenizer)
    assert 'AutoModel.from_pretrained("bosonai/hubert_base", trust_remote_code=True)' in source


def test_codes_are_computed_in_full_float32_whatever_is_set(boson_codec, clips):
    def settings():
        return (
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"),
        )

    boson_codec.build()
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append((settings(), output.dtype)))
        for module in (boson_codec._model.encoder, boson_codec._model.fc_prior, boson_codec._model.decoder_2)
    ]
    spoken = clips[0][0][5000:9000]
    codes = boson_codec.encode(spoken, 16000)
    waveform = boson_codec.decode(codes)
    before = settings()
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert settings() == (True, True, "medium", True)
            assert np.array_equal(boson_codec.encode(spoken, 16000), codes)
            assert np.array_equal(boson_codec.decode(codes), waveform)
            with pytest.raises(RuntimeError):
                boson_codec.encode(np.zeros((1000, 2, 2)), 24000)
            assert settings() == (True, True, "medium", True)
    finally:
        for hook in hooks:
            hook.remove()
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[2])
    assert len(seen) >= 6 and set(seen) == {((False, False, "highest", False), torch.float32)}


def test_what_bosons_file_may_hold_besides_is_one_line(boson_folder, boson_codec, tmp_path, clips, capsys):
    """Weights that no module has; weight norm as torch spelled it before; HuBERT's mask embedding left out."""
    weights = torch.load(boson_folder / "model.pth", weights_only=True, mmap=True)
    del weights["semantic_model.masked_spec_embed"]
    convolution = "semantic_model.encoder.pos_conv_embed.conv"
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        weights[f"{convolution}.{old}"] = weights.pop(f"{convolution}.parametrizations.weight.{new}")
    for layer in range(4):
        weights |= {f"fc1.{layer}.weight": torch.zeros(2, 2), f"fc1.{layer}.bias": torch.zeros(2)}
    codec = load_codec(str(saved(tmp_path, weights)))
    spoken = clips[0][0][5000:9000]
    assert np.array_equal(codec.encode(spoken, 16000), boson_codec.encode(spoken, 16000))
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        said.startswith(f"--codec: {tmp_path}/model.pth: ") and "fc1.0.weight, fc1.0.bias" in said and "3 more" in said
    )
    codec.release()
    boson_codec.release()
    (tmp_path / "model.pth").unlink()


def without(*prefixes):
    return lambda weights: {name: weight for name, weight in weights.items() if not name.startswith(prefixes)}


PROJECTION = "quantizer.vq.layers.0.project_in.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("encoder.block.1", "decoder_2.model.1"), r"missing encoder\.block\.1\S+(, \S+){4}, … and \d\d more"),
        (
            lambda weights: without(PROJECTION)(weights) | {"renamed": weights[PROJECTION]},
            rf"missing {PROJECTION} \(it holds renamed, which have no place\)",
        ),
        (lambda weights: weights | {"fc_prior.bias": torch.zeros(3)}, r"size mismatch for fc_prior\.bias.*\[3\]"),
        (lambda weights: weights | {"fc_prior.bias": torch.full([1024], np.nan)}, r"not finite: fc_prior\.bias"),
        (
            lambda weights: weights | {"quantizer.vq.layers.5._codebook.inited": torch.zeros(1)},
            r"never fitted: quantizer\.vq\.layers\.5\._codebook\.inited must be 1",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name_before_a_clip_is_blamed(hollow, tmp_path, change, complaint):
    codec = load_codec(str(saved(tmp_path, change(hollow))))
    ref = read_manifest(ROOT / "examples/speech/manifest.jsonl")[0][0].audio_refs[0][1]
    with pytest.raises(ConfigError, match=complaint) as caught:
        codec.encode(*read_audio(ref))
    (line,) = caught.value.problems
    assert line.startswith(f"--codec: {tmp_path}/model.pth") and "\n" not in line
    assert codec._model is None


def test_files_that_change_after_they_were_opened_are_refused(hollow, tmp_path):
    folder = saved(tmp_path, hollow)
    codec = load_codec(str(folder))
    other = load_codec(str(folder))
    content = (folder / "model.pth").read_bytes() + (folder / "config.json").read_bytes()
    assert other.fingerprint == f"boson:{hashlib.sha256(content).hexdigest()}"  # as caches were filled under it
    torch.save(hollow | {"fc_prior.bias": torch.zeros(1024)}, folder / "new")
    os.replace(folder / "new", folder / "model.pth")
    for use in (lambda: codec.fingerprint, codec.build, lambda: other.encode(np.zeros(2000), 16000)):
        with pytest.raises(ConfigError, match="were changed meanwhile; start again"):
            use()
    (folder / "model.pth").unlink()
    with pytest.raises(ConfigError, match=r"model\.pth .*: No such file"):
        codec.build()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("content", [b"not a zip", "half", {"payload": Payload()}, [1, 2]])
def test_a_model_file_is_never_executed(hollow, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, hollow if content == "half" else content)
    if content == "half":
        whole = (tmp_path / "model.pth").read_bytes()
        content = whole[: len(whole) // 2]
    if isinstance(content, bytes):
        (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.pth does not hold the weights of Boson's codec: [^\n]*$"):
        load_codec(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_config_that_is_not_bosons(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(REAL_CONFIG | {"semantic_techer": "wavlm_base_plus"}))
    (tmp_path / "model.pth").write_bytes(b"")
    complaint = "config.json is no config of Boson's codec: semantic_techer is 'wavlm_base_plus': .*hubert_base_general"
    with pytest.raises(ConfigError, match=complaint):
        load_codec(str(tmp_path))


def test_a_run_gives_the_codecs_memory_back_and_a_resumed_one_reads_it_on_one_rank_alone(
    boson_folder, flags_of, forks, tmp_path
):
    manifest = tmp_path / "two.jsonl"
    rows = [json.loads(line) for line in SPEECH.read_text().splitlines()[:2]]
    manifest.write_text("\n".join(json.dumps(row | {"audio": str(SPEECH.parent / row["audio"])}) for row in rows))
    data = {"train_manifest": manifest, "codec": boson_folder, "codes_cache": tmp_path / "codes"}
    flags = flags_of(tmp_path / "run", **data, max_steps=1)
    (first,) = forks.run(flags, 1, patches={0: ["count_codec_networks"]})
    assert first.returncode == 0 and "codec networks: 1 built, 0 left" in first.output, first.output
    flags = flags_of(tmp_path / "run", **data, max_steps=2, batch_size=1, resume="auto")
    again = forks.run(flags, 2, patches={rank: ["count_reads"] for rank in (0, 1)})
    assert_all(again)
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    sizes = {
        "find_together": sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors")),
        "_agree_on_fingerprint": (boson_folder / "model.pth").stat().st_size,
    }
    for result in again:
        assert "codec networks: 0 built, 0 left" in result.output and "resuming after step 1" in again[0].output
    for name, size in sizes.items():  # what one rank has proven no other reads for it
        read = [int(re.search(rf"^{name}: (\d+) bytes read", result.output, flags=re.M)[1]) for result in again]
        assert size <= read[0] < 1.5 * size and read[1] < 100_000 < size, (name, size, read)
