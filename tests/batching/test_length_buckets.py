"""Batches by token budget: every row once, within the budget, the same work on all ranks, at any world size."""

import time
import tracemalloc

import numpy as np
import pytest

from higgs_ds.batching.batch_plan import TokenPlan, evaluation_plans, make_plan
from higgs_ds.batching.length_buckets import pack, slowest
from tests.batching.test_batch_plan import global_batches


def speech_tokens(rows: int, seed: int = 0) -> np.ndarray:
    """Text and frames of lognormal clips, 1 to 20 s."""
    rng = np.random.RandomState(seed)
    seconds = np.clip(rng.lognormal(np.log(5.5), 0.6, rows), 1, 20)
    return (seconds * 28.5).astype(np.int64) + rng.randint(30, 60, rows)


def plan(tokens, world_size=2, grad_accum=4, max_tokens=2048, seed=7) -> TokenPlan:
    return TokenPlan(tokens, max_tokens=max_tokens, grad_accum=grad_accum, world_size=world_size, seed=seed)


SHAPES = {
    "one row": np.array([5]),
    "three rows": np.array([700, 5, 30]),
    "all of one length": np.full(1000, 100),
    "all as long as the budget": np.full(21, 2048),
    "one long, many short": np.array([2048] + [1] * 5000),
    "two lengths that fill half": np.array([1025, 1024] * 50),
    "speech": speech_tokens(700),
    "any": np.random.RandomState(3).randint(1, 2049, 999),
}


@pytest.mark.parametrize("tokens", SHAPES.values(), ids=SHAPES)
def test_every_row_once_an_epoch_within_the_budget(tokens):
    for world_size, grad_accum in ((1, 1), (2, 3), (8, 1), (4, 16)):
        p = plan(tokens, world_size, grad_accum)
        for epoch in range(3):
            steps = range(epoch * p.steps_per_epoch + 1, (epoch + 1) * p.steps_per_epoch + 1)
            plans = [w for rank in range(world_size) for w in p.steps(rank, steps[0], steps[-1])]
            assert all(1 <= len(w.micro_batches) <= grad_accum for w in plans)
            batches = [m.rows for w in plans for m in w.micro_batches if not m.filler]
            assert sorted(row for rows in batches for row in rows) == list(range(len(tokens)))
            assert all(len(rows) * tokens[list(rows)].max() <= p.max_tokens for rows in batches)
            assert {w.epoch for w in plans if w.step == steps[-1]} == {epoch + 1.0}


@pytest.mark.parametrize(("world_size", "round_to"), [(1, 8), (3, 1)])
def test_evaluation_sees_every_row_once_with_equal_forwards(world_size, round_to):
    """Also for the forward that rounds rows up."""
    tokens, options = speech_tokens(90), {"max_tokens": 1500, "round_to": round_to}
    plans = [list(evaluation_plans(90, 1, rank, world_size, tokens=tokens, **options)) for rank in range(world_size)]
    assert len({len(w) for w in plans}) == 1 and all(len(x.micro_batches) == 1 for w in plans for x in w)
    micro = [m.rows for w in plans for x in w for m in x.micro_batches if not m.filler]
    assert sorted(row for rows in micro for row in rows) == list(range(90))
    assert max(len(rows) * (-(-tokens[list(rows)].max() // round_to) * round_to) for rows in micro) <= 1500


def test_a_resume_at_any_step_goes_on_with_the_same_windows():
    tokens = speech_tokens(300)
    whole = list(plan(tokens).steps(1, 1, 3 * plan(tokens).steps_per_epoch))
    for first in range(1, len(whole) + 1):
        assert list(plan(tokens).steps(1, first, len(whole))) == whole[first - 1 :]
    done = [step.epoch for step in whole]
    assert done == sorted(done) and done[-1] == 3.0 and len(set(done)) == len(done)


def test_other_rows_meet_in_every_epoch_and_steps_are_not_sorted_by_length():
    tokens = speech_tokens(2000)
    p = plan(tokens)

    def pairs(epoch):
        drawn = p.epoch(epoch)
        batches = [sorted(rows) for place in range(p.steps_per_epoch) for rows in drawn.step(place)]
        return {(a, b) for rows in batches for i, a in enumerate(rows) for b in rows[i + 1 :]}

    first, second = pairs(0), pairs(1)
    assert len(first & second) < 0.5 * len(first)
    assert global_batches(plan(tokens, seed=8), 2) != global_batches(p, 2) == global_batches(plan(tokens, 8, 1), 2)
    drawn = p.epoch(0)
    means = [np.mean([tokens[row] for rows in drawn.step(place) for row in rows]) for place in range(p.steps_per_epoch)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5
    spreads = [np.ptp([tokens[list(rows)].mean() for rows in drawn.step(place)]) for place in range(p.steps_per_epoch)]
    assert np.median(spreads) > 50  # a step holds short and long rows, each among its like


@pytest.mark.parametrize(
    ("rows", "max_tokens", "grad_accum", "round_to"),
    [(5000, 2048, 1, 1), (5000, 2048, 4, 1), (20000, 8192, 1, 1), (20000, 8192, 4, 1), (20000, 4096, 1, 8)],
)
def test_ranks_compute_what_is_real_and_hardly_more(rows, max_tokens, grad_accum, round_to):
    tokens = speech_tokens(rows)
    p = TokenPlan(tokens, max_tokens=max_tokens, grad_accum=grad_accum, world_size=8, seed=7, round_to=round_to)
    drawn = p.epoch(0)
    batches = [tokens[list(b)] for place in range(p.steps_per_epoch) for b in drawn.step(place)]
    real = np.array([b.sum() for b in batches])
    padded = np.array([len(b) * (-(-b.max() // round_to) * round_to) for b in batches])
    assert padded.max() <= max_tokens and real.mean() > 0.7 * max_tokens
    assert max(8 * slowest(costs, 8).sum() / tokens.sum() for costs in (real, padded)) <= 1.03


def test_a_million_rows_are_planned_in_seconds():
    tokens = speech_tokens(1_000_000)
    tracemalloc.start()
    started = time.process_time()
    p = plan(tokens, 8, 4, 8192)
    (step,) = p.steps(3, p.steps_per_epoch + 1, p.steps_per_epoch + 1)
    took, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 10 and peak < 500e6 and len(step.micro_batches) == 4


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        pack(np.array([]), max_tokens=10, micro_batches_per_step=1)
    for bad in ([5, 11], [0, 5]):
        with pytest.raises(ValueError, match="1 to 10 tokens"):
            pack(np.array(bad), max_tokens=10, micro_batches_per_step=1)


def test_a_plan_says_what_a_step_is():
    p = make_plan(9, np.full(9, 100), batch_size=1, max_tokens=310, grad_accum=1, world_size=3, seed=0)
    assert "up to 310 tokens (on average 300) × 1 accumulation × 3 ranks = 3 micro-batches" in p.describe(2)
    assert "9 rows = 1 steps an epoch, 2 steps = 2.00 epochs" in p.describe(2)
    by_rows = make_plan(9, None, batch_size=2, max_tokens=None, grad_accum=1, world_size=3, seed=0)
    assert "2 rows × 1 accumulation × 3 ranks = 6 rows" in by_rows.describe(2)
