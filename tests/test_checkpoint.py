"""A run that cannot be lost: saved, verified and resumed, at any stage and world size."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from higgs_ds import checkpoint
from higgs_ds.checkpoint import (
    CheckpointWriter,
    changed_settings,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from higgs_ds.errors import ConfigError
from higgs_ds.files import sha256
from higgs_ds.model.files.adapter_names import PREFIX
from higgs_ds.model.higgs_v2.layouts import transformers_name
from higgs_ds.model.higgs_v2.modules import SAVABLE_MODULES
from higgs_ds.model.init_adapter import OPTIONS
from higgs_ds.options.sections import BASE_NAMES
from higgs_ds.run_dir import prepare_run_dir
from higgs_ds.tools.cli import main
from tests.conftest import ROOT
from tests.distributed.test_engine import distance
from tests.support.ranks import assert_all, changed, free_port


def losses(folder) -> list[dict]:
    """Every logged loss by step, as written."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kinds = ("train/loss", "train/text_loss", "train/audio_loss", "train/codebook_loss", "train/grad_norm", "rank/")
    return [{k: v for k, v in row.items() if k == "global_step" or k.startswith(kinds)} for row in rows]


def resumed_to_the_bit(forks, flags_of, folder, stage, **more) -> dict[str, torch.Tensor]:
    """Weights of a run that was interrupted and resumed, which are those of one that never was."""
    common = {"deepspeed_config": f"ds_configs/zero{stage}.json", "dtype": "bf16", "max_steps": 12, "grad_accum": 2}
    common |= {"num_workers": 1, "train_audio_embeddings": True, **more}
    # On a CPU --deterministic changes no number.
    assert_all(forks.run(flags_of(folder / "whole", deterministic=True, **common), 2))

    first = flags_of(folder / "parts", **common)
    results = forks.run(first, 2, patches={1: ["signal_at_step", 5]})
    assert_all(results, returncode=75)
    assert [path.name for path in list_checkpoints(folder / "parts/checkpoints")] == ["step-000005"]
    assert "--resume auto goes on from there" in results[0].output

    results = forks.run([*first, "--resume", "auto"], 2)
    assert_all(results)
    assert "resuming after step 5" in results[0].output
    assert f"engine: ZeRO-{stage}, bf16 on cpu; " in results[0].output
    assert losses(folder / "parts") == losses(folder / "whole")
    ours, wanted = (load_file(folder / run / "adapter/adapter_model.safetensors") for run in ("parts", "whole"))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted)
    return ours


@pytest.mark.parametrize("stage", [2, 3])
def test_interrupted_and_resumed_is_never_interrupted_bit_for_bit(stage, forks, flags_of, tmp_path, tiny_dir):
    """bf16, dropout on, all trained that can be: SIGTERM to one of two ranks midway, exit 75, `--resume auto`."""
    ours = resumed_to_the_bit(forks, flags_of, tmp_path, stage, train_heads="both")
    adapter, base = tmp_path / "parts/adapter", HiggsAudioModel.from_pretrained(tiny_dir, torch_dtype=torch.bfloat16)
    whole = {f"{name}.weight": ours[f"{PREFIX}{name}.weight"] for name in SAVABLE_MODULES}
    assert not any(torch.equal(value, base.state_dict()[name]) for name, value in whole.items())
    assert "| trained whole | audio_codebook_embeddings, text_lm_head, " in (adapter / "README.md").read_text()
    pefts = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    flags = ["--base_ckpt", str(tiny_dir), "--adapter", str(adapter), "--layout", "transformers"]
    assert main(["merge", *flags, "--output_dir", str(tmp_path / "merged")]) == 0
    assert "| trained whole | audio_codebook_embeddings, " in (tmp_path / "merged/README.md").read_text()
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, value in whole.items():
        assert torch.equal(merged[transformers_name(name)], value) and torch.equal(pefts[name], value)


def test_other_stages_and_world_sizes_go_on_with_the_same_run(forks, flags_of, tmp_path):
    """2 ranks ZeRO-2 → 4 ranks ZeRO-3 → 1 rank ZeRO-0 → both offloads, against 1 rank that was never interrupted."""
    common = {"dtype": "fp32", "lora_dropout": 0, "lr_scheduler": "constant", "warmup_ratio": 0, "save_every": 2}
    common |= {"train_audio_embeddings": True, "train_heads": "both"}

    def run(folder, ranks, stage, steps, **changes):
        flags = flags_of(folder, deepspeed_config=f"ds_configs/zero{stage}.json", max_steps=steps, **common, **changes)
        results = forks.run(flags, ranks, timeout=180)
        assert_all(results)
        return results[0].output

    assert "one rank: ZeRO-2 has nobody to share with" in run(tmp_path / "whole", 1, 2, 10, grad_accum=4)
    run(tmp_path / "parts", 2, 2, 2, grad_accum=2)
    output = run(tmp_path / "parts", 4, 3, 4, grad_accum=2, resume="auto")
    assert "= 8 rows" in output and "--max_steps is 4, the checkpoint has 2" in output
    run(tmp_path / "parts", 1, 0, 6, grad_accum=1, resume="auto")
    run(tmp_path / "parts", 2, "3_offload", 8, grad_accum=2, resume="auto")
    run(tmp_path / "parts", 2, "2_offload", 10, grad_accum=2, resume="auto")
    for step in (6, 8, 10):
        ours = read_checkpoint(tmp_path / f"parts/checkpoints/step-{step:06d}").state
        wanted = read_checkpoint(tmp_path / f"whole/checkpoints/step-{step:06d}").state
        assert distance(ours.weights, wanted.weights) < 1e-5
        assert distance(ours.exp_avg, wanted.exp_avg) < 1e-4 and ours.adam_steps == wanted.adam_steps == step


@pytest.fixture(scope="module")
def saved(forks, flags_of, tmp_path_factory):
    """A run of one rank with a checkpoint every step, three of them kept."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    flags = flags_of(folder, max_steps=5, save_every=1, keep_last=3, dtype="fp32")
    assert_all(forks.run(flags, 1))
    return folder, flags


def test_rotation_and_what_a_checkpoint_holds(saved, tiny_dir):
    folder, _ = saved
    kept = list_checkpoints(folder / "checkpoints")
    assert [path.name for path in kept] == ["step-000003", "step-000004", "step-000005"]
    assert not list((folder / "checkpoints").glob(".*"))
    newest = read_checkpoint(kept[-1])
    assert newest.progress.step == 5 and newest.state.adam_steps == 5 and newest.progress.rows_per_step == 2
    size = sum(path.stat().st_size for path in kept[-1].rglob("*") if path.is_file())
    parameters = sum(value.numel() for value in newest.state.weights.values())
    assert size <= 16 * parameters + 1_000_000
    model = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(tiny_dir), kept[-1] / "adapter")
    final = load_file(folder / "adapter/adapter_model.safetensors")
    loaded = {name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora_" in name}
    assert all(torch.equal(loaded[key], final[key]) for key in final)


FILES = [
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/higgs_ds.json",
    "optimizer.safetensors",
    "rng.safetensors",
    "state.json",
    "checksums.json",
]


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_any_file_is_detected(name, saved, tmp_path):
    """A bit flipped, the end cut off, the file gone."""
    shutil.copytree(saved[0] / "checkpoints", tmp_path / "checkpoints")
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    held = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file() and p.name != "README.md")
    assert held == sorted(FILES)
    file = newest / name
    content = file.read_bytes()
    flipped = range(len(content)) if name == "checksums.json" else [0, len(content) // 2, len(content) - 1]
    damaged = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in flipped]
    for damage in [*damaged, content[:-1], None]:
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(ConfigError, match=f"--resume: .*{name}"):
            find_checkpoint(str(newest), tmp_path)
    found, said = find_checkpoint("auto", tmp_path)
    assert found.progress.step == 4 and len(said) == 1 and "step-000005" in said[0]


def test_what_another_rank_has_proven_is_not_read_for_proof_and_a_copy_is(saved, tmp_path, monkeypatch):
    newest, copy = list_checkpoints(saved[0] / "checkpoints")[-1], tmp_path / "step-000005"
    proven = read_checkpoint(newest)
    shutil.copytree(newest, copy)  # with its times
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256", lambda path: hashed.append(path) or sha256(path))
    again = read_checkpoint(newest, proven.stamps)
    assert not hashed and again.seal == proven.seal
    assert all(torch.equal(value, proven.adapter[key]) for key, value in again.adapter.items())
    read_checkpoint(copy, proven.stamps)
    assert len(hashed) == len(proven.stamps) >= len(FILES) - 1
    (newest / "state.json").touch()
    read_checkpoint(newest, proven.stamps)
    assert hashed[len(proven.stamps) :] == [newest / "state.json"]


@pytest.mark.parametrize("kind", ["file", "link", "link to nowhere", "folder"])
def test_what_stands_where_a_checkpoint_goes_is_kept(kind, saved, tmp_path):
    ours = read_checkpoint(saved[0] / "checkpoints/step-000005")
    lora = LoraConfig.from_pretrained(str(ours.folder / "adapter"))
    writer = CheckpointWriter(tmp_path, keep_last=3, keep_best=False, lora=lora)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("work")
    for name in ("step-000005", *([".step-000005.tmp"] if kind != "folder" else [])):
        if kind == "file":
            (tmp_path / name).write_text("work")
        elif kind == "folder":
            shutil.copytree(mine, tmp_path / name)
        else:
            (tmp_path / name).symlink_to(mine if kind == "link" else "nowhere")
    (tmp_path / "left-step-000005").write_text("of a run before")
    writer.clean(5)
    writer._write(ours.progress, ours.state, [{"cpu": torch.get_rng_state()}])
    assert list_checkpoints(tmp_path) == [tmp_path / "step-000005"] and read_checkpoint(tmp_path / "step-000005")
    left = tmp_path / "left-step-000005-1"
    assert left.is_symlink() == kind.startswith("link") and os.path.lexists(left)
    assert (mine / "notes").read_text() == "work" and sorted(path.name for path in mine.iterdir()) == ["notes"]
    if kind == "folder":
        assert (left / "notes").read_text() == "work"
    writer._write(ours.progress, ours.state, [{"cpu": torch.get_rng_state()}])  # saved again: replaced
    assert read_checkpoint(tmp_path / "step-000005") and not list(tmp_path.glob("left-*-2"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_where_no_checkpoint_can_stand_is_refused_at_the_door(linked, tmp_path):
    place = tmp_path / "checkpoints"
    place.symlink_to("nowhere") if linked else place.write_text("a file")
    with pytest.raises(ConfigError, match=r"--output_dir: .*checkpoints is no folder"):
        prepare_run_dir(tmp_path)
    place.unlink()
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to("elsewhere")
    prepare_run_dir(tmp_path)


def test_only_step_and_digits_is_a_checkpoint_and_what_a_user_keeps_stays(saved, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(saved[0] / "checkpoints", checkpoints)
    shutil.copytree(checkpoints / "step-000003", checkpoints / "step-best")
    (checkpoints / "step-000009").symlink_to(checkpoints / "step-best")
    (checkpoints / "step-10").write_text("a file")
    shutil.copytree(checkpoints / "step-000003", checkpoints / "step-1000000")
    names = [path.name for path in list_checkpoints(checkpoints)]
    assert names == ["step-000003", "step-000004", "step-000005", "step-1000000"]
    found, said = find_checkpoint("auto", tmp_path)
    assert found.progress.step == 5 and "step-1000000: renamed" in said[0] and len(said) == 1
    kept, said = find_checkpoint(str(checkpoints / "step-best"), tmp_path)  # by its own name it can be resumed from
    assert kept.progress.step == 3 and not said


def test_what_cannot_go_on_is_refused_and_what_changes_is_said(forks, saved, tmp_path):
    folder, flags = saved
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)

    def resume(*changes):
        words = [str(copy) if word == str(folder) else word for word in flags]
        (result,) = forks.run(changed(words, "--resume", "auto", *changes), 1)
        return result

    other = resume("--lora_r", "4", "--batch_size", "3")
    assert other.returncode == 2 and "--lora_r is 4, the checkpoint has 8; it cannot change" in other.output
    assert "global batch of 2 rows is no multiple" in other.output
    wide = resume("--lora_r", "65")
    assert wide.returncode == 2 and "--lora_r: 65 is above 64, the width of the model's layers" in wide.output
    # Five steps are done, of a run of five: the end of its cosine.
    kept = resume("--max_steps", "6", "--lr_schedule_steps", "5", "--seed", "7")
    assert kept.returncode == 0 and "the learning rate goes" not in kept.output
    assert "--seed is 7, the checkpoint has 42" in kept.output
    longer = resume("--max_steps", "8")
    assert longer.returncode == 0 and "--lr_schedule_steps 5 keeps the old one (0.0015)" in longer.output


def test_check_of_a_resumed_run_looks_at_its_next_batch(forks, saved):
    folder, flags = saved
    before = sorted(folder.rglob("*"))
    (result,) = forks.run(["check", *flags, "--resume", "auto"], 1)
    assert result.returncode == 0, result.output
    assert "resuming after step 5" in result.output and result.output.count("ok   [rank 0]") == 12
    assert sorted(folder.rglob("*")) == before


def test_a_new_run_can_start_from_an_adapter(forks, saved, flags_of, tmp_path):
    folder, _ = saved
    flags = flags_of(tmp_path / "run", max_steps=1, dtype="fp32", init_adapter=folder / "adapter", lr=1e-9)
    assert_all(forks.run(flags, 1))
    ours, wanted = (load_file(run / "adapter/adapter_model.safetensors") for run in (tmp_path / "run", folder))
    assert distance(ours, wanted) < 1e-4
    (refused,) = forks.run(flags_of(tmp_path / "x", init_adapter=folder), 1)
    assert refused.returncode == 2 and "--init_adapter" in refused.output
    shutil.copytree(folder / "adapter", tmp_path / "broken")
    next(iter(wanted.values()))[0, 0] = float("nan")
    save_file(wanted, tmp_path / "broken/adapter_model.safetensors")
    (refused,) = forks.run(flags_of(tmp_path / "x", init_adapter=tmp_path / "broken"), 1)
    assert refused.returncode == 2 and "holds NaN or infinity" in refused.output and "Traceback" not in refused.output


def test_a_base_by_its_old_name_is_no_other_setting(saved):
    resumed = read_checkpoint(list_checkpoints(saved[0] / "checkpoints")[-1])
    now = resumed.progress.config | {"base_ckpt": BASE_NAMES[0]}
    resumed.progress.config["base_ckpt"] = BASE_NAMES[1]
    assert changed_settings(resumed, now, resumed.progress.num_rows) == []
    (said,) = changed_settings(resumed, now | {"base_ckpt": "someone/else"}, resumed.progress.num_rows)
    assert "--base_ckpt is someone/else, the checkpoint has bosonai/higgs-audio-v2-generation-3B-base" in said


def test_an_adapter_says_what_the_runs_lora_is_and_the_run_goes_on_with_it(forks, flags_of, tmp_path):
    """Trained with rslora and a large alpha; started from with the same command, resumed, and given back as YAML."""

    def run(folder, *more, **changes):
        fixed = {"dtype": "fp32", "lora_dropout": 0, "max_steps": 1, "lora_r": None}
        (result,) = forks.run([*flags_of(tmp_path / folder, **fixed | changes), *more], 1)
        return result

    targets = ["--lora_target_modules", "q_proj", "layers.1.mlp.up_proj"]
    whole = ["--train_heads", "--train_audio_embeddings"]
    assert_all([run("first", "--lora_r", "4", "--lora_rslora", *whole, *targets, lora_alpha=300)])
    adapter = tmp_path / "first/adapter"
    written = json.loads((adapter / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 300, True)
    assert written["modules_to_save"] == ["audio_codebook_embeddings", "audio_lm_head"]
    assert "4 / 300 / 0, scaled by the root" in (adapter / "README.md").read_text()

    assert_all([run("second", init_adapter=adapter, save_every=1, lr=1e-9)])
    resolved = yaml.safe_load((tmp_path / "second/config.yaml").read_text())
    assert [resolved[name] for name in OPTIONS] == [4, 300.0, True, ["layers.1.mlp.up_proj", "q_proj"], True, "audio"]
    again = json.loads((tmp_path / "second/adapter/adapter_config.json").read_text())
    assert all(again[key] == written[key] for key in ("r", "lora_alpha", "use_rslora", "modules_to_save"))
    ours, wanted = (load_file(tmp_path / one / "adapter/adapter_model.safetensors") for one in ("second", "first"))
    assert distance(ours, wanted) < 1e-4

    resumed = run("second", "--resume", "auto", init_adapter=adapter, max_steps=2, lr=1e-9)
    assert_all([resumed])
    assert "resuming after step 1" in resumed.output
    assert "--lora_" not in resumed.output and "--train_" not in resumed.output
    yaml_file = ["--config", str(tmp_path / "second/config.yaml")]
    assert_all([run("third", *yaml_file, lr=1e-9)])

    other = run("x", "--lora_r", "8", "--lora_rslora", "false", "--lora_target_modules", "all", *["--lora_alpha", "16"],
                "--train_heads", "both", init_adapter=adapter)  # fmt: skip
    assert other.returncode == 2 and not (tmp_path / "x/config.yaml").exists()
    for words in ("--lora_r is 8, the adapter has 4", "--lora_alpha is 16, the adapter has 300"):
        assert f"--init_adapter: {words}; leave the flag out" in other.output
    assert "--lora_rslora is False, the adapter has True" in other.output
    assert "--train_heads is both, the adapter has audio" in other.output
    assert "--lora_target_modules is all, the adapter has layers.1.mlp.up_proj q_proj" in other.output


def test_a_second_signal_ends_at_once_unless_a_launcher_passed_on_the_first(flags_of, tmp_path):
    """Real signals to a real process: twice within a second is one request, seconds later it does not wait."""
    code = (
        "import os, signal, time\n"
        "from higgs_ds.distributed.stop import SECOND_SIGNAL_SEC, StopRequest\n"
        "stop = StopRequest()\n"
        "stop.joined()\n"
        "stop.training()\n"
        "for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    os.kill(os.getpid(), number)\n"
        "    time.sleep(0.1)\n"
        "    assert stop.reason == 'SIGUSR1'\n"
        "time.sleep(SECOND_SIGNAL_SEC)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(10)\n"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PORT": str(free_port())})
    assert result.returncode == 128 + signal.SIGTERM and time.monotonic() - started < 13
