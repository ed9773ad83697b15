"""Several manifests in one epoch: how much of each, other rows each time, the same at every world size."""

import numpy as np
import pytest

from higgs_ds.batching.batch_plan import make_plan
from higgs_ds.batching.mixture import Mixture
from higgs_ds.errors import ConfigError
from tests.batching.test_batch_plan import global_batches
from tests.batching.test_length_buckets import speech_tokens

COUNTS, WEIGHTS = [40, 100, 7], [1.0, 0.3, 2.5]
TOKENS = speech_tokens(sum(COUNTS))


def mixture(seed=7, by_tokens=True, counts=COUNTS, weights=WEIGHTS, tokens=TOKENS):
    return Mixture(counts, weights, seed=seed, tokens=tokens if by_tokens else None, names=["a", "b", "c"])


def plan(world_size, grad_accum, by_tokens, seed=7):
    options = {"grad_accum": grad_accum, "world_size": world_size, "seed": seed}
    options["max_tokens"] = 2048 if by_tokens else None
    return make_plan(len(TOKENS), TOKENS, batch_size=2, mixture=mixture(seed, by_tokens), **options)


@pytest.mark.parametrize("by_tokens", [True, False])
def test_an_epoch_takes_of_each_manifest_what_its_weight_says(by_tokens):
    drawn = mixture(by_tokens=by_tokens)
    assert drawn.taken == [40, 30, 18] and len(drawn) == 88
    seen, before = np.zeros(len(TOKENS), int), set()
    for epoch in range(300):
        rows = drawn.rows(epoch)
        counts = np.bincount(rows, minlength=len(TOKENS))
        assert (counts[:40] == 1).all() and counts[40:140].max() == 1 and counts[40:140].sum() == 30
        assert set(counts[140:]) <= {2, 3} and counts[140:].sum() == 18
        # Three epochs of a third each have no drawn row in common.
        before = set(rows[40:70]) | (before if epoch % 3 else set())
        assert len(before) == 30 * (epoch % 3 + 1)
        seen += counts
    assert seen[40:140].min() > 50 and seen[40:140].max() < 130  # 90 on average
    other = mixture(seed=8, by_tokens=by_tokens)
    assert (mixture(by_tokens=by_tokens).rows(5) == drawn.rows(5)).all() and (other.rows(5) != drawn.rows(5)).any()
    sets = {frozenset(drawn.rows(epoch)[40:70]) for epoch in range(60)}
    assert len(sets) == 60  # drawn anew


@pytest.mark.parametrize("weight", [0.001, 0.3, 0.5, 0.9, 0.999, 1.7])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_no_row_is_longer_than_the_one_that_its_place_is_planned_for(count, weight):
    tokens = speech_tokens(count, seed=count)
    drawn = Mixture([count], [weight], seed=1, tokens=tokens)
    assert len(drawn) == max(1, round(weight * count))
    for epoch in range(20):
        planned = np.sort(tokens[drawn.longest])
        assert (np.sort(tokens[drawn.rows(epoch)]) <= planned).all()
    if count == 1000 and weight > 0.1:
        assert planned.sum() < 1.03 * tokens[drawn.rows(0)].sum()


@pytest.mark.parametrize("by_tokens", [True, False])
def test_global_batches_and_shares_are_the_same_at_every_world_size_and_after_a_resume(by_tokens):
    one = plan(1, 8, by_tokens)
    steps = one.total_steps(4, None)
    assert steps == 4 * one.steps_per_epoch
    wanted = global_batches(one, steps)
    for world_size, grad_accum in ((2, 4), (8, 1)):
        assert global_batches(plan(world_size, grad_accum, by_tokens), steps) == wanted
    whole = list(plan(2, 4, by_tokens).steps(1, 1, steps))
    assert [step.shares for step in whole] == [step.shares for step in one.steps(0, 1, steps)]
    for first in (2, steps // 2, steps):
        assert list(plan(2, 4, by_tokens).steps(1, first, steps)) == whole[first - 1 :]
    for epoch in range(4):
        of_epoch = slice(epoch * one.steps_per_epoch, (epoch + 1) * one.steps_per_epoch)
        rows = [row for batch in wanted[of_epoch] for row in batch]
        assert sorted(rows) == sorted(mixture(by_tokens=by_tokens).rows(epoch).tolist())
        taken = sum(
            len(batch) * step.shares["b"] for batch, step in zip(wanted[of_epoch], whole[of_epoch], strict=True)
        )
        assert taken == pytest.approx(30) and whole[of_epoch][-1].epoch == epoch + 1
    if by_tokens:
        micro = [m.rows for step in one.steps(0, 1, steps) for m in step.micro_batches]
        assert all(len(rows) * TOKENS[list(rows)].max() <= 2048 for rows in micro)
        most_expensive = TOKENS[list(one.most_expensive(TOKENS, 1, steps))].sum()
        assert most_expensive * 1.02 >= max(TOKENS[list(rows)].sum() for rows in micro)


def test_weights_that_make_an_epoch_too_long_are_refused():
    with pytest.raises(ConfigError, match="an epoch of 100,000,010 rows by these weights, over 30,000,000; divide"):
        Mixture([100_000, 10], [1000, 1])


def test_manifests_that_are_taken_whole_are_the_rows_in_their_order():
    for tokens in (None, TOKENS):
        alone, together = Mixture([len(TOKENS)], tokens=tokens), Mixture(COUNTS, tokens=tokens, names="abc")
        assert alone.rows(3).tolist() == together.rows(5).tolist() == list(range(len(TOKENS)))
        assert alone.shares([1, 2]) == {} and alone.lines() == {}
    assert together.shares([0, 41, 42, 146]) == {"a": 0.25, "b": 0.5, "c": 0.25}
    assert mixture().lines() == {
        "a": "all 40 rows an epoch, 45.5 % of it",
        "b": "30 of 100 rows an epoch, 34.1 % of it",
        "c": "18 rows, each of 7 about 2.57 times an epoch, 20.5 % of it",
    }
