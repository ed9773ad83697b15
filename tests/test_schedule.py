"""The learning rate of a step, within its schedule and after it, and what a resume under another one is told."""

import math

import pytest

from higgs_ds.schedule import jump, schedule

SETTINGS = {"lr": 1.0, "lr_scheduler": "cosine", "warmup_ratio": 0.0, "warmup_steps": None, "lr_schedule_steps": None}


def test_learning_rate_shapes():
    def at(step, shape, warmup=0.1):
        return schedule(SETTINGS | {"lr_scheduler": shape, "warmup_ratio": warmup}, 100)(step)

    assert [at(s, "cosine") for s in (1, 5, 10, 11)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert at(56, "cosine") == pytest.approx(0.5) and 0 < at(100, "cosine") < 0.001
    assert at(56, "linear") == pytest.approx(0.5) and at(100, "constant") == 1.0
    assert at(1, "linear", warmup=0.0) == 1.0


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_after_the_schedule_the_rate_stays_and_a_warm_up_may_be_longer(shape):
    settings = SETTINGS | {"lr_scheduler": shape, "warmup_ratio": None, "warmup_steps": 4, "lr_schedule_steps": 20}
    rate, run = schedule(settings, 100), schedule({**settings, "lr_schedule_steps": None}, 100)
    assert [rate(s) for s in (1, 2, 4, 5)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert rate(20) == rate(21) == rate(100) and 0 < rate(20) <= run(20)
    assert run(100) < run(99) or shape == "constant"
    longer = schedule({**settings, "warmup_steps": 40}, 100)
    assert longer(20) == 0.5 and longer(40) == 1.0 and all(math.isfinite(longer(s)) for s in range(1, 100))


def test_a_resume_under_another_schedule_says_from_where_to_where_and_what_keeps_the_old_one():
    saved = SETTINGS | {"lr": 1e-3}

    def said(done, saved_steps, now, steps):
        return jump(saved, saved_steps, saved | now, steps, done)

    assert said(90, 100, {}, 100) == []
    (line,) = said(90, 100, {}, 200)
    assert line == (
        "WARNING: the learning rate goes from 3e-05 in step 90 to 0.00058, since its schedule spans 200 steps and "
        "spanned 100; --lr_schedule_steps 100 keeps the old one (2.4e-05)"
    )
    assert said(90, 100, {"lr_schedule_steps": 100}, 200) == []
    assert said(1, 100, {"lr": 2e-3}, 100) == ["WARNING: the learning rate goes from 0.001 in step 1 to 0.002"]
    saved["lr_scheduler"] = "constant"
    assert said(90, 100, {}, 200) == []
    saved |= {"lr_scheduler": "cosine", "lr_schedule_steps": 50}
    assert said(90, 100, {}, 200) == []
