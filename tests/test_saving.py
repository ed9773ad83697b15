"""Files that a run leaves unasked: by the clock, at its end, its best; and those that it refuses to write over."""

import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from higgs_ds import files
from higgs_ds.checkpoint import list_checkpoints, read_checkpoint
from higgs_ds.process import loss_text
from higgs_ds.run_dir import lock_run_dir
from tests.conftest import ROOT, SPEECH
from tests.test_faults import small_disk, until


def steps_of(folder) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder / "checkpoints")]


def rows_of(folder, name) -> list[int]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["global_step"] for row in rows if name in row]


def weights_of(adapter) -> dict:
    return load_file(adapter / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(forks, flags_of):
    """A run of one rank, in float32; its result."""

    def start(folder, ranks=1, **changes):
        flags = flags_of(folder, **{"dtype": "fp32", "val_manifest": SPEECH} | changes)
        results = forks.run(flags, ranks)
        assert len({result.returncode for result in results}) == 1, [result.output[-2000:] for result in results]
        return results[0]

    return start


def test_the_best_is_kept_and_the_run_ends_where_nothing_is_gained(run, tmp_path):
    """A learning rate that moves nothing: after the first, no validation is better."""
    folder, flags = tmp_path / "run", {"lr": 1e-30, "max_steps": 16, "eval_every": 2, "keep_last": 1, "ranks": 2}
    first = run(folder, early_stop=2, **flags)
    assert first.returncode == 0 and "adapter: " in first.output, first.output[-2000:]
    assert rows_of(folder, "eval/loss") == [2, 4, 6] and steps_of(folder) == [2, 6]
    best = json.loads((folder / "checkpoints/step-000006/state.json").read_text())
    assert (best["best_step"], best["validations_since_best"]) == (2, 2)
    card = (folder / "adapter-best/README.md").read_text()
    assert "| optimizer steps | 2 |" in card and f"| validation loss | {loss_text(best['best_loss'])} |" in card
    wanted = read_checkpoint(folder / "checkpoints/step-000002").adapter
    found = weights_of(folder / "adapter-best")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    card = (folder / "adapter/README.md").read_text()
    assert "| optimizer steps | 6 |" in card and " at step 2 |" in card

    before = (folder / "adapter/README.md").stat().st_mtime_ns
    again = run(folder, early_stop=2, resume="auto", **flags)
    assert again.returncode == 0 and "nothing is left to train" in again.output
    assert (folder / "adapter/README.md").stat().st_mtime_ns == before and rows_of(folder, "eval/loss") == [2, 4, 6]

    assert run(folder, early_stop=4, resume="auto", **flags).returncode == 0
    assert rows_of(folder, "eval/loss") == [2, 4, 6, 8, 10] and steps_of(folder) == [2, 10]


def test_saved_by_the_clock_alone_and_nothing_written_over(run, tmp_path):
    folder = tmp_path / "run"
    flags = {"max_steps": 4, "save_minutes": 1e-6, "val_manifest": None, "keep_last": 9}
    assert run(folder, **flags).returncode == 0 and steps_of(folder) == [1, 2, 3, 4]
    assert not (folder / "adapter-best").exists()
    (folder / "adapter/README.md").unlink()  # lost before the end was said
    shutil.rmtree(folder / "adapter")
    assert run(folder, resume="auto", **flags).returncode == 0 and rows_of(folder, "train/loss") == [1, 2, 3, 4]
    assert "| optimizer steps | 4 |" in (folder / "adapter/README.md").read_text()

    for resume, words in (
        ("none", "holds a run already (config.yaml, metrics.jsonl, adapter, checkpoints)"),
        ("auto", f"--init_adapter {folder}/adapter, to train on from there; or move adapter away"),
    ):
        held = (folder / "adapter/adapter_model.safetensors").read_bytes()
        refused = run(folder, resume=resume, **flags)
        assert refused.returncode == 2 and words in refused.output, refused.output[-2000:]
        assert (folder / "adapter/adapter_model.safetensors").read_bytes() == held
        assert rows_of(folder, "train/loss") == [1, 2, 3, 4]
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # for "auto"


@pytest.mark.parametrize(("phase", "count", "validated"), [("validate", 1, []), ("save", 2, [4])])
def test_nothing_stands_between_the_last_step_and_the_disk(phase, count, validated, forks, flags_of, tmp_path):
    """Killed as its last validation begins, or before the checkpoint that tells of it."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"dtype": "fp32", "val_manifest": SPEECH, "max_steps": 4, "eval_every": 4, "resume": "auto"}
    (killed,) = forks.run(flags_of(folder, **changes), 1, patches={0: ["killed_in", phase, count]})
    assert killed.returncode == -signal.SIGKILL and rows_of(folder, "eval/loss") == validated
    assert weights_of(folder / "adapter") and steps_of(folder) == [4]
    for run_folder in (folder, whole):
        (result,) = forks.run(flags_of(run_folder, **changes), 1)
        assert result.returncode == 0, result.output[-2000:]
        assert rows_of(run_folder, "train/loss") == [1, 2, 3, 4] and rows_of(run_folder, "eval/loss") == [4]
    for name in ("adapter", "adapter-best"):
        ours, wanted = weights_of(folder / name), weights_of(whole / name)
        assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted)
        assert "| validation loss |" in (folder / name / "README.md").read_text()
    assert not read_checkpoint(folder / "checkpoints/step-000004").progress.owes_validation


def test_a_console_that_is_gone_costs_nothing(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", dtype="fp32", max_steps=2, val_manifest=SPEECH)
    (result,) = forks.run(flags, 1, patches={0: ["dead_console"]})
    assert result.returncode == 0 and result.output == ""
    assert weights_of(tmp_path / "run/adapter") and steps_of(tmp_path / "run") == [2]


def test_folders_in_place_of_what_a_run_only_tells(forks, flags_of, tmp_path):
    """And a file in place of W&B's folder: each is said, and the run is whole."""
    folder = tmp_path / "run"
    for name in ("stopped.json", "ds_config.json", "loss.png", "guard_failures.jsonl"):
        (folder / name).mkdir(parents=True)
    (folder / "wandb").write_text("mine")
    (result,) = forks.run(flags_of(folder, dtype="fp32", max_steps=2, wandb_mode="offline"), 1)
    assert result.returncode == 0, result.output[-2000:]
    assert weights_of(folder / "adapter") and steps_of(folder) == [2]
    said = result.output
    assert said.count("WARNING: W&B failed and is disabled") == said.count("W&B failed during the run") == 1
    assert "WARNING: the resolved options are not in the run's folder: " in said and "loss.png failed during" in said
    assert (folder / "wandb").read_text() == "mine" and (folder / "stopped.json").is_dir()


def test_a_second_run_that_waited_for_the_first_does_not_write_over_it(forks, flags_of, tmp_path):
    with lock_run_dir(tmp_path):
        ranks = forks.start(flags_of(tmp_path, max_steps=1), 1)
        until(lambda: _waits_for(tmp_path / ".lock", ranks[0].pid))
        (tmp_path / "metrics.jsonl").write_text('{"global_step": 150}\n')
    result = forks.wait(ranks, 60)[0]
    assert result.returncode == 2 and "holds a run already (metrics.jsonl)" in result.output
    assert (tmp_path / "metrics.jsonl").read_text() == '{"global_step": 150}\n'


def test_what_a_killed_run_was_writing_goes_once_the_folder_is_this_runs_alone(tmp_path):
    left = [files.name_beside(tmp_path / name) for name in ("adapter", "config.yaml", "loss.png")]
    for path in left:
        path.mkdir()
    mine = files.name_beside(tmp_path / "notes")
    mine.mkdir()
    with lock_run_dir(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", mine.name])


def _waits_for(lock: Path, pid: int) -> bool:
    """True if a process has the file open, as one has that asks for its lock."""
    with contextlib.suppress(OSError):
        return any(os.path.realpath(name.path) == str(lock) for name in os.scandir(f"/proc/{pid}/fd"))
    return False


def test_a_full_disk_at_the_end_leaves_the_adapter_where_there_is_room(run, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        folder = disk / "full"
        folder_of_a_user = ROOT / "full-adapter"  # of the working folder
        folder_of_a_user.mkdir(exist_ok=True)
        (folder_of_a_user / "notes").write_text("work")
        rescued = ROOT / "full-adapter-1"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(free - 80_000))
        try:
            result = run(folder, max_steps=2, val_manifest=None, codes_cache=tmp_path / "codes")
            assert result.returncode == 1, result.output[-3000:]
            assert f"WARNING: the adapter could not be written to {folder / 'adapter'}: " in result.output
            assert "Traceback" not in result.output and weights_of(rescued)
            assert [path.name for path in folder_of_a_user.iterdir()] == ["notes"]
            assert f"checkpoint step-000002 could not be written to {folder / 'checkpoints'}" in result.output
        finally:
            shutil.rmtree(rescued, ignore_errors=True)
            shutil.rmtree(folder_of_a_user)


def test_a_file_system_that_cannot_sync_folders_is_a_warning_and_a_broken_one_an_error(monkeypatch, tmp_path, capsys):
    def refuse(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    files.sync_folders(tmp_path, tmp_path)
    assert capsys.readouterr().out.count("cannot be synced to disk (Invalid argument)") == 1
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.sync_folders(tmp_path)
