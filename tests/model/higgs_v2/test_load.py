"""A base in transformers' layout under the real engine: the same losses to the bit as in Boson's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from higgs_ds.tools.cli import main
from tests.support.ranks import assert_all


@pytest.fixture(scope="module")
def renamed(tiny_dir, tmp_path_factory):
    """The tiny base in transformers' layout, its weights in two files."""
    folder = tmp_path_factory.mktemp("renamed") / "base"
    assert main(["merge", "--base_ckpt", str(tiny_dir), "--output_dir", str(folder), "--layout", "transformers"]) == 0
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        names, weight_map = sorted(stored.keys()), {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = folder / f"model-0000{number}-of-00002.safetensors"
            save_file({name: stored.get_tensor(name) for name in part}, file)
            weight_map |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "train/text_loss", "train/audio_loss", "train/grad_norm")
    return [tuple(row[key] for key in keys) for row in rows if "train/loss" in row]


def test_either_layout_trains_to_the_same_losses(tiny_dir, renamed, flags_of, forks, tmp_path):
    """Under ZeRO-3, which loads by transformers' loader; the other way in gives the same weights, see test_merge."""
    found = []
    for base in (tiny_dir, renamed):
        out = tmp_path / base.name
        settings = {"base_ckpt": base, "max_steps": 3, "dtype": "bf16", "lora_dropout": 0.1, "batch_size": 1}
        flags = flags_of(out, deepspeed_config="ds_configs/zero3.json", **settings)
        results = forks.run(flags, 2)
        assert_all(results)
        found.append(losses(out))
        with safe_open(out / "adapter/adapter_model.safetensors", framework="pt") as adapter:
            found[-1].append({name: adapter.get_tensor(name) for name in adapter.keys()})  # noqa: SIM118
    (*one, first), (*two, second) = found
    assert len(one) == 3 and one == two
    assert all(torch.equal(value, second[name]) for name, value in first.items()) and len(first) == len(second)


def test_every_rank_refuses_a_wrong_checkpoint_with_code_2(renamed, flags_of, forks, tmp_path):
    copy = shutil.copytree(renamed, tmp_path / "copy")
    index = copy / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = {name: file for name, file in weight_map.items() if file.startswith("model-00001")}
    index.write_text(json.dumps({"weight_map": first}))
    results = forks.run(flags_of(tmp_path / "a", base_ckpt=copy), 2)
    assert_all(results, returncode=2)
    assert "missing weight model." in results[0].output and "Traceback" not in results[0].output
