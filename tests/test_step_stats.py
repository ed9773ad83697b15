"""The numbers of a step, by name, and how often the ranks meet for them."""

import json

import pytest
import torch

from higgs_ds.loss import HeadSums
from higgs_ds.report import metrics
from higgs_ds.report.metrics import StepClock
from higgs_ds.step_stats import LabelCounts, MicroBatchStats, RankStep, StepSums
from tests.support.ranks import assert_all

BOOKS = 3


def stats(first: float = 1.0) -> MicroBatchStats:
    return MicroBatchStats(
        text_sum=first,
        text_count=first + 1,
        text_saturation=first + 2,
        loss=first + 3,
        codebook_sums=[first + 4, first + 5, first + 6],
        codebook_counts=[first + 7, first + 8, first + 9],
    )


def test_what_is_packed_comes_back_by_name():
    counts = LabelCounts(0.0, 5.0, [1.0, 2.0, 3.0])
    sums = StepSums(
        text_sum=1.0,
        text_count=2.0,
        tokens=3.0,
        re_expanded=4.0,
        codebook_sums=[5.0, 6.0, 7.0],
        codebook_counts=[8.0, 9.0, 10.0],
    )
    step = RankStep(0.0, [40.0, 7.0], 1.0, 0.0, 0.5, 0.1, 7.0, 8.0, 0.0, [0.0] * 12, sums)
    for record, empty in (
        (counts, LabelCounts(0, 0, [0] * BOOKS)),
        (sums, StepSums.empty(BOOKS)),
        (step, RankStep(0, [0, 0], 0, 0, 0, 0, 0, 0, 0, [0] * 12, StepSums.empty(BOOKS))),
        (stats(), MicroBatchStats.empty(BOOKS)),
    ):
        assert empty.unpack(record.pack()) == record
        with pytest.raises(ValueError, match="values for a"):
            empty.unpack(record.pack()[:-1])


def test_the_models_numbers_keep_their_names_on_the_way_from_the_device():
    loss = torch.tensor(9.5, requires_grad=True)
    sums = HeadSums(
        text_sum=torch.tensor(1.5, requires_grad=True),
        text_count=torch.tensor(2),
        codebook_sums=torch.tensor([3.0, 4.0, 5.0]),
        codebook_counts=torch.tensor([6, 7, 8]),
        text_saturation=torch.tensor(0.25),
    )
    flat = MicroBatchStats.on_device(sums, loss)
    assert flat.dtype == torch.float32 and not flat.requires_grad
    assert MicroBatchStats.empty(BOOKS).unpack(flat.tolist()) == MicroBatchStats(
        text_sum=1.5,
        text_count=2.0,
        text_saturation=0.25,
        loss=9.5,
        codebook_sums=[3.0, 4.0, 5.0],
        codebook_counts=[6.0, 7.0, 8.0],
    )
    unknown = MicroBatchStats.unknown(loss, BOOKS)
    assert unknown.shape == flat.shape and unknown.isnan().all() and not unknown.requires_grad


def test_micro_batches_and_ranks_add_up():
    ours, theirs = StepSums.empty(BOOKS), StepSums.empty(BOOKS)
    ours.add(stats(1.0), tokens=100, re_expanded=False)
    ours.add(stats(2.0), tokens=50, re_expanded=True)
    theirs.add(stats(10.0), tokens=7, re_expanded=True)
    total = StepSums.total([ours, theirs])
    assert (total.tokens, total.re_expanded) == (157.0, 2.0)
    assert total.text_sum == 1.0 + 2.0 + 10.0 and total.codebook_counts[2] == 10.0 + 11.0 + 19.0
    assert StepSums.empty(BOOKS) == StepSums.empty(BOOKS)  # nobody's lists were written into


def test_every_second_of_the_loop_is_in_one_step(monkeypatch):
    """Reading 1 s, forward and backward 2 s, the update 4 s; 100 s of validation belong to none."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def goes_by(seconds):
        now[0] += seconds

    clock, seen = StepClock(), []
    for _ in range(3):
        clock.begin()
        goes_by(1.0)
        clock.batches_read()
        goes_by(2.0)
        seen.append((clock.step_sec(), clock.data_sec))
        goes_by(4.0)
        clock.end()
        goes_by(100.0)
    assert seen == [(3.0, 1.0), (7.0, 1.0), (7.0, 1.0)]


def test_the_ranks_meet_twice_a_step_and_a_logged_point_covers_the_steps_since_the_last_one(forks, flags_of, tmp_path):
    """They meet for the counts of labels before the first forward, and for the verdict with all that is logged.

    Points of steps 1-2, 3-4 and 5 against every step's own: losses weighted by labels, counts added up.
    """
    found = {}
    for log_every in (1, 2):
        folder = tmp_path / str(log_every)
        flags = flags_of(folder, max_steps=5, grad_accum=2, eval_every=9, log_every=log_every)
        results = forks.run(flags, 2, patches={0: ["count_exchanges"]})
        assert_all(results)
        met = [line for line in results[0].output.splitlines() if "met by" in line]
        assert met == [f"step {step} met by: sum table" for step in range(1, 6)]
        found[log_every] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, points = found[1], found[2]
    assert all(0 < row["perf/data_sec"] < row["perf/step_sec"] < 60 for row in steps)
    assert all(row["memory/reserved_gib"] >= row["memory/peak_gib"] > 0 for row in steps)
    assert [row["global_step"] for row in points] == [2, 4, 5]
    for point, covered in zip(points, (steps[:2], steps[2:4], steps[4:]), strict=True):
        for loss, labels in (("text_loss", "text_tokens"), ("codebook_loss/3", "audio_frames")):
            count = sum(row[f"train/{labels}"] for row in covered)
            mean = sum(row[f"train/{loss}"] * row[f"train/{labels}"] for row in covered) / count
            assert point[f"train/{labels}"] == count and point[f"train/{loss}"] == pytest.approx(mean, rel=1e-6)
        norm = sum(row["train/grad_norm"] for row in covered) / len(covered)
        assert point["train/grad_norm"] == pytest.approx(norm, rel=1e-12)
        assert [len(point[f"rank/{name}"]) for name in ("loss", "text_loss", "audio_loss")] == [2, 2, 2]
    losses = [name for name in steps[4] if name.startswith(("train/", "rank/"))]
    assert [points[2][name] for name in losses] == [steps[4][name] for name in losses]  # one step alone: to the bit
