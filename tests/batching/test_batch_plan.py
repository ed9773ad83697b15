"""The order of the data: the same at every world size, every row once an epoch."""

import pytest

from higgs_ds.batching.batch_plan import Plan, evaluation_plans


def plan(num_rows, world_size, grad_accum, batch_size=2, seed=7):
    return Plan(num_rows, batch_size=batch_size, grad_accum=grad_accum, world_size=world_size, seed=seed)


def global_batches(p, steps):
    """Per step, the rows of all ranks in order of (accumulation, rank), without fillers."""
    per_rank = [list(p.steps(rank, 1, steps)) for rank in range(p.world_size)]
    out = []
    for plans in zip(*per_rank, strict=True):
        assert len({len(w.micro_batches) for w in plans}) == 1  # as many forwards on every rank
        rounds = zip(*(w.micro_batches for w in plans), strict=True)
        out.append([row for micro in rounds for m in micro if not m.filler for row in m.rows])
    return out


@pytest.mark.parametrize("num_rows", [16, 37, 3])
def test_global_batches_do_not_depend_on_the_world_size_and_hold_every_row_once_an_epoch(num_rows):
    steps = plan(num_rows, 1, 8).total_steps(3, None)
    wanted = global_batches(plan(num_rows, 1, 8), steps)
    for world_size, grad_accum in ((2, 4), (4, 2), (8, 1)):
        assert global_batches(plan(num_rows, world_size, grad_accum), steps) == wanted

    p = plan(num_rows, 4, 2)
    batches = global_batches(p, 2 * p.steps_per_epoch)
    epochs = [sum(batches[: p.steps_per_epoch], []), sum(batches[p.steps_per_epoch :], [])]
    assert [sorted(rows) for rows in epochs] == [list(range(num_rows))] * 2
    assert epochs[0] != epochs[1]
    assert global_batches(plan(num_rows, 4, 2, seed=8), steps) != wanted


@pytest.mark.parametrize(("num_rows", "world_size"), [(4, 2), (5, 4), (1, 3)])
def test_evaluation_sees_every_row_once_with_equal_forwards(num_rows, world_size):
    plans = [list(evaluation_plans(num_rows, 2, rank, world_size)) for rank in range(world_size)]
    assert len({len(w) for w in plans}) == 1
    rows = [row for w in plans for x in w for m in x.micro_batches if not m.filler for row in m.rows]
    assert sorted(rows) == list(range(num_rows))


def test_steps_of_a_run():
    p = plan(37, 2, 2)  # 8 rows a step, 5 steps an epoch
    assert p.total_steps(2, None) == 10 and p.total_steps(0.5, None) == 3 and p.total_steps(2, 4) == 4
    assert p.total_steps(None, None) == 5 and p.total_steps(None, 23) == 23 and p.total_steps(1, 23) == 5
    with pytest.raises(ValueError, match="no rows"):
        plan(0, 1, 1)
