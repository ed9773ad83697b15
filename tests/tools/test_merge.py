"""`merge` and `export` from the command line: errors, and names of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from higgs_ds.model.files.adapter_file import WEIGHTS
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
from higgs_ds.tools.cli import main
from tests.model.files.test_adapter_file import edit, write_adapter


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, tiny_config, tiny_dir):
    targets = (*DEFAULT_LORA_TARGETS, "audio_lm_head")
    settings = {"whole": ("audio_codebook_embeddings", "text_lm_head"), "base_model_name_or_path": str(tiny_dir)}
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_config, targets=targets, **settings)


def run(capsys, *argv) -> tuple[int, list[str]]:
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    return code, (said.out + said.err).splitlines()


def test_relative_folders_and_links_are_accepted(adapter_dir, tiny_dir, tmp_path, capsys, monkeypatch):
    """`.` and `..`, and a link to an empty folder, which remains a link."""
    base = ("--base_ckpt", tiny_dir, "--layout", "boson")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert run(capsys, "merge", *base, "--output_dir", ".")[0] == 0
    assert {path.name for path in Path.cwd().iterdir()} >= {"config.json", "README.md", "model.safetensors"}
    code, said = run(capsys, "merge", *base, "--output_dir", "..")
    assert code == 2 and said == ["--output_dir: .. exists; it is not overwritten"]
    copy = shutil.copytree(adapter_dir, tmp_path / "mine")
    (copy / "sub").mkdir()
    for place, name in ((copy, "."), (copy / "sub", "..")):
        monkeypatch.chdir(place)
        assert run(capsys, "export", "--adapter", name, "--layout", "transformers")[0] == 0
        assert (tmp_path / "mine-transformers" / WEIGHTS).is_file()
        shutil.rmtree(tmp_path / "mine-transformers")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    flags = ("export", "--adapter", copy, "--layout", "transformers", "--output_dir", tmp_path / "link")
    assert run(capsys, *flags)[0] == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / WEIGHTS).is_file()
    assert "exists; it is not overwritten" in run(capsys, *flags)[1][0]


def test_wrong_arguments_are_reported_before_the_base_is_located(adapter_dir, tiny_dir, codec_dir, tmp_path, capsys):
    out = ("--output_dir", tmp_path / "out", "--layout", "transformers")
    code, said = run(capsys, "merge", "--base_ckpt", "no/where", "--adapter", adapter_dir, *out)
    assert code == 2 and len(said) == 1 and "--other_base" in said[0]
    code, said = run(capsys, "merge", "--base_ckpt", tiny_dir, "--adapter", tmp_path, *out)
    assert code == 2 and said[0].startswith(f"--adapter: {tmp_path}") and "adapter_config.json" in said[0]
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed/config.json").write_text('{"model_type": "higgs_audio_v2_tokenizer"}')
    (tmp_path / "renamed/model.pth").write_text("")
    wrong = [(codec, "boson") for codec in (tiny_dir, codec_dir, tmp_path / "renamed", "./nowhere")]
    for codec, layout in [*wrong, (tiny_dir, "transformers"), ("./nowhere", "transformers")]:
        code, said = run(capsys, "merge", "--base_ckpt", tiny_dir, "--codec", codec, *out[:-1], layout)
        assert code == 2 and len(said) == 1 and said[0].startswith(f"--codec: {codec}"), said
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(adapter_dir, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(adapter_dir, tmp_path / "mine")
    flags = ["export", "--adapter", copy, "--layout", "transformers"]
    for error in (SafetensorError("No space left on device"), KeyboardInterrupt()):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("safetensors.torch.save_file", fail)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                run(capsys, *flags)
        else:
            code, [line] = run(capsys, *flags)
            assert code == 2 and "mine-transformers cannot be written: " in line and "No space left" in line
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_export_renames_and_loses_nothing(adapter_dir, tiny_dir, tmp_path, capsys):
    copy = shutil.copytree(adapter_dir, tmp_path / "mine")
    code, said = run(capsys, "export", "--adapter", copy, "--layout", "transformers")
    assert code == 0 and "under transformers' names" in said[-1]
    out = tmp_path / "mine-transformers"
    was, now = load_file(copy / WEIGHTS), load_file(out / WEIGHTS)
    assert len(was) == len(now) == 2 * 21 + 2
    saved = ["model.embed_audio_tokens.embed_audio_tokens", "text_lm_head"]
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == saved
    assert torch.equal(
        was["base_model.model.audio_codebook_embeddings.weight"], now[f"base_model.model.{saved[0]}.weight"]
    )
    old = "base_model.model.audio_decoder_proj.audio_lm_head.lora_A.weight"
    assert torch.equal(was[old], now["base_model.model.audio_lm_head.lora_A.weight"])
    old = "base_model.model.layers.1.audio_mlp.up_proj.lora_B.weight"
    assert torch.equal(was[old], now[old.replace("model.layers", "model.model.layers")])
    code, said = run(capsys, "export", "--adapter", copy, "--layout", "transformers")
    assert code == 2 and "exists; it is not overwritten" in said[0]
    edit(copy, base_model_name_or_path=str(tmp_path / "gone"))
    code, said = run(capsys, "export", "--adapter", copy, "--layout", "transformers", "--output_dir", tmp_path / "x")
    assert code == 2 and str(tmp_path / "gone") in said[0]
    code, said = run(
        capsys, "export", "--adapter", copy, "--layout", "transformers", "--output_dir", tmp_path / "x",
        "--base_ckpt", tiny_dir, "--other_base",
    )  # fmt: skip
    assert code == 0 and len(load_file(tmp_path / "x" / WEIGHTS)) == 44


def half(adapter):
    weights = {key: value.clone() for key, value in load_file(adapter / WEIGHTS).items()}
    save_file(dict(sorted(weights.items())[::2]), adapter / WEIGHTS)


def not_a_number(adapter):
    weights = {key: value.clone() for key, value in load_file(adapter / WEIGHTS).items()}
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / WEIGHTS)


def huge(adapter):
    weights = {key: value.clone() for key, value in load_file(adapter / WEIGHTS).items()}
    weights |= {key: value.sign() * 1e19 for key, value in weights.items() if ".lora_" in key}
    save_file(weights, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (huge, "layers.0.self_attn.q_proj.weight"),
        (half, "missing"),
        (not_a_number, "NaN"),
        (lambda a: edit(a, megatron_config={"a": 1}), "megatron_config"),
        (lambda a: edit(a, base_model_name_or_path="some/other"), "some/other"),
    ],
)
@pytest.mark.parametrize("verb", ["merge", "generate"])
def test_every_verb_refuses_a_damaged_adapter(
    verb, damage, words, adapter_dir, tiny_dir, codec_dir, tmp_path, capsys, monkeypatch
):
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    copy = shutil.copytree(adapter_dir, tmp_path / "copy")
    damage(copy)
    flags = ("--base_ckpt", tiny_dir, "--adapter", copy)
    rest = {
        "merge": ("--layout", "boson", "--output_dir", tmp_path / "out"),
        "generate": ("--codec", codec_dir, "--text", "hello", "--output_file", tmp_path / "out.wav"),
    }
    code, said = run(capsys, verb, *flags, *rest[verb])
    assert code == 2 and any(words in line for line in said), said
    assert all(line.startswith("--adapter: ") for line in said), said
    assert not list(tmp_path.glob("out*"))
    if words == "some/other":
        assert run(capsys, "merge", *flags, *rest["merge"], "--other_base")[0] == 0
