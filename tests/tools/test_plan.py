"""`plan`: memory against torch's measurement on a CPU, steps against the trainer's, for both families."""

import json
import shutil

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from higgs_ds.batching.batch_plan import TokenPlan
from higgs_ds.batching.collate import Collator, Sample
from higgs_ds.model.families import family_of, open_base
from higgs_ds.model.higgs_v2.tiny import write_tiny
from higgs_ds.model.higgs_v3.tiny import write_tiny as write_tiny_v3
from higgs_ds.model.lora import attach_lora
from higgs_ds.model.memory import GRAIN, Load, RankMemory, Weights
from higgs_ds.options.parse import parse_args
from higgs_ds.tools import plan
from higgs_ds.tools.cli import main
from tests.conftest import SPEECH


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A checkpoint of each family, wide enough that activations dominate a micro-batch's memory."""
    folder = tmp_path_factory.mktemp("bases")
    write_tiny(folder / "v2", hidden_size=256, num_layers=4)
    write_tiny_v3(folder / "v3")
    return folder


def options(base, *flags):
    return parse_args(["--train_manifest", str(SPEECH), "--output_dir", "-", "--base_ckpt", str(base), *flags])


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--dtype", "fp32"],
        ["--activation_checkpointing", "full"],
        ["--activation_checkpointing", "2"],
        ["--lora_dropout", "0", "--lora_target_modules", "q_proj", "down_proj"],
    ],
    ids=" ".join,
)
def test_a_micro_batch_takes_the_planned_memory(bases, family, flags):
    """Peak of torch's allocator in forward and backward; parameter counts are exact."""
    config, base = options(bases / family, *flags), open_base(str(bases / family))
    weights = Weights.of(family_of(base), base.config, config)
    lora = attach_lora(
        family_of(base).load_base(base.folder, base.config, config.model.dtype),
        rank=config.lora.lora_r,
        alpha=32,
        dropout=config.lora.lora_dropout,
        target_modules=config.lora.lora_target_modules,
        seed=0,
        base_name="-",
    )
    counts = [sum(p.numel() for p in lora.parameters() if p.requires_grad is learns) for learns in (True, False)]
    assert counts == [weights.lora, weights.base]
    module = family_of(base).training_forward(lora, base.config, checkpoint_every=config.model.checkpoint_every).train()
    ids = torch.tensor(
        [*base.tokenizer.encode("Twenty words. " * 4, add_special_tokens=False), base.spec.audio_out_token]
    )
    labels = torch.full_like(ids, -100).index_fill_(0, torch.tensor([len(ids) - 1]), base.spec.audio_out_token)
    codes = torch.randint(0, 1024, (16, 8, 150), generator=torch.Generator().manual_seed(0))
    batch = Collator(base.spec, with_index=True)([Sample(ids, labels, (clip,), "row") for clip in codes])

    def step():
        loss, _, report = module(batch.model_inputs(), 0.1, torch.full((8,), 0.1))
        assert not report.problems
        loss.backward()
        module.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    rank = RankMemory(config, base.spec, weights, {"zero_optimization": {"stage": 1}}, 1, on_gpu=False)
    parts = rank.parts(Load.of(batch.index))
    assert most > 30e6 and parts["activations"] + parts["heads"] == pytest.approx(most, rel=0.15)


def test_the_largest_budget_fits_and_the_next_does_not(bases):
    config, base = options(bases / "v2"), open_base(str(bases / "v2"))
    weights = Weights.of(family_of(base), base.config, config)
    rank = RankMemory(config, base.spec, weights, {"zero_optimization": {"stage": 1}}, 2)
    tokens = rank.largest(2e9, Load(0))
    assert tokens > GRAIN and rank.total(Load(tokens)) <= 2e9 < rank.total(Load(tokens + GRAIN))
    assert rank.largest(1e9, Load(0)) == 0  # driver and NCCL alone exceed it


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_a_run_is_planned_without_weights(bases, family, tmp_path, capsys):
    """Steps and tokens equal the trainer's; a bad row is skipped and reported."""
    shutil.copytree(bases / family, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors*"))
    rows = [json.loads(line) | {"audio": f"{SPEECH.parent}/{json.loads(line)['audio']}"} for line in open(SPEECH)]
    lines = [json.dumps(row) for row in [*rows, rows[0] | {"audio": "none.wav"}]]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    flags = ["--train_manifest", str(tmp_path / "train.jsonl"), "--base_ckpt", str(tmp_path / "base"), "--lora_r", "4"]
    flags += [
        "--max_tokens_per_batch",
        "700",
        "--epochs",
        "3",
        "--grad_accum",
        "2",
        "--sample_count",
        "1",
        "--val_manifest",
        str(SPEECH),
    ]
    assert main(["plan", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config, base = parse_args([*flags, "--output_dir", "-"]), open_base(str(tmp_path / "base"), weights=False)
    counts, tokens, learned, _ = plan.read_rows(config, base)
    assert counts == [32] and 0.2 < learned < 0.9
    for run in found["run"]:
        made = TokenPlan(tokens, max_tokens=700, grad_accum=2, world_size=run["gpus"], seed=42)
        assert run["steps"] == made.total_steps(3, None)
        assert run["tokens"] == 3 * tokens.sum() and run["hours"]["H100"] > run["hours"]["B200"] > 0
    stages = {(row["deepspeed_config"].split("/")[-1], row["gpus"]): row for row in found["memory"]}
    assert len(stages) == 5 * 4 and found["notes"][1].startswith("on 1, 2, 4, 8 GPUs: ds_configs/zero0.json: ")
    assert found["notes"][0] == f"{tmp_path / 'train.jsonl'}: 1 row skipped, faulty or too long (see describe)"
    for row in stages.values():
        assert row["total"] == pytest.approx(sum(row["parts"].values()))
    whole, shared = (stages["zero3.json", gpus]["parts"] for gpus in (1, 8))
    assert shared["weights"] < whole["weights"] and shared["optimizer"] == pytest.approx(whole["optimizer"] / 8)
    assert stages["zero3_offload.json", 2]["host"] > stages["zero2_offload.json", 2]["host"] > 0
    assert whole["samples"] > 0.5  # includes the codec
    assert main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    assert "zero2_offload" in said and "the largest --max_tokens_per_batch" in said and "141 GB" in said
    assert max(map(len, said.splitlines()[2:22])) < 170


def test_wrong_flags_are_reported_on_one_line(bases, capsys):
    flags = ["--train_manifest", str(SPEECH), "--base_ckpt", str(bases / "v2"), "--max_tokens_per_batch", "9"]
    assert main(["plan", *flags]) == 2 and f"{SPEECH}: no usable row" in capsys.readouterr().err
