"""Defaults ← YAML ← flags; all problems at once, each naming its flag and the nearest valid name."""

import math
from datetime import datetime

import pytest
import yaml

from higgs_ds.errors import ConfigError, nearest
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
from higgs_ds.options.parse import parse_args
from higgs_ds.options.sections import ALIASES, DEFAULT_BASE_REVISION, DEFAULT_CODEC_REVISION, OPTIONS
from higgs_ds.options.translate import FOREIGN

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
    assert parse_args([*NEEDED, "--local-rank=3"]) == parse_args(NEEDED)  # of torch.distributed.launch
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


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        *(
            ("--save_steps 200", "save_every", 200),
            ("--eval_steps 7", "eval_every", 7),
            ("--val_steps 7", "eval_every", 7),
        ),
        *(("--save_total_limit 2", "keep_last", 2), ("--project_name voices", "wandb_project", "voices")),
        *(("--resume", "resume", "auto"), ("--resume none", "resume", "none"), ("--resume out/x", "resume", "out/x")),
        *(("--resume_from_checkpoint", "resume", "auto"), ("--resume_from_checkpoint True", "resume", "auto")),
        *(("--resume_from_checkpoint false", "resume", "none"), ("--resume_from_checkpoint a/b", "resume", "a/b")),
        ("--gradient_checkpointing", "activation_checkpointing", "full"),
        ("--gradient_checkpointing false", "activation_checkpointing", "none"),
        *(("--report_to none", "wandb_mode", "disabled"), ("--report_to wandb", "wandb_mode", "auto")),
        *(("--bf16", "dtype", "bf16"), ("--bf16 true --fp16 false", "dtype", "bf16"), ("--fp16", "dtype", "fp16")),
        *(
            ("--bf16 false", "dtype", "fp32"),
            ("--bf16 false --fp16 true", "dtype", "fp16"),
            ("--fp16=0", "dtype", "bf16"),
        ),
        *(("--warmup_steps 10", "warmup_steps", 10), ("--warmup_steps 10", "warmup_ratio", None)),
        *(("--seed 9007199254740991", "seed", 2**53 - 1), ("--max_steps 9007199254740991", "max_steps", 2**53 - 1)),
        *(("--max_steps 1e3", "max_steps", 1000), ("--log_every +07", "log_every", 7)),
    ],
)
def test_other_trainers_flags_mean_what_they_mean_there(words, option, value, tmp_path):
    """On the command line, in YAML by the same names, and once more in the resolved file that is given back."""
    config = parse_args([*NEEDED, *words.split()])
    assert config.get(option) == value and type(config.get(option)) is type(value)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    assert parse_args(["--config", str(file)]) == config
    flags = [part.replace("=", " ").split() for part in words.split("--")[1:]]
    file.write_text("".join(f"{flag[0]}: {flag[1] if flag[1:] else 'true'}\n" for flag in flags))
    assert parse_args([*NEEDED, "--config", str(file)]).get(option) == value


def test_dtype_words_of_flags_and_file_together(tmp_path):
    file = tmp_path / "run.yaml"

    def dtype(text, *flags):
        file.write_text(text)
        return parse_args([*NEEDED, "--config", str(file), *flags]).model.dtype

    assert dtype("bf16: true", "--fp16") == "fp16"  # flags win
    assert dtype("fp16: true", "--bf16", "false") == "fp16"
    assert dtype("dtype: fp32", "--fp16", "false") == "fp32"
    assert dtype("dtype: fp32", "--bf16") == "bf16" and dtype("bf16: true", "--dtype", "fp32") == "fp32"


@pytest.mark.parametrize(("given", "every"), [("none", 0), ("full", 1), ("4", 4)])
def test_activation_checkpointing_as_a_number(given, every):
    assert parse_args([*NEEDED, "--activation_checkpointing", given]).model.checkpoint_every == every


def test_what_is_trained_whole(tmp_path):
    audio, both = ("audio_lm_head",), ("text_lm_head", "audio_lm_head")
    for words, whole in {
        "": (),
        "--train_heads": audio,
        "--train_heads both": both,
        "--train_heads text --train_audio_embeddings": ("audio_codebook_embeddings", "text_lm_head"),
    }.items():
        assert parse_args([*NEEDED, *words.split()]).lora.whole_modules == whole
    for value, whole in (("true", audio), ("false", ()), ("both", both)):
        (tmp_path / "run.yaml").write_text(f"train_heads: {value}\n")
        assert parse_args([*NEEDED, "--config", str(tmp_path / "run.yaml")]).lora.whole_modules == whole


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


@pytest.mark.parametrize("text", ["2026_11_27", "2026_01", "0755", "1:30", "1.10", "0123456", "0x1F", "1_000", "+5"])
def test_a_text_in_yaml_is_as_it_is_spelt(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"run_name: {text}\noutput_dir: {text}\ntrain_manifest: {text}\nlora_target_modules: [{text}]\n")
    config = parse_args(["--config", str(file)])
    assert (config.run.run_name, config.run.output_dir, config.data.train_manifest) == (text, text, [text])
    assert config.lora.lora_target_modules == [text] and type(config.run.run_name) is str
    file.write_text(yaml.safe_dump(config.as_dict()))
    assert parse_args(["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("spelt", "lr", "seed"),
    [("1e-4", 1e-4, None), ("2e-5", 2e-5, None), ("1_0", 10.0, 10), ("+3", 3.0, 3), ("2.", 2.0, 2), (".5", 0.5, None)]
    + [
        ("1.0e+1", 10.0, 10),
        ("0", None, 0),
        ("'010'", 10.0, 10),
        ("07", 7.0, 7),
        ("9007199254740991", None, 2**53 - 1),
    ],
)
def test_a_number_in_yaml_in_plain_decimals(spelt, lr, seed, tmp_path):
    for name, value in (("lr", lr), ("seed", seed)):
        (tmp_path / "run.yaml").write_text(f"{name}: {spelt}\n")
        if value is not None:
            config = parse_args([*NEEDED, "--config", str(tmp_path / "run.yaml")])
            assert config.get(name) == value and type(config.get(name)) is type(value)


def test_a_flag_wins_over_what_the_file_says_of_the_same_thing_in_another_way(tmp_path):
    file = tmp_path / "run.yaml"

    def given(text, *flags):
        file.write_text(text)
        optim = parse_args([*NEEDED, "--config", str(file), *flags]).optim
        return optim.warmup_ratio, optim.warmup_steps, optim.batch_size, optim.max_tokens_per_batch

    resolved = yaml.safe_dump(parse_args([*NEEDED, "--batch_size", "2"]).as_dict())
    for text in ("warmup_ratio: 0.1\nbatch_size: 2\n", resolved):
        assert given(text, "--warmup_steps", "10") == (None, 10, 2, None)
        assert given(text, "--max_tokens_per_batch", "4096")[2:] == (None, 4096)
        assert given(text, "--max_tokens_per_batch", "none")[2:] == (2, None)
    in_steps = yaml.safe_dump(parse_args([*NEEDED, *"--warmup_steps 10 --max_tokens_per_batch 9".split()]).as_dict())
    for text in ("warmup_steps: 10\nmax_tokens_per_batch: 9\n", in_steps):
        assert given(text, "--warmup_ratio", "0.2")[:2] == (0.2, None)
        assert given(text, "--per_device_train_batch_size", "4")[2:] == (4, None)
        assert given(text, "--batch_size", "1")[2:] == (1, 9)  # beside tokens it means nothing
        assert given(text)[1::2] == (10, 9)
    file.write_text("warmup_steps: 10\n")
    (line,) = problems_of([*NEEDED, "--config", str(file), *"--warmup_steps 3 --warmup_ratio 0.1".split()])
    assert "both say how long the warm-up is" in line


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
        (
            ["--forward_impl", "upstream", "--loss_impl", "reference", "--torch_compile"],
            ["--compile: upstream's forward is not compiled"],
        ),
        (["--lora_target_modules", "q_proj,audio_lm_head"], ["LoRA on audio_lm_head", "--loss_impl reference"]),
        (["--train_heads", "some"], ["--train_heads: 'some' is not one of none, audio, text, both"]),
        (
            ["--train_heads", "--loss_impl", "reference", "--lora_target_modules", "q_proj", "audio_lm_head"],
            ["--train_heads: audio_lm_head has LoRA already (--lora_target_modules)"],
        ),
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
        (["--report_to", "tensorboard"], ["--report_to: tensorboard is not written here; wandb or none"]),
        (["--report_to", "wandb", "mlflow"], ["--report_to: mlflow is not written here"]),
        (["--report_to", "none", "--wandb_mode", "online"], ["--wandb_mode: given twice, as report_to too"]),
        (["--bf16", "--fp16"], ["bf16 and fp16 are both true"]),
        (["--bf16", "--dtype", "bf16"], ["--dtype: given twice, as bf16 too"]),
        (["--gradient_checkpointing", "unsloth"], ["--gradient_checkpointing: expected true or false, got 'unsloth'"]),
        (["--learning_rate", "1", "--lr", "2"], ["--lr: given twice, as learning_rate too; leave one out"]),
        (["--warmup_steps", "3", "--warmup_ratio", "0.1"], ["--warmup_steps, --warmup_ratio: both say"]),
        (["--warmup_ratio", "none"], ["--warmup_ratio: needs a value, 0 for no warm-up"]),
        (["--lr"], ["--lr/--learning_rate: expected one argument"]),
        (["--seed", "9007199254740993"], ["--seed: 9007199254740993 is above 9007199254740991"]),
        (["--max_steps", "1" * 30], ["--max_steps: 1111", "is above 9007199254740991"]),
        (["--num_workers", "1000"], ["--num_workers: 1000 is above 256"]),
        (["--run_name", "a\nb"], ["--run_name: holds a character that cannot be printed"]),
        (["--run_name", "\udc80"], ["--run_name: holds a character that cannot be printed: '\\udc80'"]),
        (["--output_dir", "a\0b"], ["--output_dir: holds a character that cannot be printed"]),
        (["--codes_cache", "a/" + "x" * 256], ["--codes_cache: is longer than a file's name may be: 'a/xxx"]),
        (["--lr", "9" * 5000], ["--lr: expected a finite number, got '999", "..."]),
        (["--config", "/dev/zero"], ["--config: /dev/zero is not YAML: it is larger than 1,000,000 bytes"]),
        (["--save_step", "3"], ["--save_step: unknown flag (did you mean '--save_steps'?)"]),
        (["--config", "nowhere.yaml"], ["--config: nowhere.yaml cannot be read"]),
        (["stray"], ["'stray': not a flag"]),
    ],
)
def test_wrong_flags(argv, words):
    found = problems_of([*NEEDED, *argv])
    text = "\n".join(found)
    assert len(found) == 1 and "\n" not in text and len(text) < 500
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
        ("lr: " + "9" * 400 + "\n", "lr: expected a finite number, got '999"),
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
        ("lr: !!bool abc\n", "is not YAML: 'abc' does not fit !!bool"),
        ("lr: !!timestamp abc\n", "is not YAML: 'abc' does not fit !!timestamp"),
        ("lr: !!int ''\n", "lr: expected a number, got ''"),
        ("lr: !!float abc\n", "lr: expected a number, got 'abc'"),
        ("lr: !!bool {=: abc}\n", "is not YAML: its value does not fit !!bool"),
        ("lr: !!binary é\n", "is not YAML"),
        ("batch_size: 1:30\n", "batch_size: expected a number in plain decimals, got '1:30'"),
        ("batch_size: 010\n", "batch_size: expected a number in plain decimals, got '010'"),
        ("batch_size: 0x10\n", "batch_size: expected a number in plain decimals, got '0x10'"),
        ("lr: 0b1\n", "lr: expected a number in plain decimals, got '0b1'"),
        ("lr: 1:30.5\n", "lr: expected a number in plain decimals, got '1:30.5'"),
        ("lr: .inf\n", "lr: expected a number, got '.inf'"),
        ("codebook_weights: [1, 010]\n", "codebook_weights: expected a number in plain decimals, got '010'"),
        ("codebook_weights: 1\n", "codebook_weights: expected a list, got '1'"),
        ("config: other.yaml\n", "config: unknown key, a file of options names no other one"),
        ("confg: other.yaml\n", "confg: unknown key"),
        ("lr: 1e-4\nlearning_rate: 1e-4\n", "learning_rate: given twice, as lr too"),
        ("warmup_steps: 3\nwarmup_ratio: 0.1\n", "--warmup_steps, --warmup_ratio: both say"),
    ],
)
def test_whatever_stands_in_the_yaml_is_one_line(text, words, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    (line,) = problems_of(["--train_manifest", "a", "--output_dir", "b", "--config", str(file)])
    assert words in line and "\n" not in line and len(line) < 500, line


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        *(
            ("batchsize", "batch_size"),
            ("bach_size", "batch_size"),
            ("lora_rnk", "lora_rank"),
            ("warm_ratio", "warmup_ratio"),
        ),
        *(("keep_steps", None), ("save_step_count", None), ("lora_q", None), ("max_epochs", None), ("min_steps", None)),
        *(("bp16", None), ("eval_ratio", None), ("train_loss_weight", None), ("log_interval", None), ("", None)),
    ],
)
def test_a_suggestion_is_another_spelling_and_never_another_option(name, suggested):
    said = nearest(name, [*OPTIONS, *ALIASES])
    assert said == (f" (did you mean '{suggested}'?)" if suggested else "")


WRONG = (
    *("", "abc", " ", "none", "-1", "0", "nan", "-inf", "1e400", "1e308", "9" * 5000, "x" * 5000, "a\nb", "\x00"),
    *("\ud800", None, -1, 0, True, math.nan, math.inf, 10**400, [], {}, [[]], [None], {"a": [1]}, [True], [math.nan]),
    datetime(2026, 11, 27),
)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_every_option_takes_any_value_in_yaml_or_as_a_flag_or_says_why_not(value, tmp_path):
    """Nothing but ConfigError comes of it, one short line a fault."""
    names = [*OPTIONS, *FOREIGN]
    given = [parse_args_of_yaml(tmp_path / "run.yaml", {name: value}) for name in names]
    if isinstance(value, str):
        given += [taken_or_refused([*NEEDED, f"--{name}={value}"]) for name in names]
    assert len(given) >= len(names)
    for config, problems in given:
        assert config is not None or (0 < len(problems) <= 3 and all(len(line) < 500 for line in problems)), problems
        assert not any("\n" in line for line in problems)


def parse_args_of_yaml(file, options):
    file.write_text(yaml.dump(options, allow_unicode=False))
    return taken_or_refused([*NEEDED, "--config", str(file)])


def taken_or_refused(argv):
    try:
        return parse_args(argv), []
    except ConfigError as error:
        return None, error.problems
