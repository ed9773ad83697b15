"""A process's rank by the variables of srun and MPI, and real ranks that are started with them."""

import base64
import json
import os
import socket
import subprocess
import sys

import pytest

from higgs_ds.distributed.launch_env import enter_launch, first_host
from higgs_ds.distributed.ports import PORTS_OF_JOBS, free_port, port_of_job
from higgs_ds.errors import ConfigError
from tests.support.ranks import ROOT, assert_all

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# As srun sets them for the second task of the second of three nodes, 2 + 3 + 3 tasks.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2,3(x2)",
    "SLURM_STEP_NODELIST": "node[03-04,07]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node01-77@1",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FIRST = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8"} | FIRST


def entered(environment: dict) -> dict:
    """The variables that torch reads, afterwards."""
    environment = dict(environment)
    enter_launch(environment)
    return {name: environment[name] for name in TORCH if name in environment}


def place(*values) -> dict:
    return {name: str(value) for name, value in zip(TORCH, values, strict=True) if value is not None}


def test_srun_and_mpi_become_what_torch_reads():
    port = port_of_job("4711.0")
    lists = {"node[03-05,07],gpu1": "node03", "gpu1,node[1-2]": "gpu1", "rack[2-3]n[08-11,15]-ib,x": "rack2n08-ib"}
    assert {text: first_host(text) for text in lists | {"": ""}} == lists | {"": ""}
    assert port in PORTS_OF_JOBS and port != port_of_job("4711.1") != port_of_job("4712.0")
    assert entered(SRUN) == place(3, 8, 1, 3, "node03", port)
    assert entered(OPEN_MPI | {"MASTER_ADDR": "n1"}) == place(3, 4, 1, 2, "n1", port_of_job("prterun-node01-77@1"))
    assert entered(OPEN_MPI | {"SLURM_JOB_NODELIST": "n[4-5]"})["MASTER_ADDR"] == "n4"
    assert entered(HYDRA | {"MASTER_ADDR": "n1"}) == place(3, 4, 1, 2, "n1", 29500)
    assert entered(HYDRA | {"MPI_LOCALNRANKS": "4", "MASTER_PORT": "5"}) == place(3, 4, 1, 4, "127.0.0.1", 5)
    # srun speaks PMI, which does not know the task's place on its node; mpiexec under srun starts the ranks itself.
    assert entered(SRUN | {"PMI_RANK": "3", "PMI_SIZE": "8"}) == entered(SRUN)
    assert entered(SRUN | HYDRA | {"PMI_RANK": "0", "MASTER_ADDR": "n1"})["RANK"] == "0"
    cray = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"}
    assert entered(cray) == place(1, 2, 1, 2, "127.0.0.1", 29500)
    here = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2,3(x2),7"}
    tasks = [entered(here | {"SLURM_NODEID": str(node)}).get("LOCAL_WORLD_SIZE") for node in range(5)]
    assert tasks == ["2", "3", "3", "7", None]


def test_a_gpu_that_slurm_shows_to_one_task_alone_is_number_0():
    own = SRUN | {"CUDA_VISIBLE_DEVICES": "0"}
    assert entered(own | {"SLURM_GPUS_ON_NODE": "3"})["LOCAL_RANK"] == "0"
    assert entered(own | {"SLURM_GPUS_PER_TASK": "1"})["LOCAL_WORLD_SIZE"] == "1"
    assert entered(own | {"SLURM_GPUS_ON_NODE": "1"})["LOCAL_RANK"] == "1"  # three tasks for one: refused later
    assert entered(SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_GPUS_ON_NODE": "3"})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        BATCH_SCRIPT,
        BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # the shell of salloc
        SRUN | FIRST | {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "somewhere"},
        {"RANK": "", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1"},
    ],
)
def test_one_process_is_one_wherever_it_is(environment, capsys):
    assert "RANK" not in entered(environment) and "LOCAL_RANK" not in entered(environment)
    forgot_srun = environment.items() >= BATCH_SCRIPT.items() and environment.get("SLURM_STEP_ID") != "0"
    assert ("a single process; srun starts all" in capsys.readouterr().out) == forgot_srun


def test_deepspeed_and_torchrun_win_over_what_they_were_started_in():
    given = place(5, 16, 1, None, "10.0.0.1", 29500)
    for around in (SRUN, OPEN_MPI, BATCH_SCRIPT):
        assert entered(around | given) == given
    assert entered(place(0, 1, None, None, None, None)) == {"WORLD_SIZE": "1"}  # alone: it needs no meeting place


TWO_HOSTS = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        (TWO_HOSTS | {"LOCAL_SIZE": "8"}, "2"),  # of deepspeed
        (TWO_HOSTS | {"LOCAL_SIZE": "8", "OMP_NUM_THREADS": "7"}, "7"),
        (TWO_HOSTS | {"LOCAL_WORLD_SIZE": "4"}, "4"),  # of torchrun, had it not set 1
        (TWO_HOSTS | {"LOCAL_SIZE": "1"}, None),
        (SRUN | {"SLURM_CPUS_ON_NODE": "16", "CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "3"}, "5"),
        (SRUN | {"SLURM_CPUS_ON_NODE": "48"}, "16"),  # bound to its own
        (OPEN_MPI | {"MASTER_ADDR": "n1", "OMPI_COMM_WORLD_LOCAL_SIZE": "16", "OMPI_COMM_WORLD_SIZE": "32"}, "4"),
        (BATCH_SCRIPT, None),
    ],
)
def test_ranks_of_one_host_share_its_cores(environment, threads, monkeypatch):
    """64 cores, of which this process may use 16."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    environment = dict(environment)
    enter_launch(environment)
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4 but RANK is not set; start with deepspeed, torchrun, srun or mpirun"),
        (BATCH_SCRIPT | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, "SLURM_PROCID is 1 but RANK is not set"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3 but RANK is not set; start with deepspeed, torchrun, srun"),
        ({"RANK": "1"}, "RANK is 1, WORLD_SIZE is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4, WORLD_SIZE is 4; ranks count from 0"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK is 'x', expected a number"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "PMI_SIZE is 4 but RANK is not set"),
        (OPEN_MPI, "on several hosts but MASTER_ADDR is not set; set it to the host of rank 0"),
    ],
)
def test_one_of_several_without_a_rank_is_refused(environment, said):
    environment, given = dict(environment), "RANK" in environment
    with pytest.raises(ConfigError) as refused:
        enter_launch(environment)
    assert not (given and "RANK" in environment)  # as which it would keep silent
    assert said in str(refused.value) and len(refused.value.problems) == 1 and len(str(refused.value)) < 400


def of_open_mpi(rank: int) -> dict:
    here = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
    return here | {"OMPI_COMM_WORLD_LOCAL_SIZE": 2, "PMIX_NAMESPACE": f"prterun-here-{PORT}@1"}


def of_hydra(rank: int) -> dict:
    return {"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2, "MASTER_PORT": PORT}


def of_srun(rank: int) -> dict:
    """Two nodes of one task each, which are both this machine."""
    here = {"SLURM_JOB_ID": PORT, "SLURM_STEP_ID": 3, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": rank}
    nodes = {"SLURM_STEP_NODELIST": f"{socket.gethostname()},other[1-2]"}
    return here | nodes | {"SLURM_LOCALID": 0, "SLURM_NODEID": rank, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


def of_torchrun_in_open_mpi(rank: int) -> dict:
    """mpirun has started one torchrun, and that two ranks."""
    around = {"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1, "OMPI_COMM_WORLD_LOCAL_RANK": 0}
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    return around | ours


PORT = free_port()


@pytest.mark.parametrize("launcher", [of_open_mpi, of_hydra, of_srun, of_torchrun_in_open_mpi])
def test_two_real_ranks_of_each_train_together(launcher, forks, flags_of, tmp_path):
    results = forks.run(flags_of(tmp_path / "run", max_steps=1, dtype="fp32"), 2, env_of=launcher)
    assert_all(results)
    assert "2 rows × 1 accumulation × 2 ranks = 4 rows" in results[0].output
    assert (": 2 ranks, which meet at " in results[0].output) == (launcher is not of_torchrun_in_open_mpi)
    assert (tmp_path / "run/adapter").is_dir()


def test_a_taken_port_is_one_line_with_a_free_one(forks, flags_of, tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        (result,) = forks.run(flags_of(tmp_path / "run"), 1, env_of=lambda rank: place)
    assert result.returncode == 2, result.output
    (line,) = [line for line in result.output.splitlines() if "MASTER_PORT" in line]
    assert f"MASTER_PORT: {port} is taken on {socket.gethostname()}" in line
    assert " is free: set MASTER_PORT=" in line and "torchrun --master_port " in line


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"MASTER_ADDR": "nowhere.invalid"}, "Name or service not known"),
        ({"MASTER_PORT": ""}, "MASTER_PORT expected"),
    ],
)
def test_ranks_without_a_meeting_place_are_refused_at_once(changes, why, forks, flags_of, tmp_path):
    place = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    (result,) = forks.run(flags_of(tmp_path / "run"), 1, env_of=lambda rank: place | changes)
    assert result.returncode == 2
    (line,) = [line for line in result.output.splitlines() if "[rank 1] MASTER_ADDR, MASTER_PORT: " in line]
    assert why in line, result.output


def test_deepspeeds_real_launcher_starts_ranks_that_share_the_cores():
    """It sets no OMP_NUM_THREADS: by themselves torch and OpenMP take all cores in each of them."""
    cores, ranks = len(os.sched_getaffinity(0)), 2
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    launcher = ["-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={free_port()}"]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ran = subprocess.run(
        [sys.executable, *launcher, "tests/support/workers/threads.py"],
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=600,
    )
    said = [line for line in ran.stdout.splitlines() if line.startswith("rank ")]
    share = max(1, cores // ranks)
    assert sorted(said) == [f"rank {rank}: {share} threads of torch, {share} of OpenMP" for rank in range(ranks)], ran
