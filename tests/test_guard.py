"""Every check: what it catches in one process, and what all ranks do about it in two."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from higgs_ds.batching.collate import Collator
from higgs_ds.guard import CHECKS, HONEST_ZERO_UNITS, LIKELY_CAUSES, Guard, checklist
from higgs_ds.loss import LossWeights
from higgs_ds.model.higgs_v2.checkpoint import load_base
from higgs_ds.model.higgs_v2.reference import ReferenceForward
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.options.sections import LossOptions
from higgs_ds.step_stats import ForwardReport, MicroBatchStats
from tests.batching.test_collate import samples_of
from tests.support.ranks import assert_all, run_ranks


@pytest.fixture
def batch(tokenizer, tiny_config):
    return Collator(HiggsV2Spec.from_config(tiny_config))(samples_of(["speech", "clone"], tokenizer))


@pytest.fixture
def guard(tmp_path, tiny_config):
    return Guard(
        rank=3,
        output_dir=tmp_path,
        spec=HiggsV2Spec.from_config(tiny_config),
        weights=LossWeights.from_options(LossOptions(), 8),
    )


def good_stats(batch) -> MicroBatchStats:
    return MicroBatchStats(
        text_sum=30.0,
        text_count=float(batch.text_count),
        text_saturation=1e6,
        loss=9.0,
        codebook_sums=[50.0] * 8,
        codebook_counts=list(map(float, batch.codebook_counts)),
    )


def checks(failures) -> set[str]:
    return {failure.check for failure in failures}


def test_a_sound_batch_passes(guard, batch):
    assert guard.check_batch(batch, 1, 0) == []
    assert guard.check_result(batch, ForwardReport(), good_stats(batch), 1, 0) == []
    assert not guard.failed
    assert set(CHECKS) == set(LIKELY_CAUSES)


BROKEN_BATCHES = {
    "no label_ids": ("batch_keys", {"label_ids": None}),
    "no label_audio_ids": ("batch_keys", {"label_audio_ids": None}),
    "no audio_out_ids": ("batch_keys", {"audio_out_ids": None}),
    "one clip too few": ("audio_out_count", {"audio_out_ids_start": torch.tensor([0])}),
    "clips start out of order": ("audio_out_count", {"audio_out_ids_start": torch.tensor([0, 20, 20])}),
}


@pytest.mark.parametrize("name", BROKEN_BATCHES)
def test_broken_batches(name, guard, batch):
    check, changes = BROKEN_BATCHES[name]
    assert check in checks(guard.check_batch(dataclasses.replace(batch, **changes), 1, 0))


@pytest.mark.parametrize(("value", "fails"), [(-1, True), (0, False), (1025, False), (1026, True)])
def test_codes_lie_in_the_codebooks(value, fails, guard, batch):
    batch.audio_out_ids[3, 5] = value
    assert ("code_range" in checks(guard.check_batch(batch, 1, 0))) is fails


def test_labels_that_would_cross_clips(guard, batch):
    batch.label_audio_ids[0, 0] = 7
    (failure,) = guard.check_batch(batch, 1, 0)
    assert failure.check == "label_count" and "cross clips" in failure.found


def test_a_batch_with_nothing_to_learn_fails_unless_it_is_a_filler(guard, batch):
    masked = dataclasses.replace(
        batch,
        label_ids=torch.full_like(batch.label_ids, -100),
        label_audio_ids=torch.full_like(batch.label_audio_ids, -100),
    )
    assert checks(guard.check_batch(masked, 1, 0)) == {"label_count"}
    assert guard.check_batch(dataclasses.replace(masked, filler=True), 1, 0) == []


def broken_stats(batch, **changes):
    """`changes` by field; of a list its first value."""
    stats = good_stats(batch)
    for name, value in changes.items():
        own = getattr(stats, name)
        setattr(stats, name, [value, *own[1:]] if isinstance(own, list) else value)
    return stats


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        ("text_loss", {"text_sum": 0.0}),
        ("audio_loss", {"codebook_sums": 0.0}),
        ("finite", {"text_sum": float("nan")}),
        ("finite", {"codebook_sums": float("inf")}),
        ("finite", {"text_saturation": float("nan")}),
        ("total", {"loss": 0.0}),
        ("total", {"loss": -1.0}),
        ("label_count", {"text_count": 1.0}),
        ("label_count", {"codebook_counts": 0.0}),
    ],
)
def test_broken_results(check, changes, guard, batch):
    failures = guard.check_result(batch, ForwardReport(), broken_stats(batch, **changes), 5, 2)
    assert checks(failures) == {check}
    text = str(failures[0])
    assert "rank 3" in text and "step 5" in text and "m.jsonl:1, m.jsonl:2" in text and LIKELY_CAUSES[check] in text
    assert guard.failed[check] == 1


def test_a_zero_of_text_that_its_margins_explain_is_honest(guard, batch):
    stats = broken_stats(batch, text_sum=0.0, text_saturation=HONEST_ZERO_UNITS / 2)
    assert guard.check_result(batch, ForwardReport(), stats, 1, 0) == []
    assert guard.honest_zeros == 1


@pytest.mark.parametrize("zeroed", [False, True])
def test_the_two_zeros_are_told_apart_on_the_models_own_logits(zeroed, guard, tiny_dir, tiny_config, tokenizer):
    """Honest: the logits themselves say 0.0. Not honest: the sum was lost on the way, the logits say otherwise."""
    model = load_base(tiny_dir, tiny_config, "fp32")
    batch = Collator(HiggsV2Spec.from_config(tiny_config))(samples_of(["text"], tokenizer))

    class Saturated(torch.nn.Module):
        def forward(self, **inputs):
            outputs = model(**inputs)
            target = outputs.expanded_labels.roll(-1, 1).clamp(min=0)
            if not zeroed:
                outputs.logits = torch.nn.functional.one_hot(target, outputs.logits.shape[-1]) * 60.0
            return outputs

    _, stats, report = ReferenceForward.from_config(Saturated(), tiny_config)(batch.model_inputs(), 1.0, torch.ones(8))
    values = MicroBatchStats.empty(8).unpack(stats.tolist())
    if zeroed:
        values.text_sum = values.loss = 0.0
    else:
        assert values.text_sum == 0.0 and values.text_count == batch.text_count > 0
    failures = guard.check_result(batch, report, values, 1, 0)
    assert checks(failures) == ({"text_loss"} if zeroed else set())


def test_the_failing_batch_is_saved(guard, batch, tmp_path):
    batch.audio_out_ids[0, 3] = 4000
    (failure,) = guard.check_batch(batch, 7, 1)
    saved = load_file(failure.saved_to)
    assert int(saved["audio_out_ids"][0, 3]) == 4000
    result = json.loads((tmp_path / "bad_batches/step-000007-rank-3-micro-1.json").read_text())
    assert result["rows"] == ["m.jsonl:1", "m.jsonl:2"] and result["failed"][0][0] == "code_range"


def test_checklist_names_what_the_first_batch_showed(batch):
    report = ForwardReport(expanded_labels_shape=(2, 64), audio_logits_shape=(30, 8, 1026))
    losses = {"text_loss": 1.0, "audio_loss": 2.0, "loss": 3.0, **{f"codebook_loss/{k}": k + 0.5 for k in range(8)}}
    lines = checklist(1, batch, report, losses, [SimpleNamespace(check="audio_loss")])
    text = "\n".join(line for _, line in lines)
    for word in ("keys received: input_ids", "label_ids present", "audio_out_ids present", "(2, 64)", "(30, 8, 1026)",
                 "path: expanded_labels", "text loss: 1.0000", "audio loss: 2.0000", "7: 7.5000",
                 "total loss: 3.0000"):  # fmt: skip
        assert word in text
    failed = [line for ok, line in lines if not ok]
    assert failed == ["[rank 1] audio loss: 2.0000", next(line for _, line in lines if "codebook losses" in line)]


SETUPS = ["ZeRO-2", "ZeRO-3", "upstream"]  # of tests/support/workers/broken_losses.py: both forwards
BREAKAGES = list(CHECKS)  # each has one of its name there


@pytest.fixture(scope="module")
def broken_runs(tiny_dir, codec_dir, tmp_path_factory):
    """All breakages in one launch of two ranks: `skip` first, then `raise`; what each rank saw, by breakage."""
    out = tmp_path_factory.mktemp("guard")
    results = run_ranks(
        ["tests/support/workers/broken_losses.py", str(tiny_dir), str(codec_dir), str(out), *BREAKAGES], 2, timeout=240
    )
    assert_all(results)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", BREAKAGES)
@pytest.mark.parametrize("setup", SETUPS)
def test_all_ranks_agree_and_name_rank_and_row(check, setup, broken_runs):
    for seen in broken_runs:
        case = seen[f"{setup}:{check}:raise"]
        assert case["raised"] and case["seconds"] < 30
        assert {f["check"] for f in case["failures"]} == {check}
        # The gradient norm is one number over all ranks: each names its own rows.
        assert {f["rank"] for f in case["failures"]} == ({0, 1} if check == "gradient" else {1})
        assert case["failures"][-1]["rank"] == 1 and case["failures"][-1]["rows"] == case["rows_of_rank_1"]
        assert case["moved_in_step"] == [True, False]


@pytest.mark.parametrize("check", BREAKAGES)
@pytest.mark.parametrize("setup", SETUPS)
def test_skip_drops_the_step_on_all_ranks_and_goes_on(check, setup, broken_runs):
    for seen in broken_runs:
        case = seen[f"{setup}:{check}:skip"]
        assert not case["raised"]
        assert (case["dropped_steps"], case["updates"]) == (1, 2)  # one or the other, as checkpoints must say
        assert case["moved_in_step"] == [True, False, True]


@pytest.mark.parametrize("setup", SETUPS)
def test_a_dropped_step_leaves_nothing_behind(setup, broken_runs):
    """Weights after steps 1 and 3 are to the bit those of a run that never saw step 2: no moment, no gradient."""
    assert all(seen[f"{setup}:as if the step had not been"] for seen in broken_runs)
