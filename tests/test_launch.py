"""The scripts in launch/: what they start, and a job of Slurm from its queue to its end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from higgs_ds.checkpoint import list_checkpoints
from higgs_ds.distributed.ports import port_of_job
from tests.conftest import ROOT
from tests.test_faults import steps_done, until


@pytest.fixture
def programs(tmp_path):
    """Makes programs that stand for others; the environment in which they come first."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**scripts: str) -> dict[str, str]:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\n{script}\n")
            (folder / name).chmod(0o755)
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{folder}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        return ours | {"PATH": path, "PYTHONPATH": str(ROOT)}

    return make


def started(script: str, *words, env) -> tuple[int, str]:
    """(exit code, all that was said) of one of the scripts."""
    command = ["bash", f"launch/{script}", *map(str, words)]
    ran = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return ran.returncode, ran.stdout


def test_torchrun_is_started_on_every_node_with_the_same_words(programs):
    env = programs(torchrun='echo "torchrun $*, RANK ${RANK-unset}"')
    env |= {"DS_ACCELERATOR": "cpu", "RANK": "7"}
    assert started("torchrun.sh", "--lr", 1, env=env | {"NPROC_PER_NODE": "2"}) == (
        0,
        "torchrun --standalone --nproc_per_node 2 train_ds.py --lr 1, RANK unset\n",
    )
    code, said = started("torchrun.sh", env=env | {"NNODES": "2", "MASTER_ADDR": "n1"})
    assert code == 2 and said == "torchrun.sh: NNODES is 2, but NODE_RANK is not set\n"
    nodes = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[07-08]"}
    slurm = nodes | {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1"}
    code, said = started("torchrun.sh", env=env | slurm)
    place = f"--nnodes 2 --node_rank 1 --master_addr n07 --master_port {port_of_job('4711.0')}"
    assert (code, said) == (0, f"torchrun {place} --nproc_per_node 1 train_ds.py, RANK unset\n")
    for nodes in ("1", "2"):
        tasks = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": nodes}
        code, said = started("torchrun.sh", env=env | slurm | tasks)
        assert code == 2 and f"srun started 16 tasks on {nodes} nodes" in said and "--ntasks-per-node=1" in said
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        here = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": str(port)}
        code, said = started("torchrun.sh", env=env | here)
    assert code == 2 and said.startswith(f"MASTER_PORT: {port} is taken on") and " is free: set MASTER_PORT=" in said


def test_deepspeed_is_started_with_the_hostfile_and_what_its_shells_need(programs, tmp_path):
    env = programs(deepspeed='echo "deepspeed $*"; cat "$DS_ENV_FILE"; exit 75', pdsh="")
    env |= {"DS_ACCELERATOR": "cpu", "HF_TOKEN": "hidden", "OMP_NUM_THREADS": "3"}
    hosts = tmp_path / "hosts"
    assert started("multi_node.sh", hosts, env=env)[0] == 2
    hosts.write_text("# two\n\nnode07 slots=8\nnode08 slots=8\n")
    code, said = started("multi_node.sh", hosts, "--lr", 1, env=env)
    place = f"deepspeed --hostfile {hosts} --master_addr node07 --master_port 29500"
    assert code == 75 and said.startswith(f"{place} train_ds.py --lr 1\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=3\n")
    assert "hidden" not in said
    code, said = started("multi_node.sh", hosts, env=env | {"NODE_RANK": "1", "MASTER_PORT": "5"})
    assert code == 75 and "--master_port 5 --no_ssh --node_rank 1 train_ds.py" in said
    (tmp_path / "bin/pdsh").unlink()
    if shutil.which("pdsh") is None:
        code, said = started("multi_node.sh", hosts, env=env)
        assert code == 2 and "pdsh is not installed here" in said and "NODE_RANK=0, 1, …" in said


def test_a_slurm_job_that_runs_out_of_time_saves_goes_back_to_the_queue_and_on(programs, flags_of, tmp_path):
    """The script itself and real ranks; srun and scontrol are stood in for, since there is no Slurm here."""
    asked = tmp_path / "scontrol"
    env = programs(
        srun=f'exec {sys.executable} -m tests.support.workers.srun "$@"', scontrol=f'echo "$*" >> {asked}'
    ) | {
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    folder = tmp_path / "run"
    command = ["bash", "launch/slurm.sbatch", *flags_of(folder, max_steps=12, dtype="fp32")]
    with (tmp_path / "log").open("w+") as log:
        slow = env | {"SRUN_PATCH": json.dumps(["slowly", 1.0, 0.0])}
        job = subprocess.Popen(command, cwd=ROOT, env=slow, stdout=log, stderr=subprocess.STDOUT)
        until(lambda: steps_done(folder) >= 1 or job.poll() is not None, 600)
        os.kill(job.pid, signal.SIGUSR1)
        code = job.wait(300)
    said = (tmp_path / "log").read_text()
    assert code == 75, said[-3000:]
    assert asked.read_text() == "requeue 4711\n" and "back to the queue" in said
    step = int(list_checkpoints(folder / "checkpoints")[-1].name.removeprefix("step-"))
    assert 0 < step < 12 and "srun: 2 ranks, which meet at 127.0.0.1:" in said

    again = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert again.returncode == 0, again.stdout[-3000:]
    assert f"resuming after step {step}" in again.stdout and steps_done(folder) == 12
    assert asked.read_text() == "requeue 4711\n" and (folder / "adapter").is_dir()
