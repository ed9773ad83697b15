"""Every sink of the tracker, including W&B; its offline file is read with wandb's own reader."""

import io
import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.report import curves, tracking
from higgs_ds.report.curves import draw_curves, draw_history
from higgs_ds.report.history import CODEBOOK_METRICS, History, Series
from higgs_ds.report.tracking import open_tracker
from higgs_ds.report.wandb_run import settle_mode, shown_as
from tests.report.wandb_files import wandb_exit_code, wandb_history, wandb_records

ROOT = Path(__file__).resolve().parents[2]


def start(output_dir, **changes):
    options = {
        "config": {"lora_rank": 16, "hf_token": "hf_do_not_write_me"},
        "total_steps": 150,
        "run_name": "test run",
        "wandb_project": None,
    } | changes
    choice = settle_mode(options.pop("wandb_mode", "disabled"))
    return open_tracker(output_dir, wandb=choice, **options)


def step_metrics(step: int, text_loss: float | None = None) -> dict[str, float]:
    """Losses like those of a real training."""
    codebooks = [(3.0 + 0.5 * codebook) * (0.6 + 0.4 * math.exp(-step / 40)) for codebook in range(8)]
    audio = sum(codebooks) / 8
    text = 2 * math.exp(-step / 30) if text_loss is None else text_loss
    return {
        "train/loss": text + audio,
        "train/text_loss": text,
        "train/audio_loss": audio,
        **{f"train/codebook_loss/{codebook}": value for codebook, value in enumerate(codebooks)},
        "train/learning_rate": 1e-4,
    }


def strict_rows(path) -> list[dict]:
    """Reads a JSONL file with a strict parser, without NaN and infinities."""

    def refuse(constant):
        raise AssertionError(f"{path} holds {constant}, which is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def assert_png(path):
    """A PNG of 1600 x 1000 pixels: signature, then width and height in the header chunk."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1600, 1000)


def test_jsonl_and_wandb_hold_the_same(tmp_path, capsys):
    with start(tmp_path, wandb_mode="auto", wandb_project="voices") as tracker:
        for step in (1, 2, 3):
            tracker.log(step_metrics(step), step)
        tracker.log({"eval/loss": 5.0, "eval/text_loss": 1.0}, 3)
        tracker.log({"eval/wer": 0.5, "eval/stops": 1.0}, 3)

    lines = strict_rows(tmp_path / "metrics.jsonl")
    assert [line["global_step"] for line in lines] == [1, 2, 3, 3, 3]
    assert list(lines[0]) == ["global_step", *step_metrics(1), "time"]
    assert abs(lines[0]["time"] - (tmp_path / "metrics.jsonl").stat().st_mtime) < 60
    history = wandb_history(tmp_path)
    losses = [{k if k == "global_step" else shown_as(k): v for k, v in line.items() if k != "time"} for line in lines]
    assert history == [*losses[:2], losses[2] | losses[3] | losses[4]]  # W&B has each step once
    looked_at = ["train/loss", "eval/stops", "train/grad_norm", "guard/failed_checks", "perf/step_sec"]
    assert sorted(looked_at, key=shown_as) == looked_at

    records = wandb_records(tmp_path)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("voices", "test run")
    assert any(r.metric.glob_name == "*" and r.metric.step_metric == "global_step" for r in records)
    assert wandb_exit_code(tmp_path) == 0
    (run_dir,) = tmp_path.glob("wandb/offline-run-*")
    said = capsys.readouterr().err
    assert f"wandb sync {run_dir}" in said and f"wandb beta leet {run_dir}" in said


def test_values_that_are_not_finite_stay_strict_json(tmp_path):
    with start(tmp_path, wandb_mode="offline") as tracker:
        tracker.log({"train/loss": math.nan, "train/text_loss": math.inf, "train/audio_loss": -math.inf}, 1)
        tracker.failures([{"check": "finite", "step": 1, "found": math.nan}])
    (line,) = strict_rows(tmp_path / "metrics.jsonl")
    assert [line[f"train/{name}"] for name in ("loss", "text_loss", "audio_loss")] == ["NaN", "Infinity", "-Infinity"]
    assert wandb_history(tmp_path)[0].keys() >= {shown_as(name) for name in line if "/" in name}
    assert strict_rows(tmp_path / "guard_failures.jsonl")[0]["found"] == "NaN"
    assert_png(tmp_path / "loss.png")


def test_resume_drops_later_steps_and_an_incomplete_line(tmp_path):
    with start(tmp_path) as tracker:
        for step in range(1, 7):
            tracker.log(step_metrics(step), step)
        tracker.failures([{"check": "finite", "step": 2}, {"check": "finite", "step": 6}])
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:4]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 7, "train/lo')  # killed while writing

    with start(tmp_path, first_step=4) as tracker:
        tracker.log({"train/loss": 0.5}, 5)
    rows = strict_rows(tmp_path / "metrics.jsonl")
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("resumed_after") for row in rows] == [None] * 4 + [4]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:4] == kept
    assert [row["step"] for row in strict_rows(tmp_path / "guard_failures.jsonl")] == [2]
    assert not list(tmp_path.glob("*.tmp"))

    with start(tmp_path) as tracker:
        tracker.log({"train/loss": 9.0}, 1)
    assert [row["train/loss"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [9.0]
    assert not (tmp_path / "guard_failures.jsonl").exists()


def test_resume_names_a_damaged_line(tmp_path):
    for line, found in (('{"global_', "Invalid"), ("{}", "no global_step")):
        damaged = f'{{"global_step": 1}}\n{line}\n'
        (tmp_path / "metrics.jsonl").write_text(damaged)
        with pytest.raises(ConfigError, match=rf"metrics\.jsonl, line 2\b.*{found}"):
            start(tmp_path, first_step=3)
        assert (tmp_path / "metrics.jsonl").read_text() == damaged


@pytest.mark.parametrize(("exception", "exit_code"), [(ZeroDivisionError("boom"), 1), (SystemExit(3), 3)])
def test_an_exception_closes_with_its_exit_code(tmp_path, exception, exit_code):
    with pytest.raises(type(exception)), start(tmp_path, wandb_mode="offline") as tracker:
        tracker.log(step_metrics(1), 1)
        raise exception
    assert wandb_exit_code(tmp_path) == exit_code
    assert_png(tmp_path / "loss.png")


def test_a_failing_sink_is_reported_twice_and_never_ends_a_run(tmp_path, monkeypatch, capsys):
    def disk_is_full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(tracking, "draw_history", disk_is_full)
    with pytest.raises(ZeroDivisionError), start(tmp_path, wandb_mode="offline") as tracker:
        tracker.log(step_metrics(1), 1)
        raise ZeroDivisionError
    assert capsys.readouterr().err.count("loss.png failed") == 2
    assert wandb_exit_code(tmp_path) == 1

    with start(tmp_path / "clean_end") as tracker:
        (tmp_path / "clean_end/metrics.jsonl").mkdir()
        for step in (1, 2):
            tracker.log(step_metrics(step), step)
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl failed and is disabled") == said.count("metrics.jsonl failed during the run") == 1


def test_failures_reach_the_file_at_once_and_the_table_by_close(tmp_path):
    rows = [
        {"check": "finite", "rank": 1, "step": 7, "rows": "a, b"},
        {"check": "text_loss", "rank": 0, "step": 9, "rows": "c", "saved_to": "bad/9.pt"},
    ]
    with start(tmp_path, wandb_mode="offline") as tracker:
        for row in rows:
            tracker.failures([row])
        assert strict_rows(tmp_path / "guard_failures.jsonl") == [{"global_step": r["step"], **r} for r in rows]
        tracker.alert("loss check failed", "finite on rank 1")

    # The first failure is sent at once, the second waits for close because of the interval.
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/d_guard/guard/failures_*.table.json"))
    assert len(tables) == 2
    assert json.loads(tables[-1].read_text()) == {
        "columns": ["global_step", "check", "rank", "step", "rows", "saved_to"],
        "data": [[7, "finite", 1, 7, "a, b", None], [9, "text_loss", 0, 9, "c", "bad/9.pt"]],
    }
    alerts = [r.alert for r in wandb_records(tmp_path) if r.WhichOneof("record_type") == "alert"]
    assert [(alert.title, alert.text, alert.level) for alert in alerts] == [
        ("loss check failed", "finite on rank 1", "WARN")
    ]


@pytest.mark.parametrize("text_losses", [[2.0, 1e-6, 0.0, math.nan, 0.0], [math.nan]])
def test_plot_of_few_points_zero_and_nan(tmp_path, text_losses):
    with start(tmp_path) as tracker:
        for step, text_loss in enumerate(text_losses, start=1):
            tracker.log(step_metrics(step, text_loss), step)
    assert_png(tmp_path / "loss.png")
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "again.png", title="a $cost$ of 5_000 $")
    assert_png(tmp_path / "again.png")
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "perf/step_sec": 0.5}\n')
    with pytest.raises(ValueError, match="no losses to draw"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title="run")


def test_plots_are_drawn_during_the_run_and_take_at_most_a_two_hundredth_of_its_time(tmp_path, monkeypatch):
    clock, drawn_at = [0.0], []

    def draw(*args):
        drawn_at.append(clock[0])
        clock[0] += 1.5

    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tracking, "draw_history", draw)
    with start(tmp_path) as tracker:
        for step in range(1, 1001):
            clock[0] += 1.0
            tracker.log(step_metrics(step), step)
    assert drawn_at[:2] == [10.0, 41.5] and len(drawn_at) == 6  # the first one imports matplotlib; the last is at close
    assert all(later - earlier >= 300 for earlier, later in itertools.pairwise(drawn_at[1:-1]))


def losses_from(first: float, last: float, steps: int, *, resumed_after: int | None = None) -> History:
    """A loss falling linearly on a log axis, with 2 % noise and 20 validations."""
    history, noise = History(), curves.np.random.default_rng(0)
    for step in range(1, steps + 1):
        loss = first * (last / first) ** (step / steps)
        names = ("train/loss", "train/audio_loss", *CODEBOOK_METRICS)
        row = {name: loss * (1 + 0.02 * noise.standard_normal()) for name in names}
        if resumed_after is not None and step == resumed_after + 1:
            row["resumed_after"] = resumed_after
        history.add({"global_step": step, **row})
        if step % (steps // 20) == 0:
            history.add({"global_step": step, "eval/audio_loss": loss * (1.05 if step > steps / 2 else 1.0)})
            history.add(
                {"global_step": step, "eval/wer": 1 - 0.8 * step / steps, "eval/similarity": 0.7, "eval/stops": 1}
            )
    return history


def test_a_fine_tune_fills_a_linear_axis_and_a_quick_start_a_log_one(tmp_path):
    history = losses_from(5.2, 4.6, 5000, resumed_after=2500)
    axes = curves.make_figure(history, "run").axes
    for panel in axes[:2]:
        low, high = panel.get_ylim()
        assert panel.get_yscale() == "linear" and 4.2 < low < 4.6 and 5.2 < high < 5.6
        assert [line.get_xdata()[0] for line in panel.get_lines() if line.get_linestyle() == ":"] == [2500]
    labels = [line.get_label().split()[0] for line in axes[-1].get_lines() if line.get_linestyle() != ":"]
    assert (axes[-1].get_title("left"), labels) == ("Samples", ["wer", "similarity", "stops"])
    draw_history(history, tmp_path / "loss.png", "run")
    assert_png(tmp_path / "loss.png")
    axes = curves.make_figure(losses_from(12, 0.05, 240), "run").axes
    assert [panel.get_yscale() for panel in axes[:2]] == ["log"] * 2


def test_a_long_run_is_read_and_resumed_in_bounded_memory(tmp_path):
    """200,000 steps have as many points as 4,000; the rows of metrics.jsonl are never all in memory."""
    series = Series()
    for step in range(1, 200_001):
        series.add(step, float(step))
    steps, values = series.points()
    assert len(steps) < 4096 and steps[-1] == 200_000 and values[0] == sum(range(1, 65)) / 64

    line = json.dumps({**step_metrics(1), "rank/loss": [5.0] * 64})
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(f'{{"global_step": {step}, {line[1:]}\n' for step in range(1, 5001))
    tracemalloc.start()
    tracker = start(tmp_path, first_step=4990)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tracker.close()
    assert peak < 4e6 < (tmp_path / "metrics.jsonl").stat().st_size
    assert strict_rows(tmp_path / "metrics.jsonl")[-1]["global_step"] == 4990


def test_smoothing_keeps_zero_and_skips_nan():
    values = curves.np.array([0.0] * 60 + [math.nan] + [0.0] * 60 + [3.0] * 60)
    smoothed = curves._smooth(values)
    assert smoothed.shape == values.shape
    assert (smoothed[:110] == 0.0).all() and smoothed[-1] == 3.0


def test_plain_lines_if_stderr_is_not_a_terminal(tmp_path, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    with start(tmp_path) as tracker:
        for step in range(1, 41):
            clock[0] += 1.0
            tracker.progress(step, loss=5.0 - step / 100, lr=1e-4, tok_per_sec=1234.4)
        tracker.message("step 40: validation  loss 4.7000")
        clock[0] += 1.0
        tracker.progress(41)
    err = capsys.readouterr().err
    assert "\r" not in err and "\nstep 40: validation  loss 4.7000\n" in err
    shown = [line for line in err.splitlines() if "/150" in line]
    assert [line.split()[1] for line in shown] == [*(f"{step}/150" for step in range(1, 41, 5)), "41/150"]
    # The last step is printed at close, with the latest figures.
    assert shown[-1] == "step 41/150  loss 4.6000  lr 1.00e-04  1234 tok/s  ETA 01:49"


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with start(tmp_path, first_step=10) as tracker:
        for step in range(11, 151):
            tracker.progress(step, loss=5.0)
        tracker.message("between")
    shown = terminal.getvalue()
    assert "10/150" in shown and "150/150" in shown and "loss 5.0000" in shown
    assert "\nbetween\n" in shown.replace("\r", "\n")


def test_disabled_imports_neither_wandb_nor_matplotlib_nor_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from higgs_ds.report.tracking import open_tracker\n"
        "from higgs_ds.report.wandb_run import settle_mode\n"
        "with open_tracker(Path(sys.argv[1]), config={}, total_steps=1, run_name=None, wandb_project=None,\n"
        "                  wandb=settle_mode('disabled')) as tracker:\n"
        "    tracker.log({'train/lr': 1.0}, 1); tracker.failures([{'check': 'finite'}]); tracker.alert('a', 'b')\n"
        "print(*sorted({'wandb', 'matplotlib', 'torch', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
    assert not (tmp_path / "run" / "wandb").exists()
    assert len(strict_rows(tmp_path / "run" / "metrics.jsonl")) == 1
