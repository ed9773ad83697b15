"""Higgs TTS 3 end to end: trained on real ranks, then used by every verb."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from higgs_ds.model.higgs_v3.licence import DERIVED, NOTICE
from higgs_ds.model.higgs_v3.load import CODEC, open_base
from higgs_ds.tools.cli import main
from tests.conftest import SPEECH
from tests.model.files.test_adapter_file import write_adapter
from tests.support.ranks import assert_all
from tests.test_checkpoint import resumed_to_the_bit

TABLE = "tied.embedding.modality_embeddings.0.embedding"


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def runs(v3_dir, flags_of, forks, tmp_path_factory):
    """Trains three steps, with the table of codes: two ranks under ZeRO-2 and ZeRO-3, and one with accumulation."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name, stage, ranks in ((2, 2, 2), (3, 3, 2), ("alone", 0, 1)):
        found[name] = folder / f"{name}"
        settings = {"base_ckpt": v3_dir, "max_steps": 3, "dtype": "fp32", "lora_dropout": 0.0, "lr": 1e-3}
        settings |= {"train_audio_embeddings": "true", "activation_checkpointing": "2", "reference_rate": 0.5}
        settings |= {"sample_count": 1, "val_manifest": SPEECH.with_name("val.jsonl")}
        settings |= {"deepspeed_config": f"ds_configs/zero{stage}.json", "grad_accum": 2 // ranks}
        assert_all(forks.run(flags_of(found[name], **settings), ranks))
    return found


def test_stages_ranks_and_accumulation_train_the_same_and_the_table_as_one_tensor(runs, v3_dir):
    (two, *others), base = runs.values(), load_file(v3_dir / "model.safetensors")
    assert len(losses(two)) == 3
    first = load_file(two / "adapter/adapter_model.safetensors")
    for run in others:
        for one, other in zip(losses(two), losses(run), strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        second = load_file(run / "adapter/adapter_model.safetensors")
        assert first.keys() == second.keys() and len(first) == 2 * 7 * 2 + 1
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5)
    table = first[f"base_model.model.{TABLE}.weight"]
    moved = (table - base[f"{TABLE}.weight"].float()).abs()
    assert moved.max() > 1e-4 and (moved.amax(1) > 0).float().mean() > 0.1
    assert list(two.glob("samples/**/*.wav"))  # samples in training
    card = (two / "adapter/README.md").read_text()
    assert DERIVED in card and NOTICE in card and "Higgs TTS 3" not in card.split("\n## Licence")[0]


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(v3_dir, flags_of, forks, tmp_path):
    """As in tests/test_checkpoint.py: bf16, dropout, the table of codes trained, random references."""
    ours = resumed_to_the_bit(forks, flags_of, tmp_path, 3, base_ckpt=v3_dir, reference_rate=0.5)
    assert len(ours) == 2 * 7 * 2 + 1 and f"base_model.model.{TABLE}.weight" in ours


def test_a_merged_folder_fits_the_servers_and_speaks_as_base_and_adapter(runs, v3_dir, codec_dir, tmp_path, capsys):
    adapter, merged = str(runs[2] / "adapter"), tmp_path / "voice"
    assert main(["merge", "--base_ckpt", str(v3_dir), "--adapter", adapter, "--output_dir", str(merged)]) == 0
    assert not (merged / "README.md").read_text().split("# ", 1)[1].startswith("Higgs TTS 3")
    assert (merged / "NOTICE").read_text() == f"Somebody else's notice.\n{NOTICE}\n"
    assert DERIVED in (merged / "README.md").read_text()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (merged / name).read_bytes() == (v3_dir / name).read_bytes()
    # vllm-omni raises for unknown names, and for missing names of the language model.
    written, base = load_file(merged / "model.safetensors"), load_file(v3_dir / "model.safetensors")
    language = {name for name in written if not name.startswith((CODEC, "tied.head."))}
    assert language == base.keys() and {one.dtype for one in written.values()} == {torch.bfloat16}
    kept = {name for name in language if torch.equal(written[name], base[name])}
    assert language - kept >= {f"{TABLE}.weight", "body.layers.1.self_attn.q_proj.weight"}
    assert all("norm" in name or name == "tied.embedding.text_embedding.weight" for name in kept)
    assert open_base(str(merged), None, "--merged", merged).stored.keys() == language
    spoken = []
    for voice in (["--merged", str(merged)], ["--base_ckpt", str(v3_dir), "--adapter", adapter]):
        out = tmp_path / f"{len(spoken)}.wav"
        flags = ["--codec", str(codec_dir), "--max_new_tokens", "40", "--output_file", str(out), "--dtype", "bf16"]
        assert main(["generate", *voice, *flags, "--text", "<|emotion:elation|>Hello <|style:humming|>."]) == 0
        warned = capsys.readouterr().err
        assert "--text: " in warned and "<|style:humming|>" in warned and "elation" not in warned
        spoken.append(out.read_bytes())
    assert len(spoken[0]) > 1000


def test_reproduce_has_only_the_two_servers_rules(runs, v3_dir, codec_dir, tmp_path, capsys):
    voice = ["--base_ckpt", str(v3_dir), "--adapter", str(runs[2] / "adapter"), "--codec", str(codec_dir)]
    texts = tmp_path / "texts.txt"
    texts.write_text("You are now muted.\n")
    more = ["--train_manifest", str(SPEECH), "--texts", str(texts), "--max_new_tokens", "20", "--output_dir"]
    assert main(["reproduce", *voice, *more, str(tmp_path / "a")]) == 0
    (recital,) = json.loads((tmp_path / "a/recital.json").read_text())
    assert recital["endings"].keys() == {"sglang", "vllm"}
    assert main(["reproduce", *voice, *more, str(tmp_path / "b"), "--stop", "boson"]) == 2
    assert "--stop" in capsys.readouterr().err


def test_judge_speaks_with_the_familys_rules(v3_dir, codec_dir, tmp_path, capsys):
    flags = ["judge", "--base_ckpt", str(v3_dir), "--codec", str(codec_dir), "--manifest", str(SPEECH), "--count", "1"]
    flags += ["--words", "none", "--voice", "none", "--sound", "none", "--max_new_tokens", "20", "--output_dir"]
    assert main([*flags, str(tmp_path / "a"), "--sampler", "greedy", "served"]) == 0
    names = {json.loads(line)["set"] for line in (tmp_path / "a/judged.jsonl").read_text().splitlines()}
    assert {name.rsplit(", ", 1)[0] for name in names if ", " in name} == {"greedy, sglang", "served, sglang"}
    assert main([*flags, str(tmp_path / "b"), "--sampler", "greedy", "--stop", "boson"]) == 2
    assert "--stop: this model has no rule boson" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_heads": "audio"}, "--train_heads"),
        ({"forward_impl": "upstream", "loss_impl": "reference"}, "--forward_impl"),
        ({"compile": "true"}, "--compile"),
        ({"lora_target_modules": "audio_mlp"}, "--lora_target_modules"),
    ],
)
def test_an_unsupported_option_is_one_line_and_code_2(changes, named, v3_dir, flags_of, forks, tmp_path):
    (result,) = forks.run(flags_of(tmp_path / "out", base_ckpt=v3_dir, max_steps=1, **changes), 1)
    assert result.returncode == 2 and named in result.output and "Traceback" not in result.output


def test_another_familys_files_and_flags_are_one_line(
    runs, v3_dir, tiny_dir, tiny_config, codec_dir, flags_of, forks, tmp_path, capsys
):
    v2, v3, out = ["--base_ckpt", str(tiny_dir)], ["--base_ckpt", str(v3_dir)], ["--output_dir", str(tmp_path / "x")]
    of_v3 = ["--adapter", str(runs[2] / "adapter")]
    of_v2 = ["--adapter", str(write_adapter(tmp_path / "v2", tiny_config))]
    speak = ["--text", "x", "--output_file", str(tmp_path / "x.wav")]
    for words, command in (
        ("--adapter", ["merge", *v2, *of_v3, *out, "--layout", "boson", "--other_base"]),
        ("--adapter", ["merge", *v2, *of_v3, *out, "--layout", "boson"]),
        ("--adapter", ["merge", *v3, *of_v2, *out, "--other_base"]),
        ("--adapter", ["generate", *v3, *of_v2, *speak, "--codec", str(codec_dir), "--other_base"]),
        ("--layout", ["merge", *v3, *of_v3, *out, "--layout", "boson"]),
        ("--layout", ["export", *of_v3, *out, "--layout", "transformers"]),
        ("--codec", ["generate", *v3, *speak, "--codec", str(tiny_dir)]),
        ("--codec", ["generate", *v2, *speak, "--codec", str(v3_dir)]),
        ("--codec", ["merge", *v2, *out, "--layout", "transformers", "--codec", str(v3_dir)]),
        ("scene", ["generate", *v3, *speak, "--codec", str(codec_dir), "--scene", "A cave."]),
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said, said
    for flag, value in (("init_adapter", runs[2] / "adapter"), ("resume", runs[2] / "checkpoints/step-000003")):
        (result,) = forks.run(flags_of(tmp_path / flag, max_steps=4, **{flag: value}), 1)
        assert result.returncode == 2 and f"--{flag}" in result.output and "Traceback" not in result.output
