"""The commands of the README, run as a user runs them: real launcher, real ranks, real audio, upstream's generate."""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel
from PIL import Image

from higgs_ds.checkpoint import read_checkpoint
from higgs_ds.tools import cli
from higgs_ds.tools.reproduce import Reproduction
from tests.conftest import ROOT, SPEECH
from tests.support.ranks import assert_all, changed

SHORT = {"dtype": "fp32", "max_steps": 3}


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def recitals_of(folder) -> list[Reproduction]:
    return [Reproduction(**row) for row in json.loads((folder / "speech/recital.json").read_text())]


def assert_given_back(recitals: list[Reproduction], count: int) -> None:
    """Under each of the three stop rules every clip's codes come back, and end where the clip ends."""
    assert len(recitals) == count
    for rule in ("boson", "transformers", "vllm"):
        endings = [(r, r.endings[rule]) for r in recitals]
        assert min(ending["share"] for _, ending in endings) >= 0.99, rule
        assert all(r.frames == ending["frames"] and ending["ended"] for r, ending in endings), rule


def test_it_speaks(quickstart):
    folder, output = quickstart
    recitals = recitals_of(folder)
    assert_given_back(recitals, 32)
    assert len(re.findall(r"^stop as \w+: .* 32 of 32 lengths right$", output, flags=re.M)) == 3
    for recital in recitals:
        waveform, rate = soundfile.read(folder / "speech" / recital.file)
        original, original_rate = soundfile.read(folder / "speech" / recital.file.replace("spoken", "original"))
        assert rate == 24000 and abs(len(waveform) / rate - len(original) / original_rate) < 0.05
        assert np.abs(waveform).max() > 0.01


def test_what_a_run_leaves(quickstart):
    folder, output = quickstart
    assert yaml.safe_load((folder / "config.yaml").read_text())["lora_r"] == 64
    assert json.loads((folder / "ds_config.json").read_text())["train_batch_size"] == 8
    trained_on = json.loads((folder / "trained_on.json").read_text())
    assert (trained_on["rows"], trained_on["python"]) == (32, platform.python_version())
    assert trained_on.keys() > {"torch", "deepspeed", "transformers", "peft", "higgs_ds", "devices"}
    with Image.open(folder / "loss.png") as image:
        assert image.size[0] >= 1200
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (folder / "adapter" / name).stat().st_size > 0
    for word in ("wandb sync", "wandb beta leet", "ETA", "100.00 %", "listen:", "keys received", "ok   [rank 1]"):
        assert word in output, word

    rows = metrics_of(folder)
    names = set().union(*rows)
    wanted = {"global_step", "train/loss", "train/text_loss", "train/audio_loss", "train/learning_rate"}
    wanted |= {"train/grad_norm", "train/epoch", "train/text_tokens", "train/audio_frames"}
    wanted |= {f"train/codebook_loss/{k}" for k in range(8)}
    wanted |= {f"rank/{name}" for name in ("loss", "text_loss", "audio_loss")}
    wanted |= {"eval/loss", "eval/text_loss", "eval/audio_loss", "perf/tokens_per_sec", "perf/step_sec"}
    wanted |= {"perf/data_sec", "memory/peak_gib", "guard/failed_checks", "guard/honest_zeros"}
    assert wanted <= names, wanted - names
    assert not [name for name in names if name.startswith("guard/") and name not in wanted]  # no check ever failed
    train = [row for row in rows if "train/loss" in row]
    assert [row["global_step"] for row in train] == list(range(1, 241))
    assert all(math.isfinite(row["train/loss"]) and row["train/loss"] > 0 for row in train)
    assert train[0]["train/loss"] > 10 and train[-1]["train/loss"] < 0.1
    assert train[-1]["train/epoch"] == 60
    assert sum(row["memory/peak_gib"] for row in train[-1:]) < 3  # a rank; two of them and the launcher under 6 GB


def test_every_epoch_has_as_many_labelled_codes(quickstart):
    """Upstream's collator masks a cached sample's own labels: its second epoch would have none."""
    folder, *_ = quickstart
    train = [row for row in metrics_of(folder) if "train/loss" in row]
    frames = [sum(row["train/audio_frames"] for row in train[i : i + 4]) for i in range(0, 240, 4)]
    tokens = [sum(row["train/text_tokens"] for row in train[i : i + 4]) for i in range(0, 240, 4)]
    assert frames[0] > 1000 and set(frames) == {frames[0]} and set(tokens) == {3 * 32}


def test_plain_peft_loads_the_adapter_whole(quickstart):
    folder, *_ = quickstart
    base = HiggsAudioModel.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapter")
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * 4 * (4 + 3 + 3)
    assert all(p.numel() > 0 and torch.isfinite(p).all() for p in loaded.values())
    assert all(p.any() for name, p in loaded.items() if "lora_B" in name)
    assert str(folder / "base") in (folder / "adapter/adapter_config.json").read_text()


def test_generate_speaks_a_sentence(quickstart, tmp_path):
    folder, out = quickstart[0], tmp_path / "out.wav"
    row = json.loads(SPEECH.read_text().splitlines()[0])
    flags = ["--base_ckpt", folder / "base", "--adapter", folder / "adapter", "--codec", folder / "codec"]
    assert cli.main(["generate", *map(str, flags), "--text", row["text"], "--output_file", str(out)]) == 0
    waveform, rate = soundfile.read(out)
    assert abs(len(waveform) / rate - row["duration"]) < 0.05


def test_under_zero3_it_speaks_too(quickstart, forks, flags_of, tmp_path):
    """Eight clips; with unshifted labels none is spoken: see tests/judges/test_broken_voices.py."""
    base, codec, eight = quickstart[0] / "base", quickstart[0] / "codec", tmp_path / "eight.jsonl"
    rows = [json.loads(line) for line in SPEECH.read_text().splitlines()[:8]]
    eight.write_text("".join(json.dumps(row | {"audio": str(SPEECH.parent / row["audio"])}) + "\n" for row in rows))
    fixed = {"max_steps": 60, "eval_every": 1000, "train_manifest": eight, "base_ckpt": base, "codec": codec}
    fixed |= dict.fromkeys(("lora_r", "lr", "epochs"))  # as in the YAML file
    flags = flags_of(tmp_path / "zero3", **fixed, batch_size=4, deepspeed_config="ds_configs/zero3.json")
    assert_all(forks.run(["--config", "examples/quickstart.yaml", *flags], 2, timeout=400))
    flags = ["--base_ckpt", base, "--codec", codec, "--adapter", tmp_path / "zero3/adapter", "--train_manifest", eight]
    flags += ["--output_dir", tmp_path / "zero3/speech", "--at_least", "0.99"]
    assert cli.main(["reproduce", *map(str, flags)]) == 0
    assert_given_back(recitals_of(tmp_path / "zero3"), 8)


def test_a_batch_that_fails_before_the_forward_ends_every_rank_with_code_3(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", **SHORT, deepspeed_config="ds_configs/zero3.json")
    results = forks.run(flags, 2, patches={1: ["code_out_of_range"]})
    assert_all(results, returncode=3)
    assert max(r.ended_after_sec for r in results) - min(r.ended_after_sec for r in results) < 30
    assert "loss check failed: code_range (rank 1, optimizer step 1" in results[0].output
    assert "FAIL [rank 1] code_range: codes from" in results[1].output


def test_a_loss_that_is_not_real_ends_every_rank_with_code_3(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", **SHORT)
    results = forks.run(flags, 2, patches={1: ["lost_audio_from", 3]})
    assert_all(results, returncode=3)
    assert max(r.ended_after_sec for r in results) - min(r.ended_after_sec for r in results) < 30
    text = results[0].output
    for word in ("loss check failed: audio_logits (rank 1, optimizer step 3, micro-batch 0)", "manifest.jsonl:",
                 "(0, 8, 1026)", "likely:"):  # fmt: skip
        assert word in text + results[1].output, text[-3000:]
    assert list((tmp_path / "run/bad_batches").glob("step-000003-rank-1-*.safetensors"))
    assert (tmp_path / "run/adapter_before_failure/adapter_model.safetensors").exists()
    assert not (tmp_path / "run/adapter").exists()
    (failure,) = map(json.loads, (tmp_path / "run/guard_failures.jsonl").read_text().splitlines())
    assert failure["check"] == "audio_logits" and failure["rank"] == 1
    # What was trained before is complete, and the run resumes once the cause is fixed.
    assert read_checkpoint(tmp_path / "run/checkpoints/step-000002").progress.step == 2
    assert_all(forks.run([*flags, "--resume", "auto"], 2))
    assert [row["global_step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3]


def test_skip_goes_on_and_counts(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", **SHORT, on_bad_loss="skip", wandb_mode="offline")
    results = forks.run(flags, 2, patches={0: ["code_out_of_range"]})
    assert_all(results)
    rows = metrics_of(tmp_path / "run")
    assert [row["train/dropped_steps"] for row in rows] == [1, 2, 3]
    assert [row["guard/code_range"] for row in rows] == [[1, 0], [2, 0], [3, 0]]
    assert [row["guard/failed_checks"] for row in rows] == [1, 2, 3]
    kept = read_checkpoint(tmp_path / "run/checkpoints/step-000003")
    assert kept.progress.dropped_steps == 3 and kept.state.adam_steps == 0
    assert not any(moment.any() for moment in kept.state.exp_avg.values())
    # Zeros are what Adam begins with: a run goes on from there.
    assert_all(forks.run(changed(flags, "--resume", "auto", "--max_steps", "4"), 2))
    assert metrics_of(tmp_path / "run")[-1]["global_step"] == 4


def test_missing_expanded_labels_are_counted_in_the_metrics(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", **SHORT | {"max_steps": 2}, grad_accum=2)
    flags += ["--forward_impl", "upstream", "--loss_impl", "reference"]
    (result,) = forks.run(flags, 1, patches={0: ["no_expanded_labels"]})
    assert_all([result])
    assert [row["train/re_expanded_labels"] for row in metrics_of(tmp_path / "run")] == [2, 2]
    assert result.output.count("re-expanding them from the batch") == 1 and "path: re-expanded" in result.output


def test_check_prints_the_checklist_and_leaves_no_run(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", **SHORT)
    (result,) = forks.run(["check", *flags], 1)
    assert result.returncode == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith(("ok  ", "FAIL"))]
    assert len(lines) == 12 and all(line.startswith("ok   [rank 0]") for line in lines)
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/adapter").exists()
    text = json.loads(SPEECH.read_text().splitlines()[0])["text"]
    system = "<|start_header_id|>system<|end_header_id|>\n\nGenerate audio following instruction.<|eot_id|>"
    user = f"<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
    spoken = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    assert f"manifest.jsonl:1):\n<|begin_of_text|>{system}{user}{spoken}\n" in result.output

    (broken,) = forks.run(["check", *flags], 1, patches={0: ["lost_audio"]})
    assert broken.returncode == 1
    assert "FAIL [rank 0] audio logits: (0, 8, 1026)" in broken.output


def test_bad_rows_are_listed_together_and_nothing_is_trained(forks, flags_of, tmp_path):
    tone = np.sin(np.arange(16000) / 20) * 0.1
    soundfile.write(tmp_path / "good.wav", tone, 16000)
    soundfile.write(tmp_path / "empty.wav", tone[:0], 16000)
    soundfile.write(tmp_path / "long.wav", np.tile(tone, 4), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "noise.wav").write_bytes(b"RIFF this is no audio at all")
    rows = [
        {"audio": "good.wav", "text": "one"},
        {"audio": "missing.wav", "text": "two"},
        {"audio": "empty.wav", "text": "three"},
        {"audio": "nan.wav", "text": "four"},
        {"audio": "noise.wav", "text": "five"},
        {"audio": "long.wav", "text": "six"},
        {"audio": "https://example.com/a.wav", "text": "seven"},
        {"text": "eight"},
        {"messages": [{"role": "user", "content": "nine"}]},
    ]
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    flags = flags_of(tmp_path / "run", **SHORT, train_manifest=manifest, max_duration_sec=3)
    results = forks.run(flags, 2)
    assert_all(results, returncode=2)
    lines = [line for line in results[0].output.splitlines() if line.startswith(str(manifest))]
    expected = [
        (2, "audio", "missing.wav"),
        (3, "audio", "empty"),
        (4, "audio", "NaN"),
        (5, "audio", "decoded"),
        (6, "audio", "over --max_duration_sec 3"),
        (7, "audio", "URLs are not fetched"),
        (8, "audio", "missing"),
        (9, "messages", "assistant"),
        (10, "", ""),
    ]
    assert len(lines) == len(expected), lines
    for line, (number, field, words) in zip(lines, expected, strict=True):
        assert line.startswith(f"{manifest}:{number}: {field}"), line
        assert words in line, line
    assert "9 bad rows; nothing was trained" in results[0].output
    assert not (tmp_path / "run/metrics.jsonl").exists()

    results = forks.run([*flags, "--skip_bad_rows"], 2)
    assert_all(results)
    assert "training without 9 bad rows" in results[0].output
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()

    # The same folder again: an earlier run is never overwritten.
    (again,) = forks.run([*flags, "--skip_bad_rows"], 1)
    assert again.returncode == 2 and "holds a run already" in again.output


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--train_manifst", "x"],
            ["--train_manifst: unknown flag", "'--train_manifest'", "--output_dir: is required"],
        ),
        (["--train_manifest", "x", "--output_dir", "y", "--deepspeed_config", "no.json"], ["no.json: No such file"]),
    ],
)
def test_wrong_flags_end_with_code_2_before_torch_is_imported(argv, words):
    command = [sys.executable, "-X", "importtime", "train_ds.py", *argv]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 2
    assert not re.search(r"\| +torch$", result.stdout, flags=re.M) and "pydantic" in result.stdout
    assert all(word in result.stdout for word in words), result.stdout
    assert "Traceback" not in result.stdout
