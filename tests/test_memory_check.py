"""The most expensive micro-batch before the first step: which it is, that nothing of it is kept, and what is said."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from higgs_ds.batching.batch_plan import Plan, TokenPlan
from higgs_ds.batching.length_buckets import BLUR
from higgs_ds.distributed.launch_env import grow_segments
from higgs_ds.memory_check import advice, is_wanted
from higgs_ds.options.parse import parse_args
from tests.conftest import ROOT
from tests.support.ranks import assert_all

GPU = {0: ["as_on_a_gpu"], 1: ["as_on_a_gpu"]}


def losses(folder) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k.startswith(("train/", "rank/", "eval/"))} for row in rows]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (2, {"dtype": "fp32", "grad_accum": 2}),
        (3, {"dtype": "bf16", "batch_size": 1, "max_tokens_per_batch": 700, "save_every": 3}),
    ],
)
def test_a_run_with_a_memory_check_is_the_run_without_to_the_bit(stage, changes, forks, flags_of, tmp_path):
    """Dropout on: a random draw that was not given back would show in the first loss."""
    common = {"deepspeed_config": f"ds_configs/zero{stage}.json", "max_steps": 4, "lora_dropout": 0.1, **changes}
    assert_all(forks.run(flags_of(tmp_path / "plain", **common), 2))
    results = forks.run(flags_of(tmp_path / "checked", **common), 2, patches=GPU)
    assert_all(results)
    output = results[0].output
    (took,) = re.findall(
        "memory check of the most expensive micro-batch: .* rows, (.*) GiB.*predicted: (.*)\\)", output
    )
    assert all(0.5 < float(gib) < 2 for gib in took), took  # of a small model's process, whose imports are most of it
    assert losses(tmp_path / "plain")[0]["train/loss"] > 1
    assert losses(tmp_path / "checked") == losses(tmp_path / "plain")
    ours, wanted = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("checked", "plain"))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    if "save_every" in changes:  # and gone on with from the third step, checked again
        shutil.rmtree(tmp_path / "checked/checkpoints/step-000004")
        results = forks.run([*flags_of(tmp_path / "checked", **common), "--resume", "auto"], 2, patches=GPU)
        assert_all(results)
        assert "resuming after step 3" in results[0].output and "memory check of the most" in results[0].output
        assert losses(tmp_path / "checked") == losses(tmp_path / "plain")
    # On a known card the share of its peak is logged; on a CPU there is none.
    metrics = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0]) for run in ("checked", "plain")
    ]
    assert ("perf/mfu" in metrics[0]) is (changes["dtype"] == "bf16") and "perf/mfu" not in metrics[1]
    if "perf/mfu" in metrics[0]:
        assert 0 < metrics[0]["perf/mfu"] < 1e-3 and "mfu 0.0 %" in results[0].output


@pytest.mark.parametrize(("stage", "phase"), [(2, "backward"), (3, "forward")])
def test_a_run_that_does_not_fit_ends_with_code_2_on_every_rank(stage, phase, forks, flags_of, tmp_path):
    """One rank runs out of memory, while the other waits for it in a collective."""
    flags = flags_of(tmp_path / "run", deepspeed_config=f"ds_configs/zero{stage}.json")
    results = forks.run(flags, 2, patches={0: ["as_on_a_gpu"], 1: ["out_of_memory", phase]}, timeout=60)
    assert_all(results, returncode=2)
    text = results[1].output
    for words in (
        "the most expensive micro-batch does not fit into the memory of rank 1 (cpu); nothing was trained",
        "manifest.jsonl:",
        "tokens: ",
        "found:  CUDA out of memory. Tried to allocate 2.00 GiB.\n",
        "change: a --batch_size below 2, or --activation_checkpointing full",
    ):
        assert words in text, text
    assert ("zero3.json" in text.split("change:")[1]) is (stage < 3)
    assert "Traceback" not in text + results[0].output
    assert (
        "rank 1 failed before the first step (checking the memory of the most expensive micro-batch)"
        in results[0].output
    )
    assert not (tmp_path / "run/config.yaml").exists()  # the same command, mended, may use the folder
    assert max(r.ended_after_sec for r in results) < 40


def test_on_a_cpu_there_is_none_but_to_compile():
    assert is_wanted(torch.device("cuda", 3), compiled=False) and not is_wanted(torch.device("cpu"), compiled=False)
    assert is_wanted(torch.device("cpu"), compiled=True)


def test_the_most_expensive_of_a_plan_by_rows_is_one_that_it_really_has():
    """Not the longest rows together, which may never meet."""
    tokens = np.random.RandomState(0).randint(10, 900, 101)
    plan = Plan(101, batch_size=4, grad_accum=2, world_size=3, seed=5)
    for first, last in ((1, 1), (2, 7), (1, 3 * plan.steps_per_epoch), (plan.steps_per_epoch, plan.steps_per_epoch)):
        met = [m.rows for rank in range(3) for w in plan.steps(rank, first, last) for m in w.micro_batches]
        rows = plan.most_expensive(tokens, first, last)
        assert rows in met
        assert tokens[list(rows)].sum() == max(tokens[list(r)].sum() for r in met)
        padded = plan.most_expensive(tokens, first, last, padded=True)
        assert len(padded) * tokens[list(padded)].max() == max(len(r) * tokens[list(r)].max() for r in met)
    assert plan.mean_tokens(tokens) == tokens.sum() / 26 and plan.mean_tokens(None) is None


def test_no_micro_batch_of_a_plan_by_tokens_costs_more_than_its_most_expensive():
    tokens = np.clip(np.random.RandomState(1).lognormal(5, 0.6, 700), 20, 1000).astype(int)
    plan = TokenPlan(tokens, max_tokens=4000, grad_accum=2, world_size=2, seed=5)
    last = 5 * plan.steps_per_epoch
    rows = plan.most_expensive(tokens, 1, last)
    costs = [
        tokens[list(m.rows)].sum() for rank in range(2) for w in plan.steps(rank, 1, last) for m in w.micro_batches
    ]
    assert max(costs) <= (1 + BLUR) * tokens[list(rows)].sum() <= 4000 * (1 + BLUR)
    assert tokens[list(rows)].sum() > 0.98 * max(costs) and len(set(rows)) == len(rows)
    assert plan.mean_tokens() == pytest.approx(np.mean(costs), rel=0.03)


def test_advice_names_what_can_still_be_changed():
    def said(stage, *flags):
        return advice(parse_args(["--train_manifest", "m", "--output_dir", "o", *flags]), stage)

    tokens, all_layers = ["--max_tokens_per_batch", "16384"], ["--activation_checkpointing", "full"]
    assert said(2, *tokens) == (
        "a --max_tokens_per_batch below 16384, or --activation_checkpointing full, "
        "or --base_dtype nf4, or --deepspeed_config ds_configs/zero3.json"
    )
    assert said(2, *tokens, *all_layers, "--base_dtype", "nf4") == "a --max_tokens_per_batch below 16384"
    assert said(3, *all_layers) == "shorter rows (--max_duration_sec)"


def test_the_allocators_segments_grow_unless_the_user_said_otherwise():
    for given in ({}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "b:1"}):
        environment = dict(given)
        grow_segments(environment)
        assert environment == (given or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize("command", ["import train_ds; train_ds.main([{flags}])", "import higgs_ds.__main__ as main"])
def test_the_allocator_is_set_up_before_torch_is_there(command):
    """Watched by torch's own import."""
    flags = "'--train_manifest', 'no.json', '--output_dir', '/proc/no', '--base_ckpt', '/no'"
    program = f"""
import os, sys
sys.argv = ["higgs_ds", "tiny", "--output_dir", "/proc/no"]
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("allocator:", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
{command.replace("{flags}", flags)}
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert "allocator: expandable_segments:True" in result.stdout, result.stdout + result.stderr
