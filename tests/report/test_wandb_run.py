"""Weights & Biases: one run however often it is resumed, checked on a local server and in W&B's files."""

import json
import re
import shlex
import socket
import subprocess
import sys
import time

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.report import tracking, wandb_run
from higgs_ds.report.redact import redact
from higgs_ds.report.wandb_run import settle_mode
from tests.report.test_tracking import ROOT, assert_png, start
from tests.report.wandb_files import wandb_history, wandb_records
from tests.report.wandb_server import WandbServer
from tests.support.ranks import free_port

API_KEY = "0123456789" * 4


@pytest.fixture
def anew(monkeypatch):
    """Makes wandb read the environment again; by default it does so once per process."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch, anew):
    """A W&B server that this process and its children are logged in to."""
    running = WandbServer()
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", running.url)
    yield running
    running.close()


def log(tracker, steps, *, ranks: int = 1) -> None:
    for step in steps:
        tracker.log({"train/loss": 10.0 / step, "rank/loss": [10.0 / step] * ranks}, step)


def test_online_a_resumed_run_is_the_same_run_and_has_every_step_once(tmp_path, server):
    with start(tmp_path, wandb_mode="auto") as tracker:
        log(tracker, range(1, 8))
    with start(tmp_path, wandb_mode="auto", first_step=5) as tracker:
        tracker.log({"eval/loss": 3.0}, 5)  # owed; W&B is beyond this step
        log(tracker, range(6, 11))
    ((run_id, run),) = server.runs.items()
    assert json.loads((tmp_path / "wandb_run.json").read_text())["id"] == run_id
    assert [(row["_step"], row["global_step"], row["a_loss/train/loss"]) for row in run.history] == [
        (step, step, pytest.approx(10.0 / step)) for step in range(1, 11)
    ]
    assert run.exit_code == 0 and [row["_step"] for row in run.history if "a_loss/eval/loss" in row] == [8]

    # Steps that the server lost are sent again; a fresh start in the folder is a new run.
    del run.history[8:]
    with start(tmp_path, wandb_mode="auto", first_step=10) as tracker:
        log(tracker, [11])
    assert [row["_step"] for row in run.history] == list(range(1, 12))
    with start(tmp_path, wandb_mode="auto") as tracker:
        log(tracker, [1])
    assert len(server.runs) == 2


def test_offline_a_killed_and_resumed_run_is_one_folder_with_every_step_once(tmp_path, server, capsys):
    """Steps that wandb's process had not written when the run was killed come from metrics.jsonl."""
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from tests.report.test_wandb_run import log, start\n"
        "tracker = start(Path(sys.argv[1]), wandb_mode='offline')\n"
        "log(tracker, range(1, 11), ranks=2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, tmp_path]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert killed.returncode == -9, killed.stderr
    (earlier,) = tmp_path.glob("wandb/offline-run-*")
    with start(tmp_path, wandb_mode="offline", first_step=8) as tracker:
        tracker.log({"eval/loss": 3.0}, 8)
        log(tracker, range(9, 13), ranks=2)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert earlier.name.rpartition("-")[2] in folder.name and folder != earlier
    assert (tmp_path / "wandb/earlier-parts" / earlier.name).is_dir()
    rows = wandb_history(tmp_path)
    assert [row["global_step"] for row in rows] == list(range(1, 13)) and rows[7]["a_loss/eval/loss"] == 3.0

    (command,) = re.findall(r"to upload:  (wandb sync .*)", capsys.readouterr().err)
    words = [sys.executable, "-m", *shlex.split(command)]
    synced = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert synced.returncode == 0, synced.stderr
    ((_, run),) = server.runs.items()
    assert [row["_step"] for row in run.history] == list(range(1, 13))
    with start(tmp_path, wandb_mode="online", first_step=12) as tracker:  # from here on with a network
        log(tracker, [13], ranks=1)
    assert [row["_step"] for row in run.history] == list(range(1, 14)) and len(server.runs) == 1


def test_of_very_many_steps_a_resumed_run_sends_a_part_and_all_validations(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "CATCH_UP_VALUES", 60)
    with start(tmp_path, wandb_mode="offline") as tracker:
        for step in range(1, 31):
            tracker.log({"train/loss": 1.0, "rank/loss": [1.0] * 8}, step)
        tracker.log({"eval/loss": 1.0}, 30)
    start(tmp_path, wandb_mode="offline", first_step=30).close()
    steps = [row["global_step"] for row in wandb_history(tmp_path)]
    assert steps[0] == 1 and steps[-1] == 30 and len(steps) < 12


def test_flags_override_the_environment_which_overrides_defaults(tmp_path, monkeypatch, anew):
    for name in ("PROJECT", "NAME", "ENTITY", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", f"environment-{name.lower()}")
    start(tmp_path / "a", wandb_mode="offline", run_name=None).close()
    start(tmp_path / "b", wandb_mode="offline", run_name="flag", wandb_project="flag").close()
    found = []
    for folder in ("a", "b"):
        (run,) = [r.run for r in wandb_records(tmp_path / folder) if r.WhichOneof("record_type") == "run"]
        found.append((run.project, run.display_name, run.entity, run.run_id))
    environment = ("environment-project", "environment-name", "environment-entity", "environment-run_id")
    assert found == [environment, ("flag", "flag", *environment[2:])]


def test_without_a_network_auto_is_offline_within_seconds(monkeypatch, anew):
    """The server accepts the connection but sends nothing."""
    monkeypatch.setattr(wandb_run, "PROBE_SEC", 0.5)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{sock.getsockname()[1]}")
        began = time.monotonic()
        choice = settle_mode("auto")
        assert choice.mode == "offline" and "does not answer" in choice.note
        with pytest.raises(ConfigError, match="does not answer.*use --wandb_mode offline or auto"):
            settle_mode("online")
        assert time.monotonic() - began < 10


def test_a_run_is_refused_before_clips_are_encoded(forks, flags_of, tmp_path):
    env = {"WANDB_API_KEY": API_KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    env |= {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    (result,) = forks.run(flags_of(tmp_path / "run", wandb_mode="online"), 1, env_of=lambda rank: env)
    assert result.returncode == 2 and "--wandb_mode online: http://127.0.0.1:9 does not answer" in result.output
    assert "rows:" not in result.output


def test_a_network_lost_at_the_end_does_not_block_the_exit(tmp_path, server):
    code = (
        "import sys; from pathlib import Path\n"
        "from higgs_ds.process import end_process\n"
        "from higgs_ds.report import wandb_run\n"
        "from tests.report.test_wandb_run import log, start\n"
        "wandb_run.FINISH_SEC = 2.0\n"
        "with start(Path(sys.argv[1]), wandb_mode='auto') as tracker:\n"
        "    print('open', flush=True); sys.stdin.readline()\n"
        "    log(tracker, range(1, 10), ranks=2); tracker.failures([{'check': 'finite'}])\n"
        "end_process(0)\n"
    )
    command = [sys.executable, "-c", code, tmp_path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "open\n"
        server.close()
        _, said = process.communicate("go\n", timeout=60)
    assert process.returncode == 0 and "does not answer; later: wandb sync" in said, said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9


def test_ranks_share_one_chart_and_checks_that_never_failed_have_no_series(tmp_path):
    with start(tmp_path, wandb_mode="offline") as tracker:
        for step in (1, 2):
            losses = {"rank/loss": [1.0, 2.0], "rank/text_loss": [0.5, None]}
            tracker.log({**losses, "guard/failed_checks": 1, "guard/finite": [0, step]}, step)
    last = wandb_history(tmp_path)[-1]
    wanted = {"global_step": 2, "a_loss/rank/0/loss": 1, "a_loss/rank/1/loss": 2, "a_loss/rank/0/text_loss": 0.5}
    wanted |= {"d_guard/guard/failed_checks": 1, "d_guard/guard/finite/rank_1": 2}
    assert {name: value for name, value in last.items() if "losses" not in name} == wanted
    metrics = [record.metric for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "metric"]
    hidden = {metric.name for metric in metrics if metric.options.hidden}
    assert hidden == {"a_loss/rank/0/loss", "a_loss/rank/1/loss", "a_loss/rank/0/text_loss"}
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*/a_loss/rank/losses_table_*.json")
    assert json.loads(table.read_text())["data"] == [
        [1, "rank 0", 1],
        [2, "rank 0", 1],
        [1, "rank 1", 2],
        [2, "rank 1", 2],
    ]


def test_no_secret_reaches_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_write_me")
    with start(tmp_path, wandb_mode="offline") as tracker:
        tracker.log({"train/loss": 1.0}, 1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert API_KEY.encode() not in path.read_bytes(), path
        assert b"hf_do_not_write_me" not in path.read_bytes(), path


def test_redact():
    secrets = {"apiKey": "k", "hf_token": "t", "password": 123, "nested": {"hub": [{"auth_token": "t"}]}}
    assert redact(secrets) == {
        **dict.fromkeys(secrets, "[redacted]"),
        "nested": {"hub": [{"auth_token": "[redacted]"}]},
    }
    harmless = {"max_tokens_per_batch": 4096, "tokenizer": "path", "hf_token": None}
    assert redact(harmless) == harmless


def test_a_killed_wandb_affects_only_its_own_curves(tmp_path):
    """In a separate process, since all runs of a process share W&B's service."""
    code = (
        "import sys; from pathlib import Path; import psutil\n"
        "from tests.report.test_tracking import start, step_metrics\n"
        "with start(Path(sys.argv[1]), wandb_mode='offline') as tracker:\n"
        "    tracker.log(step_metrics(1), 1)\n"
        "    (service,) = (p for p in psutil.Process().children(recursive=True) if 'wandb-core' in p.name())\n"
        "    service.kill(); service.wait(10)\n"
        "    for step in range(2, 40): tracker.log(step_metrics(step), step)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "W&B failed and is disabled" in done.stderr and "W&B failed during the run" in done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 39
    assert_png(tmp_path / "loss.png")


def test_modes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--wandb_mode is 'ofline'; use one of auto, online, offline, disabled"):
        start(tmp_path, wandb_mode="ofline")
    with pytest.raises(ValueError, match=r"no W&B API key; run `wandb login`, set WANDB_API_KEY"):
        start(tmp_path, wandb_mode="online")
    monkeypatch.setenv("WANDB_MODE", "nope")
    with pytest.raises(ValueError, match="environment variable WANDB_MODE is 'nope'"):
        start(tmp_path, wandb_mode="auto")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert settle_mode("offline").mode == "offline"  # the flag overrides the environment
    start(tmp_path, wandb_mode="auto").close()
    assert not (tmp_path / "wandb").exists()


def test_if_the_server_opens_no_run_auto_is_offline_and_online_an_error(tmp_path, monkeypatch, server, capsys):
    import wandb

    asked, real = [], wandb.init

    def init(**options):
        asked.append(options)
        if options["mode"] == "online":
            raise wandb.errors.CommError("no such entity")
        return real(**options)

    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1}\n')
    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match=r"W&B could not start \(CommError: no such entity\).*--wandb_mode offline"):
        start(tmp_path, wandb_mode="online")
    assert (asked[0]["mode"], asked[0]["project"], asked[0]["name"]) == ("online", "higgs-ds", "test run")
    # The run did not start, so the files of an earlier one are untouched.
    assert (tmp_path / "metrics.jsonl").read_text() == '{"global_step": 1}\n'
    start(tmp_path, wandb_mode="auto").close()
    assert [options["mode"] for options in asked[1:]] == ["online", "offline"]
    assert "no such entity" in capsys.readouterr().err


def test_names_that_wandb_rejects_are_refused_early(monkeypatch, anew):
    with pytest.raises(ConfigError, match="--wandb_project: .*Invalid project name 'voices/anna'"):
        settle_mode("offline", "voices/anna")
    assert settle_mode("disabled", "voices/anna").mode == "disabled"
    sys.modules["wandb"].teardown()
    monkeypatch.setenv("WANDB_RUN_ID", "a/b:c")
    with pytest.raises(ConfigError, match="Run ID cannot contain"):
        settle_mode("offline")
