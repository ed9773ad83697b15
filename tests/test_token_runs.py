"""Real runs on batches by token budget: stopped on 2 ranks, resumed on 1, the same weights."""

import json
from types import SimpleNamespace

import pytest

from higgs_ds.checkpoint import Progress, changed_settings, keep_global_batch, read_checkpoint
from higgs_ds.errors import ConfigError
from higgs_ds.options.parse import parse_args
from tests.conftest import SPEECH
from tests.distributed.test_engine import distance
from tests.support.ranks import assert_all

BUDGET = 700


def test_stopped_on_two_ranks_and_gone_on_with_on_one(forks, flags_of, tmp_path):
    fixed = {"codes_cache": tmp_path / "codes", "max_tokens_per_batch": BUDGET, "batch_size": None, "num_workers": 1}
    fixed |= {"dtype": "fp32", "lora_dropout": 0, "lr_scheduler": "constant", "warmup_ratio": 0}
    fixed |= {"val_manifest": SPEECH, "save_every": 3, "eval_every": 5}

    def run(folder, ranks, **changes):
        results = forks.run(flags_of(tmp_path / folder, **fixed, **changes), ranks)
        assert_all(results)
        return results[0].output

    output = run("whole", 1, grad_accum=4, max_steps=5)
    assert f"up to {BUDGET} tokens" in output and "4 accumulation × 1 ranks = 4 micro-batches" in output
    run("parts", 2, grad_accum=2, max_steps=3)
    output = run("parts", 1, grad_accum=1, max_steps=5, resume="auto")
    assert "resuming after step 3" in output and "4 accumulation × 1 ranks = 4 micro-batches" in output
    ours, wanted = (read_checkpoint(tmp_path / name / "checkpoints/step-000005") for name in ("parts", "whole"))
    assert ours.progress.epoch == wanted.progress.epoch and ours.progress.micro_batches_per_step == 4
    assert distance(ours.state.weights, wanted.state.weights) < 1e-5
    assert distance(ours.state.exp_avg, wanted.state.exp_avg) < 1e-4
    losses = [
        [row["eval/loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
         for row in (json.loads(line),) if "eval/loss" in row]
        for name in ("parts", "whole")
    ]  # fmt: skip
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=1e-4)
    assert len(list((tmp_path / "codes").glob("*/*.codes"))) == 1  # one cache for all, encoded once


def config_of(*flags):
    return parse_args(["--train_manifest", "m", "--output_dir", "o", *flags])


def checkpoint_of(config, /, **changes):
    fixed = {"step": 3, "epoch": 0.5, "dropped_steps": 0, "rows_per_step": 0, "num_rows": 9, "world_size": 2}
    return SimpleNamespace(progress=Progress(**{**fixed, "config": config.as_dict(), **changes}))


def test_the_accumulation_keeps_the_number_of_micro_batches():
    by_tokens = config_of("--max_tokens_per_batch", "100")
    saved = checkpoint_of(by_tokens, micro_batches_per_step=24)
    assert [keep_global_batch(saved, by_tokens, ranks) for ranks in (1, 2, 4, 8)] == [24, 12, 6, 3]
    with pytest.raises(ConfigError, match="24 micro-batches is no multiple of 16 ranks"):
        keep_global_batch(saved, by_tokens, 16)
    other = config_of("--max_tokens_per_batch", "200")
    assert keep_global_batch(saved, other, 4) == 6
    assert "--max_tokens_per_batch is 200, the checkpoint has 100" in changed_settings(saved, other.as_dict(), 9)[0]


def test_tokens_do_not_go_on_with_rows_nor_rows_with_tokens():
    by_tokens, by_rows = config_of("--max_tokens_per_batch", "100"), config_of("--batch_size", "2")
    saved = checkpoint_of(by_tokens, micro_batches_per_step=8)
    with pytest.raises(ConfigError, match="is None, the checkpoint has 100; batches sized by rows cannot continue"):
        keep_global_batch(saved, by_rows, 1)
    old = by_rows.as_dict()
    del old["max_tokens_per_batch"]  # as checkpoints were before there was one
    saved = checkpoint_of(by_rows, rows_per_step=8, config=old)
    assert keep_global_batch(saved, by_rows, 2) == 2 and changed_settings(saved, by_rows.as_dict(), 9) == []
    with pytest.raises(ConfigError, match="is 100, the checkpoint has None; batches sized by tokens cannot continue"):
        keep_global_batch(saved, by_tokens, 2)


def test_rows_or_tokens_but_not_both():
    with pytest.raises(ConfigError, match="--batch_size, --max_tokens_per_batch: one counts rows"):
        config_of("--batch_size", "2", "--max_tokens_per_batch", "100")
    with pytest.raises(ConfigError, match="--max_tokens_per_batch: should be greater than or equal to 1, got '0'"):
        config_of("--max_tokens_per_batch", "0")
