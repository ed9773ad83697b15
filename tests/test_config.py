"""Defaults ← YAML ← flags; all problems at once, each naming its flag and the nearest valid name."""

import json

import pytest
import yaml

from higgs_ds.config import DEFAULT_BASE_REVISION, DEFAULT_CODEC_REVISION, DEFAULT_LORA_TARGETS
from higgs_ds.distributed.ds_config import LayerSizes, ignored_keys, read_deepspeed_config, resolve
from higgs_ds.errors import ConfigError
from higgs_ds.parse import parse_args
from tests.conftest import ROOT

NEEDED = ["--train_manifest", "train.json", "--output_dir", "out"]


def problems_of(argv) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv)
    return caught.value.problems


def test_the_documented_command_parses():
    config = parse_args(
        "--deepspeed_config ds_configs/zero2.json --train_manifest train.json --output_dir out "
        "--base_ckpt bosonai/higgs-audio-v2-generation-3B-base --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 "
        "--lora_r 16 --lora_alpha 32 --lora_dropout 0.05 --local_rank=3".split()
    )
    assert (config.optim.batch_size, config.optim.lr, config.optim.epochs, config.optim.grad_accum) == (2, 2e-4, 2.0, 8)
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_dropout) == (16, 32.0, 0.05)
    assert config.model.base_revision == DEFAULT_BASE_REVISION and config.data.codec_revision == DEFAULT_CODEC_REVISION


def test_the_defaults_are_the_living_names_at_the_pinned_revisions_and_the_old_name_is_the_same():
    config = parse_args(NEEDED)
    assert config.model.base_ckpt == "bosonai/higgs-tts-2-3b-base"
    assert config.model.base_revision == "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
    assert config.data.codec == "bosonai/higgs-audio-v2-tokenizer"
    assert config.data.codec_revision == "9d4988fbd4ad07b4cac3a5fa462741a41810dbec"
    old = parse_args([*NEEDED, "--base_ckpt", "bosonai/higgs-audio-v2-generation-3B-base"])
    assert old.model.base_revision == config.model.base_revision
    other = parse_args([*NEEDED, "--base_revision", "main", "--codec_revision", "v1"])
    assert (other.model.base_revision, other.data.codec_revision) == ("main", "v1")
    assert parse_args([*NEEDED, "--base_ckpt", "someone/else"]).model.base_revision is None


def test_aliases():
    config = parse_args(
        [*NEEDED, *"--learning_rate 1e-3 --per_device_train_batch_size 3 --gradient_accumulation_steps 5".split()]
        + ["--num_train_epochs", "7"]
    )
    assert (config.optim.lr, config.optim.batch_size, config.optim.grad_accum, config.optim.epochs) == (1e-3, 3, 5, 7.0)


@pytest.mark.parametrize(("given", "every"), [("none", 0), ("full", 1), ("4", 4)])
def test_activation_checkpointing_as_a_number(given, every):
    assert parse_args([*NEEDED, "--activation_checkpointing", given]).model.checkpoint_every == every


def test_lora_targets_by_group_are_written_out_once():
    config = parse_args([*NEEDED, "--lora_target_modules", "attention", "audio_mlp", "self_attn.q_proj"])
    assert config.lora.target_suffixes == [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("audio_mlp.gate_proj", "audio_mlp.up_proj", "audio_mlp.down_proj"),
    ]
    assert config.lora.lora_target_modules == ["attention", "audio_mlp", "self_attn.q_proj"]
    assert parse_args([*NEEDED, "--lora_target_modules", "all"]).lora.target_suffixes == list(DEFAULT_LORA_TARGETS)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 5e-4\nbatch_size: 4\nskip_bad_rows: true\nlora_target_modules: [q_proj, v_proj]\n")
    config = parse_args([*NEEDED, "--config", str(file), "--batch_size", "6", "--codebook_weights", "1", "2", "3"])
    assert config.optim.lr == 5e-4 and config.optim.batch_size == 6 and config.data.skip_bad_rows is True
    assert config.lora.lora_target_modules == ["q_proj", "v_proj"] and config.loss.codebook_weights == [1.0, 2.0, 3.0]


def test_the_resolved_config_can_be_given_back(tmp_path):
    config = parse_args([*NEEDED, "--skip_bad_rows", "--max_steps", "9", "--lora_target_modules", "q_proj,v_proj"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    assert parse_args(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gradient_cliping", "1"], ["--gradient_cliping: unknown flag"]),
        (["--batchsize", "2"], ["--batchsize: unknown flag", "'--batch_size'"]),
        (["--activation_checkpointing", "all"], ["--activation_checkpointing: 'all' is not none, full or a whole"]),
        (["--activation_checkpointing", "0"], ["--activation_checkpointing: '0' is not none"]),
        (["--forward_impl", "upstream"], ["--forward_impl upstream", "--loss_impl reference"]),
        (
            ["--forward_impl", "upstream", "--loss_impl", "reference", "--activation_checkpointing", "full"],
            ["--activation_checkpointing: upstream's forward has none"],
        ),
        (["--lora_target_modules", "q_proj,audio_lm_head"], ["LoRA on audio_lm_head", "--loss_impl reference"]),
        (["--lora_dora"], ["--lora_dora: not supported: DoRA scales each row", "--lora_rslora"]),
        (["--lr", "fast"], ["--lr: expected a number, got 'fast'"]),
        (["--lr", "nan"], ["--lr: expected a finite number"]),
        (["--batch_size", "0"], ["--batch_size: 0 is below 1"]),
        (["--batch_size", "1.5"], ["--batch_size: expected a whole number, got '1.5'"]),
        (["--dtype", "int8"], ["--dtype: 'int8' is not one of bf16, fp16, fp32"]),
        (["--lora_dropout", "1"], ["--lora_dropout: 1.0 must be below 1"]),
        (["--text_loss_weight", "0", "--audio_loss_weight", "0"], ["there is no loss to train on"]),
        (["--codebook_weights", "1,-1"], ["holds a negative weight"]),
        (["--codebook_weights", *["1e308"] * 8], ["--codebook_weights", "sum to more than a float holds"]),
        (["--train_manifest", ""], ["--train_manifest: is empty; give a value, or leave it out"]),
        (["--output_dir", " "], ["--output_dir: is empty"]),
        (["--run_name="], ["--run_name: is empty"]),
        (["--lora_target_modules", ""], ["--lora_target_modules: expected a list"]),
        (["--config", "nowhere.yaml"], ["--config: nowhere.yaml cannot be read"]),
        (["stray"], ["'stray': not a flag"]),
    ],
)
def test_wrong_flags(argv, words):
    text = "\n".join(problems_of([*NEEDED, *argv]))
    assert all(word in text for word in words), text


def test_all_problems_at_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("bach_size: 2\nepochs: -1\nlr: [1]\n")
    found = problems_of(["--config", str(file), "--dtype", "fp8", "--no_such"])
    assert len(found) == 7
    text = "\n".join(found)
    for word in ("bach_size: unknown key (did you mean 'batch_size'?)", "epochs: -1.0 must be above 0",
                 "lr: expected a number", "--dtype: 'fp8'", "--no_such", "--train_manifest: is required",
                 "--output_dir: is required"):  # fmt: skip
        assert word in text, text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1e-4\nlr: 2e-4\n", "lr is given twice"),
        ("run_name: 2026-11-25\n", "run_name: expected text, got datetime.date"),
        ("run_name: 2026-13-45\n", "is not YAML: month must be in 1..12"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "alias *a: write its value out"),
        ("<<: {lr: 1}\n<<: {lr: 2}\n", "<< is given twice"),
        ("run_name: &a\n  [*a]\n", "alias *a"),
        ("lr: " + "9" * 400 + "\n", "lr: expected a number of usual size"),
        ("lr: " + "[" * 5000, "is nested too deeply"),
        ("{[1]: 2}: 3\n", "is not YAML"),
        ("? [lr]\n: 1\n", "is not YAML"),
        ("lr: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("run_name: ''\n", "run_name: is empty"),
        ("epochs: true\n", "epochs: expected a number, got True"),
        ("skip_bad_rows: {a: 1}\n", "skip_bad_rows: expected true or false"),
        ("lora_target_modules: [[q_proj]]\n", "lora_target_modules: expected text"),
        ("codebook_weights: {0: 1}\n", "codebook_weights: expected a list"),
        ("- lr\n", "must hold `name: value` lines"),
        ("# " + "x" * 1_000_001, "is larger than 1,000,000 bytes"),
        ("run_name: \x00\n", "is not YAML"),
    ],
)
def test_whatever_stands_in_the_yaml_is_one_line(text, words, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    (line,) = problems_of(["--train_manifest", "a", "--output_dir", "b", "--config", str(file)])
    assert words in line and "\n" not in line and len(line) < 500, line


# --- DeepSpeed's JSON


def resolved(raw=None, *, name="zero2.json", argv=(), world_size=4, on_cpu=True):
    config = parse_args([*NEEDED, "--deepspeed_config", f"ds_configs/{name}", *argv])
    raw = read_deepspeed_config(config.run.deepspeed_config) if raw is None else raw
    return resolve(raw, config, world_size=world_size, on_cpu=on_cpu, layer=LayerSizes(8192, 176_160_768))


def refused(raw, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(raw, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        ("zero0", 0, False),
        ("zero1", 1, False),
        ("zero2", 2, False),
        ("zero3", 3, False),
        ("zero2_offload", 2, True),
        ("zero3_offload", 3, True),
    ],
)
def test_the_shipped_files_resolve_from_flags_alone(name, stage, offload):
    out = resolved(name=f"{name}.json", argv=["--batch_size", "2", "--grad_accum", "8", "--max_grad_norm", "0.5"])
    assert "auto" not in json.dumps(out)
    assert out["zero_optimization"]["stage"] == stage
    assert out["train_batch_size"] == 64 and out["train_micro_batch_size_per_gpu"] == 2
    assert out["gradient_accumulation_steps"] == 8 and out["gradient_clipping"] == 0.5
    assert out["bf16"]["enabled"] and not out["fp16"]["enabled"]
    assert ("offload_optimizer" in out["zero_optimization"]) is offload
    if stage == 3:
        assert out["zero_optimization"]["stage3_param_persistence_threshold"] >= 16 * 8192
        assert out["zero_optimization"]["stage3_prefetch_bucket_size"] == 176_160_768  # the real model's layer
    assert sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json")) == [
        "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_communication_overlaps_under_stage_3_on_gpus_alone(name):
    for on_cpu in (True, False):
        overlaps = resolved(name=f"{name}.json", on_cpu=on_cpu)["zero_optimization"].get("overlap_comm", False)
        assert overlaps is ("zero3" in name and not on_cpu)


def test_deepspeeds_throughput_timer_is_off_unless_the_file_asks_for_it():
    off = {"enabled": False, "synchronized": False}
    assert resolved()["timers"] == {"throughput": off}
    assert resolved({"timers": {"throughput": {"enabled": "auto"}}})["timers"] == {"throughput": off}
    assert resolved({"timers": {"throughput": {"enabled": True}}})["timers"]["throughput"]["enabled"] is True


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"timers": {"thruput": {}}}, ["timers.thruput: unknown key", "'throughput'"]),
        ({"timers": {"throughput": {"enable": True}}}, ["timers.throughput.enable: unknown key", "'enabled'"]),
        ({"timers": {"throughput": {"enabled": "no"}}}, ["timers.throughput.enabled is 'no', expected true or false"]),
        ({"timers": {"throughput": False}}, ["timers.throughput: must be an object, it is False"]),
        ({"timers": []}, ["timers: must be an object"]),
        ({"gradient_cliping": 1.0}, ["gradient_cliping: unknown key", "'gradient_clipping'"]),
        ({"zero_optimization": {"stge": 2}}, ["zero_optimization.stge: unknown key", "'stage'"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4"]),
        ({"gradient_clipping": 2.0}, ["gradient_clipping is 2.0, but --max_grad_norm gives 1.0"]),
        ({"train_batch_size": 7}, ["train_batch_size is 7", "× 4 ranks gives 4"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is True, but --dtype bf16 gives False"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr is 0.001", "--lr", "0.0002"]),
        ({"optimizer": {"type": "Lamb"}}, ["this trainer uses AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["--lr_scheduler"]),
        ({"zero_optimization": {"stage": 2, "sub_group_size": "auto"}}, ["sub_group_size: 'auto' has no meaning here"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param needs stage 3"]),
        ({"bf16": True}, ["bf16: must be an object"]),
    ],
)
def test_contradictions_and_unknown_keys_are_refused_with_both_values(raw, words):
    text = refused(raw)
    assert all(word in text for word in words), text


def test_fp16_is_refused_on_cpu():
    assert "fp16 needs a GPU" in refused({}, argv=["--dtype", "fp16"])
    assert resolved({}, argv=["--dtype", "fp16"], on_cpu=False)["fp16"]["enabled"]


def test_an_optimizer_block_that_agrees_is_taken():
    raw = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "torch_adam": True}}}
    assert "optimizer" not in resolved(raw)


@pytest.mark.parametrize("text", ["{", '{"bf16": {}, "bf16": {}}', "[]"])
def test_a_file_that_is_no_config(text, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="--deepspeed_config"):
        read_deepspeed_config(str(file))


def test_keys_of_everybodys_files_that_change_nothing_are_left_out():
    raw = {
        "train_batch_size": "auto",
        "prescale_gradients": False,
        "wandb": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": True,
            "cpu_offload": False,
            "sub_group_size": 1e9,
        },
    }
    left_out = ignored_keys(raw)
    assert left_out == [
        *("prescale_gradients", "wandb", "zero_optimization.stage3_gather_16bit_weights_on_model_save"),
        "zero_optimization.cpu_offload",
    ]
    out = resolved(raw)
    assert "wandb" not in out and "cpu_offload" not in out["zero_optimization"]
    assert out["zero_optimization"]["sub_group_size"] == 1e9 and raw["wandb"] == {"enabled": False}
    for key, value in (("prescale_gradients", True), ("wandb", {"enabled": True}), ("gradient_predivide_factor", 2.0)):
        assert key in refused(raw | {key: value})
    assert "cpu_offload: unknown key" in refused({"zero_optimization": {"stage": 2, "cpu_offload": True}})
