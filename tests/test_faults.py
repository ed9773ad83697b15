"""Runs whose ranks, launchers and disks fail: such a run ends, says why, and can go on."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from higgs_ds.checkpoint import list_checkpoints, read_checkpoint
from higgs_ds.errors import ConfigError
from higgs_ds.run_dir import lock_run_dir
from tests.conftest import ROOT, SPEECH
from tests.support.ranks import assert_all, free_port

STEPS = 16
SLOW = {0: ["slowly", 0.1, 0.1], 1: ["slowly", 0.1, 0.1]}


@pytest.fixture(scope="module")
def run_flags(flags_of):
    """A run of two ranks' 16 steps, saved every second, validated every fourth; resumed where there is one."""

    def flags(folder, **changes):
        settings = {"dtype": "fp32", "max_steps": STEPS, "save_every": 2, "resume": "auto", "stall_timeout_sec": 60}
        validated = {"val_manifest": SPEECH, "eval_every": 4, "keep_best": False}
        return flags_of(folder, **settings | validated | changes)

    return flags


@pytest.fixture(scope="module")
def whole(forks, run_flags, tmp_path_factory):
    """The adapter and losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert_all(forks.run(run_flags(folder), 2))
    return folder


def until(condition, seconds=60.0):
    """Waits for what must come."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return value


def steps_done(folder) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"train/loss"') if file.exists() else 0


def assert_same_run(folder, whole) -> None:
    """The same adapter to the bit, and every step's losses once."""
    ours, wanted = (load_file(run / "adapter/adapter_model.safetensors") for run in (folder, whole))
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[key], wanted[key]) for key in wanted)
    rows, wanted_rows = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (folder, whole)
    )
    for name in ("train/loss", "eval/loss"):
        found = [[(row["global_step"], row[name]) for row in run if name in row] for run in (rows, wanted_rows)]
        assert found[0] == found[1] and len(found[0]) in (STEPS, STEPS // 4)


def processes_of(folder) -> list[int]:
    """Live processes that were started with this folder among their flags."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline") as file:
                if str(folder) in file.read():
                    found.append(int(entry))
    return found


def kill_once(forks, flags, folder, draw, *, in_a_save: bool) -> list | None:
    """Starts two ranks, kills one or both at a random moment, and checks how the rest ends; None if they were done."""
    lock = folder / ".lock"
    lock.unlink(missing_ok=True)  # the last run's; before this one's, ranks have yet to find each other
    begun = time.time()
    ranks = forks.start(flags, 2, patches=SLOW)
    until(lambda: lock.exists() or forks.ended(ranks[0]))
    if in_a_save:

        def saving():
            return any(path.stat().st_ctime > begun for path in being_written(folder / "checkpoints"))

        until(lambda: forks.ended(ranks[0]) or saving())
        time.sleep(draw.uniform(0, 0.5))
    else:
        time.sleep(draw.uniform(0, 3.5))
    victims = draw.choice(([0], [1], [0, 1]))
    for victim in victims:
        ranks[victim].kill()
    results = forks.wait(ranks, 60)
    if all(result.returncode == 0 for result in results):
        return None
    for rank, result in enumerate(results):
        if rank not in victims and result.returncode != 0:
            assert result.returncode == 1, (result.returncode, result.output[-2000:])
            assert f"ending: rank {victims[0]} died" in result.output
    return results


def launched(folder, flags, log, launcher="deepspeed") -> subprocess.Popen:
    """Two ranks under a real launcher, in a process group of their own."""
    program = os.path.join(os.path.dirname(sys.executable), launcher)
    ranks = ["--num_accelerators", "2"] if launcher == "deepspeed" else ["--nproc_per_node", "2"]
    command = [sys.executable, program, *ranks, "--master_port", str(free_port()), "train_ds.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def kill_one_launched(flags, folder, draw) -> bool:
    """kill -9 of a launcher, a rank or a data worker, whichever it hits; False if the run was done before."""
    (folder / ".lock").unlink(missing_ok=True)
    with open(os.devnull, "w") as log:
        process = launched(folder, flags, log)
        until(lambda: (folder / ".lock").exists() or process.poll() is not None, 120)
        time.sleep(draw.uniform(0, 8))
        victims = processes_of(folder)
        done = process.poll() is not None or not victims
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(victims or [process.pid]), signal.SIGKILL)
        until(lambda: process.poll() is not None and not processes_of(folder), 90)
    return not done


# More: HIGGS_DS_KILLS=100 python -m pytest tests/test_faults.py -k random_moments
KILLS = int(os.environ.get("HIGGS_DS_KILLS", "10"))


def test_killed_at_random_moments_it_reaches_the_same_adapter(forks, run_flags, whole, tmp_path):
    """kill -9 of one rank or of all, at any moment of start, step and save, and `--resume auto` after each.

    Of more than 20 kills every fifth is of any process under a real launcher, itself included.
    """
    seed = random.randrange(10**6)
    print("seed", seed)
    draw = random.Random(seed)
    kills = killed_in_a_save = 0
    folders = [tmp_path / "run0"]
    while kills < KILLS:
        folder = folders[-1]
        if KILLS > 20 and kills % 5 == 4:
            hit = kill_one_launched(run_flags(folder, num_workers=1), folder, draw)
        else:
            hit = bool(kill_once(forks, run_flags(folder), folder, draw, in_a_save=kills % 2 == 1))
        if hit:
            kills += 1
            killed_in_a_save += bool(being_written(folder / "checkpoints"))
        else:  # it was faster: the next run is killed
            folders.append(tmp_path / f"run{len(folders)}")
    assert killed_in_a_save >= KILLS // 10
    for folder in folders:
        assert_all(forks.run(run_flags(folder), 2))
        assert_same_run(folder, whole)
        assert not being_written(folder / "checkpoints")


def being_written(folder) -> list:
    return list(folder.glob(".step-*.tmp"))


def wait_for_ends(forks, ranks, timeout: float = 600) -> tuple[list, float]:
    """The results, and the seconds from the last line that any rank said to the end of the last rank."""
    began = time.time()
    results = forks.wait(ranks, timeout)
    said = max(rank.output_file.stat().st_mtime for rank in ranks)
    return results, max(began + result.ended_after_sec for result in results) - said


@contextlib.contextmanager
def busy_cores():
    """Inside, every core has another process to run, unless it has had one for a minute."""
    idle = max(0, os.cpu_count() - int(os.getloadavg()[0]))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(idle)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


# More: HIGGS_DS_ENDS=30 python -m pytest tests/test_faults.py -s -k resumed_runs
ENDS = int(os.environ.get("HIGGS_DS_ENDS", "2"))


def test_resumed_runs_are_over_when_they_have_said_so(forks, run_flags, tmp_path):
    """Two ranks with data workers and W&B; every second run is stopped by a signal."""
    folder, took = tmp_path / "run", []
    changes = {"num_workers": 2, "wandb_mode": "offline", "save_every": None, "epochs": 9999, "eval_every": 6}
    assert_all(forks.run(run_flags(folder, max_steps=4, **changes), 2, timeout=600))
    with busy_cores():
        for number in range(ENDS):
            last = steps_done(folder) + 12
            ranks = forks.start(run_flags(folder, max_steps=last, **changes), 2, patches=SLOW)
            if number % 2:
                until(partial(lambda last: steps_done(folder) >= last - 4, last), 600)
                ranks[1].kill(signal.SIGUSR1)
            results, seconds = wait_for_ends(forks, ranks)
            took.append(seconds)
            print(f"{seconds:.1f} s from the last line to the end", flush=True)
            assert_all(results, returncode=75 if number % 2 else 0)
            for result in results:
                assert "Traceback" not in result.output and "Exception" not in result.output, result.output[-3000:]
    assert max(took) < 30


def left_in_group_of(leader: int) -> list[str]:
    """The live processes of the group that a forked rank has led."""
    left = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
            if group == str(leader) and state != "Z":
                left.append(str(path))
    return left


STUCK_ENDS = {
    "done": ([], None, [0, 0]),
    "stopped": ([], ["signal_at_step", 3], [75, 75]),
    "guard": ([], ["lost_audio_from", 3], [3, 3]),
    "failed": ([], ["fail", 3], [1, 1]),
    "check": (["check"], None, [0, 0]),
}


@pytest.mark.parametrize("end", STUCK_ENDS)
def test_workers_that_do_not_go_hold_up_no_end(end, forks, run_flags, tmp_path):
    """Rank 0's are suspended, rank 1's never return."""
    verb, then, codes = STUCK_ENDS[end]
    steps = 3 if end == "done" else STEPS
    flags = [*verb, *run_flags(tmp_path / "run", num_workers=2, max_steps=steps, save_every=None)]
    step = 1 if end == "check" else 3
    patches = {0: ["stuck_workers", "suspended", step, None], 1: ["stuck_workers", "lingering", step, then]}
    ranks = forks.start(flags, 2, patches=patches)
    results, seconds = wait_for_ends(forks, ranks)
    print(f"{seconds:.1f} s from the last line to the end")
    assert [r.returncode for r in results] == codes, results[1].output[-3000:]
    assert seconds < 30
    until(lambda: not any(left_in_group_of(rank.pid) for rank in ranks), 5)
    for result, tracebacks in zip(results, (0, end == "failed"), strict=True):
        assert result.output.count("Traceback") == tracebacks, result.output[-3000:]
        assert "killed by signal" not in result.output


LAUNCH = "deepspeed.launcher.launch"  # the launcher of one node, which the one that the user typed has started


@pytest.mark.parametrize(
    ("launcher", "victim", "number", "code"),
    [
        ("deepspeed", "rank", signal.SIGKILL, None),
        ("deepspeed", "rank", signal.SIGUSR1, 75),
        ("deepspeed", LAUNCH, signal.SIGTERM, 1),
        ("deepspeed", "deepspeed", signal.SIGKILL, -signal.SIGKILL),
        ("deepspeed", "group", signal.SIGINT, (1, -signal.SIGINT)),  # a rank or the signal ended it first
        ("torchrun", "torchrun", signal.SIGTERM, 1),
    ],
)
def test_whatever_ends_a_launched_run_it_is_saved_and_no_process_stays(
    launcher, victim, number, code, forks, run_flags, whole, tmp_path
):
    """Real launchers and signals. Their own exit codes are theirs; a stop is saved and `stopped.json` says the rest."""
    folder = tmp_path / "run"
    log = (tmp_path / "log").open("w+")
    process = launched(folder, run_flags(folder, num_workers=1, save_every=None), log, launcher)
    try:
        until(lambda: steps_done(folder) >= 4 or process.poll() is not None, 120)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(random.uniform(0, 0.5))
        names = {pid: open(f"/proc/{pid}/cmdline").read() for pid in processes_of(folder)}
        if victim == "group":
            os.killpg(process.pid, number)
        elif victim == launcher:
            os.kill(process.pid, number)
        else:
            sign = {"rank": "\0--local_rank=1\0", LAUNCH: LAUNCH}[victim]  # rank 1: it is rank 0 that writes files
            os.kill(next(pid for pid, name in names.items() if sign in name), number)
        until(lambda: process.poll() is not None, 40)
        until(lambda: not processes_of(folder), 40)
    finally:
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)
    output = (tmp_path / "log").read_text()
    if isinstance(code, tuple):
        assert process.returncode in code, output[-3000:]
    else:
        assert process.returncode == code or (code is None and process.returncode), output[-3000:]
    stopped = json.loads((folder / "stopped.json").read_text())
    asked = "is gone" if (victim, number) == ("deepspeed", signal.SIGKILL) else signal.Signals(number).name
    if (victim, number) == ("rank", signal.SIGKILL):
        assert "ending: rank " in output and " died " in stopped["reason"] and stopped["exit_code"] == 1
    else:
        assert asked in stopped["reason"] and stopped["exit_code"] == 75, stopped
        assert 0 < stopped["saved_step"] == steps_done(folder) < STEPS
    typed = shlex.split(stopped["command"])
    assert os.path.basename(typed[0]) == launcher and " --resume auto" in stopped["command"] and str(folder) in typed
    assert_all(forks.run(run_flags(folder), 2))
    assert_same_run(folder, whole)
    assert not (folder / "stopped.json").exists()


@pytest.mark.parametrize("what", ["hang", "fail"])
def test_a_stuck_or_failed_rank_ends_the_others_and_is_named(what, forks, run_flags, tmp_path):
    flags = run_flags(tmp_path / "run", stall_timeout_sec=3)
    results = forks.run(flags, 3, patches={1: [what, 3]}, timeout=60)
    assert [r.returncode for r in results] == [1, 1, 1]
    found = "has not moved for 3 s (--stall_timeout_sec)" if what == "hang" else "failed"
    for result in results:
        assert f"ending: rank 1 {found}" in result.output and "in step 3" in result.output, result.output[-2000:]
    assert what == "hang" or "ZeroDivisionError" in results[2].output


@pytest.mark.parametrize("how", ["killed_in", "fails_in"])
def test_a_rank_that_dies_before_the_first_collective_ends_the_others(how, forks, run_flags, tmp_path):
    """As the process group is joined, which waits a day for a rank that does not come."""
    results = forks.run(run_flags(tmp_path / "run"), 3, patches={1: [how, "join", 1]}, timeout=60)
    assert [r.returncode for r in results] == [1, -signal.SIGKILL if how == "killed_in" else 1, 1]
    found = "died before" if how == "killed_in" else "failed before"
    for rank in (0, 2):
        assert f"ending: rank 1 {found} the first step (starting)" in results[rank].output, results[rank].output
        assert "Traceback" not in results[rank].output
        assert results[rank].ended_after_sec - results[1].ended_after_sec < 10


@pytest.mark.parametrize(("given", "code"), [(["--stall_timeout_sec", "300"], 1), ([], 0)])
def test_a_cpu_may_take_minutes_for_what_a_gpu_does_in_seconds(given, code, forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", max_steps=2, dtype="fp32")
    (result,) = forks.run([*flags, *given], 1, patches={0: ["minutes_a_step"]})
    assert result.returncode == code, result.output[-2000:]
    assert ("rank 0 has not moved for 300 s (--stall_timeout_sec)" in result.output) == bool(given)


@pytest.mark.parametrize("phase", ["load", "data", "backward", "validate", "save", "write"])
def test_a_stop_signal_in_any_phase(phase, forks, run_flags, whole, tmp_path):
    flags = run_flags(tmp_path / "run", grad_accum=1)
    rank = 0 if phase == "write" else 1  # one rank writes
    results = forks.run(flags, 2, patches={rank: ["signal_in", phase, {"load": 1, "validate": 3}.get(phase, 4)]})
    assert_all(results, returncode=75)
    stopped = json.loads((tmp_path / "run/stopped.json").read_text())
    assert stopped["exit_code"] == 75 and "SIGTERM" in stopped["reason"]
    if phase == "load":
        assert "ending: rank 1 was asked to stop (SIGTERM) before the first step" in results[0].output
        assert stopped["saved_step"] == steps_done(tmp_path / "run") == 0
    else:
        progress = read_checkpoint(list_checkpoints(tmp_path / "run/checkpoints")[-1]).progress
        assert progress.step == stopped["saved_step"] == steps_done(tmp_path / "run") < STEPS
        assert progress.owes_validation == (progress.step % 4 == 0) and (phase != "validate" or progress.step == 12)
    assert_all(forks.run(flags, 2))
    assert_same_run(tmp_path / "run", whole)


@contextlib.contextmanager
def small_disk(folder, size: str):
    """A file system of its own; skips where one may not be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_takes_no_more_costs_nothing_that_was_saved(forks, run_flags, whole, tmp_path):
    """By a quota; test_saving.py has a full disk, at the end of a run."""
    folder = tmp_path / "run"
    results = forks.run(run_flags(folder), 2, patches={0: ["quota_from_step", 5, 100_000]})
    assert [r.returncode for r in results] == [1, 1], results[0].output[-3000:]
    for result in results:
        assert "ending: rank 0 failed in step" in result.output, result.output[-3000:]
        found = re.search(r"checkpoint step-(\d+) could not be written to (\S+): ", result.output)
        assert found and found[2] == str(folder / "checkpoints"), result.output[-3000:]
        assert "--resume auto goes on" in result.output
    assert "Traceback" not in results[0].output
    newest = list_checkpoints(folder / "checkpoints")[-1]
    # Step 4 was still being written in the background when the limit came, or step 6 was the first to meet it.
    assert int(found[1]) in (4, 6) and read_checkpoint(newest).progress.step == int(found[1]) - 2
    assert not being_written(folder / "checkpoints")
    assert_all(forks.run(run_flags(folder), 2))
    assert_same_run(folder, whole)


def test_a_read_only_output_dir_is_refused_before_training(forks, run_flags, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        results = forks.run(run_flags(disk / "run"), 2)
    assert [r.returncode for r in results] == [2, 2]
    assert f"--output_dir: {disk / 'run'} cannot be written to: Read-only file system" in results[0].output
    assert "engine:" not in results[0].output


def test_two_runs_cannot_share_a_folder(tmp_path):
    with lock_run_dir(tmp_path), pytest.raises(ConfigError, match="another run is writing"):
        lock_run_dir(tmp_path, wait_sec=0.3)
    with lock_run_dir(tmp_path, wait_sec=0.3):
        pass
