"""Defaults ← YAML ← flags; all problems at once, each naming its flag and the nearest valid name."""

import pytest
import yaml
from pydantic import ValidationError

from higgs_ds.errors import ConfigError, nearest
from higgs_ds.model.higgs_v2.modules import MODULES
from higgs_ds.options.parse import parse_args
from higgs_ds.options.sections import ALIASES, OPTIONS, SHAPE_OPTIONS, TRAJECTORY_OPTIONS

NEEDED = ["--train_manifest", "train.json", "--output_dir", "out"]


def problems_of(argv) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_args(argv)
    return caught.value.problems


@pytest.fixture
def parsed(tmp_path):
    """The options of a YAML text and flags."""

    def parse(text, *flags):
        (tmp_path / "run.yaml").write_text(text)
        return parse_args([*NEEDED, "--config", str(tmp_path / "run.yaml"), *flags])

    return parse


def test_the_documented_command_parses():
    config = parse_args(
        "--deepspeed_config ds_configs/zero2.json --train_manifest train.json --output_dir out "
        "--base_ckpt bosonai/higgs-audio-v2-generation-3B-base --batch_size 2 --lr 2e-4 --epochs 2 --grad_accum 8 "
        "--lora_r 16 --lora_alpha 32 --lora_dropout 0.05 --local_rank=3".split()
    )
    assert parse_args([*NEEDED, "--local-rank=3"]) == parse_args(NEEDED)  # of torch.distributed.launch
    assert (config.optim.batch_size, config.optim.lr, config.optim.epochs, config.optim.grad_accum) == (2, 2e-4, 2.0, 8)
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_dropout) == (16, 32.0, 0.05)


def test_the_defaults_are_the_living_names_at_the_pinned_revisions_and_the_old_name_is_the_same():
    config, revision = parse_args(NEEDED), "10840182ca4ad5d9d9113b60b9bb3c1ef1ba3f84"
    assert (config.model.base_ckpt, config.model.base_revision) == ("bosonai/higgs-tts-2-3b-base", revision)
    codec = ("bosonai/higgs-audio-v2-tokenizer", "9d4988fbd4ad07b4cac3a5fa462741a41810dbec")
    assert (config.data.codec, config.data.codec_revision) == codec
    old = parse_args([*NEEDED, "--base_ckpt", "bosonai/higgs-audio-v2-generation-3B-base"])
    assert old.model.base_revision == config.model.base_revision
    other = parse_args([*NEEDED, "--base_revision", "main", "--codec_revision", "v1"])
    assert (other.model.base_revision, other.data.codec_revision) == ("main", "v1")
    assert parse_args([*NEEDED, "--base_ckpt", "someone/else"]).model.base_revision is None


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        *(("--learning_rate 1e-3", "lr", 1e-3), ("--per_device_train_batch_size 3", "batch_size", 3)),
        *(("--gradient_accumulation_steps 5", "grad_accum", 5), ("--num_train_epochs 7", "epochs", 7.0)),
        *(("--save_steps 200", "save_every", 200), ("--project_name voices", "wandb_project", "voices")),
        *(("--resume", "resume", "auto"), ("--resume none", "resume", "none"), ("--resume out/x", "resume", "out/x")),
        *(("--resume_from_checkpoint", "resume", "auto"), ("--resume_from_checkpoint True", "resume", "auto")),
        *(("--resume_from_checkpoint false", "resume", "none"), ("--resume_from_checkpoint a/b", "resume", "a/b")),
        *(("--train_heads", "train_heads", "audio"), ("--train_heads both", "train_heads", "both")),
        ("--gradient_checkpointing", "activation_checkpointing", "full"),
        ("--gradient_checkpointing false", "activation_checkpointing", "none"),
        *(("--report_to none", "wandb_mode", "disabled"), ("--report_to wandb", "wandb_mode", "auto")),
        *(("--bf16", "dtype", "bf16"), ("--bf16 true --fp16 false", "dtype", "bf16"), ("--fp16", "dtype", "fp16")),
        *(("--bf16 false", "dtype", "fp32"), ("--bf16 false --fp16 true", "dtype", "fp16")),
        *(("--fp16=0", "dtype", "bf16"), ("--debug", "debug", True), ("--keep_best no", "keep_best", False)),
        *(("--warmup_steps 10", "warmup_steps", 10), ("--warmup_steps 10", "warmup_ratio", None)),
        *(("--max_steps none", "max_steps", None), ("--seed 9007199254740991", "seed", 2**53 - 1)),
    ],
)
def test_other_trainers_flags_mean_what_they_mean_there(words, option, value, parsed):
    """On the command line, in YAML by the same names, and once more in the resolved file that is given back."""
    config = parse_args([*NEEDED, *words.split()])
    assert config.get(option) == value and type(config.get(option)) is type(value)
    assert parsed(yaml.safe_dump(config.as_dict())) == config
    flags = [part.replace("=", " ").split() for part in words.split("--")[1:]]
    assert parsed("".join(f"{flag[0]}: {flag[1] if flag[1:] else 'true'}\n" for flag in flags)).get(option) == value


def test_dtype_words_of_flags_and_file_together(parsed):
    assert parsed("bf16: true", "--fp16").model.dtype == "fp16"  # flags win
    assert parsed("fp16: true", "--bf16", "false").model.dtype == "fp16"
    assert parsed("fp16: true", "--fp16", "false").model.dtype == "bf16"
    assert parsed("dtype: fp32", "--fp16", "false").model.dtype == "fp32"
    assert parsed("bf16: true", "--dtype", "fp32").model.dtype == "fp32"


def test_what_options_stand_for(parsed):
    for given, every in (("none", 0), ("full", 1), ("4", 4)):
        assert parsed(f"activation_checkpointing: {given}").model.checkpoint_every == every
    for head, modules in MODULES.heads.items():
        lora = parsed(f"train_heads: {head}").lora
        assert MODULES.trained_whole(lora.train_audio_embeddings, lora.train_heads) == modules
    assert MODULES.trained_whole(True, "text") == ("audio_codebook_embeddings", "text_lm_head")
    config = parse_args([*NEEDED, "--lora_target_modules", "attention", "audio_mlp", "self_attn.q_proj"])
    assert MODULES.targets(config.lora.lora_target_modules) == [
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("audio_mlp.gate_proj", "audio_mlp.up_proj", "audio_mlp.down_proj"),
    ]
    assert config.lora.lora_target_modules == ["attention", "audio_mlp", "self_attn.q_proj"]
    assert MODULES.targets(["all"]) == parse_args(NEEDED).lora.lora_target_modules == list(MODULES.lora_targets)


def test_flags_win_over_yaml_and_yaml_over_defaults(parsed):
    text = (
        "learning_rate: 5e-4\nbatch_size: 4\nskip_bad_rows: true\nlora_target_modules: [q_proj, v_proj]\nmax_steps:\n"
    )
    config = parsed(text, "--batch_size", "6", "--codebook_weights", "1", "2,3")
    assert config.optim.lr == 5e-4 and config.optim.batch_size == 6 and config.data.skip_bad_rows is True
    assert config.lora.lora_target_modules == ["q_proj", "v_proj"] and config.loss.codebook_weights == [1.0, 2.0, 3.0]
    assert {"lr", "batch_size", "max_steps"} < config.given and "lora_r" not in config.given


def test_a_list_given_twice_adds_up():
    twice = ["--train_manifest", "more.json=2", "--codebook_weights", "1,2", "--codebook_weights", "3"]
    config = parse_args([*NEEDED, *twice])
    assert config.data.train_manifest == ["train.json", "more.json=2.0"] and config.loss.codebook_weights == [
        1.0,
        2.0,
        3.0,
    ]


@pytest.mark.parametrize("text", ["2026_11_27", "2026-11-27", "0755", "1:30", "1.10", "0x1F", "1_000", "+5", "yes"])
def test_a_text_in_yaml_is_as_it_is_spelt(text, parsed):
    config = parsed(f"run_name: {text}\ncodes_cache: {text}\nlora_target_modules: [{text}]\n")
    assert (config.run.run_name, config.data.codes_cache, config.lora.lora_target_modules) == (text, text, [text])
    assert parsed(yaml.safe_dump(config.as_dict())) == config


def test_a_flag_wins_over_what_the_file_says_of_the_same_thing_in_another_way(parsed):
    def given(text, *flags):
        optim = parsed(text, *flags).optim
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


def test_the_options_cannot_be_changed_but_settled():
    config = parse_args([*NEEDED, "--batch_size", "3"])
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.batch_size = 4
    settled = config.settled(batch_size=4, dtype="fp32")
    assert (settled.optim.batch_size, settled.model.dtype, config.optim.batch_size) == (4, "fp32", 3)
    assert settled.given == config.given == {"train_manifest", "output_dir", "batch_size"}


def test_what_a_resumed_run_may_change():
    assert set(SHAPE_OPTIONS) == {"lora_r", "lora_target_modules", "train_audio_embeddings", "train_heads"}
    assert {"lr", "seed", "train_manifest", "base_dtype", "prompt_style"} < set(TRAJECTORY_OPTIONS)
    assert not {"debug", "resume", "output_dir", "num_workers", "log_every"} & set(TRAJECTORY_OPTIONS)


UPSTREAM = ["--forward_impl", "upstream"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gradient_cliping", "1"], ["--gradient_cliping: unknown flag"]),
        (["--save_step", "3"], ["--save_step: unknown flag (did you mean '--save_steps'?)"]),
        (["--lr", "1", "--lr", "2"], ["--lr: given twice; leave one out"]),
        (["--learning_rate", "1", "--lr", "2"], ["--lr: given twice, as learning_rate too; leave one out"]),
        (["--bf16", "--dtype", "bf16"], ["--dtype: given twice, as bf16 too"]),
        (["--bf16", "--fp16"], ["bf16 and fp16 are both true"]),
        (UPSTREAM, ["--forward_impl upstream", "--loss_impl reference"]),
        (
            [*UPSTREAM, "--loss_impl", "reference", "--gradient_checkpointing"],
            ["not available with upstream"],
        ),
        (
            [*UPSTREAM, "--loss_impl", "reference", "--torch_compile"],
            ["--compile: not available with upstr"],
        ),
        (["--train_heads", "some"], ["--train_heads: should be 'none', 'audio', 'text' or 'both', got 'some'"]),
        (["--lora_dora"], ["--lora_dora: not supported: DoRA scales each row", "--lora_rslora"]),
        (["--lr", "fast"], ["--lr: should be a valid number", "got 'fast'"]),
        (["--lr", "nan"], ["--lr: should be a finite number, got 'nan'"]),
        (["--batch_size", "1.5"], ["--batch_size: should be a valid integer", "got '1.5'"]),
        (["--text_loss_weight", "0", "--audio_loss_weight", "0"], ["there is no loss to train on"]),
        (["--codebook_weights", "1,-1"], ["--codebook_weights: should be greater than or equal to 0, got '-1'"]),
        (["--early_stop", "2"], ["--early_stop: there is nothing to validate on; give --val_manifest"]),
        (
            ["--best_by", "wer", "--sample_texts", "t", "--sample_every", "9", "--judges", "voice"],
            ["--best_by: wer is", "give --judges words"],
        ),
        (["--judges", "words"], ["--judges: there are no samples to judge"]),
        (["--judges", "ears", "--sample_count", "2"], ["--judges: should be 'words', 'voice' or 'sound'"]),
        (["--val_manifest", " "], ["--val_manifest: String should have at least 1 character"]),
        (["--report_to", "tensorboard"], ["--report_to: should be wandb or none, got 'tensorboard'"]),
        (["--gradient_checkpointing", "unsloth"], ["--gradient_checkpointing: should be true or false, got 'unsloth'"]),
        (["--warmup_steps", "3", "--warmup_ratio", "0.1"], ["--warmup_steps, --warmup_ratio: both set"]),
        (["--warmup_ratio", "none"], ["--warmup_ratio: needs a value, 0 for no warm-up"]),
        (["--batch_size", "2", "--max_tokens_per_batch", "9"], ["one counts rows, the other tokens"]),
        (["--lr"], ["--lr/--learning_rate: expected one argument"]),
        (["--config", "nowhere.yaml"], ["--config: nowhere.yaml: No such file"]),
        (["stray"], ["'stray': neither a flag"]),
    ],
)
def test_wrong_flags(argv, words):
    # A stray word would be a manifest behind the list.
    (line,) = problems_of(["--output_dir", "out", "--train_manifest", "train.json", "--log_every", "1", *argv])
    assert "\n" not in line and len(line) < 500 and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["q_proj,audio_lm_head"], ["LoRA on audio_lm_head", "--loss_impl reference"]),
        (["audio_lm_head", "--train_heads"], ["--train_heads: audio_lm_head has LoRA already (--lora_target_modules)"]),
    ],
)
def test_a_head_is_trained_in_one_way_which_the_loss_has_a_gradient_for(argv, words):
    (line,) = MODULES.contradictions(parse_args([*NEEDED, "--lora_target_modules", *argv]))
    assert all(word in line for word in words), line


def test_all_problems_at_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("bach_size: 2\nepochs: -1\nlr: [1]\n")
    found = problems_of(["--config", str(file), "--dtype", "fp8", "--no_such", "--seed", "1", "--seed", "1"])
    assert len(found) == 8
    text = "\n".join(found)
    for word in (f"{file}: bach_size: unknown key (did you mean 'batch_size'?)", "--train_manifest: is required",
                 f"{file}: epochs: should be greater than 0, got '-1'", "--seed: given twice", "--no_such",
                 f"{file}: lr: should be a valid number", "--dtype: should be 'bf16', 'fp16' or 'fp32'",
                 "--output_dir: is required"):  # fmt: skip
        assert word in text, text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: 1e-4\nlr: 2e-4\n", "lr is given twice"),
        ("lr: 1e-4\nlearning_rate: 1e-4\n", "learning_rate: given twice, as lr too"),
        ("run_name: [a]\n", "run.yaml: run_name: should be a valid string"),
        ("codebook_weights: {0: 1}\n", "codebook_weights: should be a valid list"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nlr: *b\n", "a: unknown key"),
        ("lr: " + "[" * 5000, "RecursionError"),
        ("lr: !!python/object/apply:os.system [ls]\n", "lr: should be a valid number"),
        ("- lr\n", "must hold `name: value` lines, it holds a list"),
    ],
)
def test_whatever_stands_in_the_yaml_is_a_line(text, words, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    found = problems_of([*NEEDED, "--config", str(file)])
    assert words in found[0] and all("\n" not in line and len(line) < 500 for line in found), found


def test_a_suggestion_is_another_spelling_and_never_another_option():
    for name, suggested in {"batchsize": "batch_size", "lora_rnk": "lora_rank", "warm_ratio": "warmup_ratio"}.items():
        assert nearest(name, [*OPTIONS, *ALIASES]) == f" (did you mean '{suggested}'?)"
    for name in ("keep_steps", "save_step_count", "lora_q", "max_epochs", "bp16", "train_loss_weight", ""):
        assert nearest(name, [*OPTIONS, *ALIASES]) == ""
