"""transformers' own implementation of Boson's codec, against boson_multimodal's: the same weights, the same codes."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from higgs_ds.codec.codec_layout import new_name
from higgs_ds.codec.load import load_codec
from tests.codec.test_codec import boson_folder, clips_of  # noqa: F401 - a fixture
from tests.codec.test_codec_layout import NEW_CONFIG, folded  # noqa: F401 - a fixture


def test_its_names_and_shapes_are_the_ones_that_are_read(boson_folder, transformers_side):  # noqa: F811
    facts = transformers_side("facts")
    weights = torch.load(boson_folder / "model.pth", weights_only=True, mmap=True)
    ours = {new_name(name): list(value.shape) for name, value in weights.items() if not name.endswith(".weight_g")}
    assert ours.pop("semantic_model.masked_spec_embed") == [768]  # HuBERT's training alone uses it
    assert ours == facts["codec"] and len(weights) == 602 and len(ours) == 527
    config = facts["codec_config"]
    for key, value in NEW_CONFIG.items():
        if isinstance(value, dict):
            assert {name: config[key][name] for name in value} == value
        else:
            assert config[key] == value


def test_the_codes_of_a_clip_are_the_same(folded, transformers_side, tmp_path):  # noqa: F811
    codec = load_codec(str(folded))
    samples, rate = clips_of("manifest.jsonl")[0]
    assert rate == codec.sample_rate or rate == 16000
    samples = np.interp(np.arange(0, len(samples), rate / 24000), np.arange(len(samples)), samples)
    for length in (24000, len(samples) // 960 * 960, len(samples)):
        waveform = samples[:length].astype(np.float32)
        save_file({"samples": torch.from_numpy(waveform)}, tmp_path / "in.safetensors")
        transformers_side(
            "encode", folder=folded, waveform=tmp_path / "in.safetensors", output=tmp_path / "out.safetensors"
        )
        theirs = load_file(tmp_path / "out.safetensors")["codes"].numpy()
        assert np.array_equal(theirs, codec.encode(waveform, 24000)), length
    codec.release()
