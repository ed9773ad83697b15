"""Reads this process's rank, the number of ranks and their meeting place from the environment of any launcher.

DeepSpeed's launcher and torchrun set the variables that torch reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT. srun and the launchers of MPI have variables of their own, which are put into those here. A process that is
one of several and has no rank is refused: it would train by itself, in the output folder of the others. Imported before
torch, which this must not import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from ..errors import ConfigError, shown
from ..process import say
from .ports import port_of_job

HOW = "start with deepspeed, torchrun, srun or mpirun (docs/many-machines.md)"
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on Slurm numbers the batch script, the shell of salloc, …


class Place(NamedTuple):
    """A process's place among several ranks, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int | None
    launcher: str
    first_host: str  # rank 0's; empty where the launcher does not say
    job: str  # the same text on every rank, another one for another job


# Names of rank, size, local rank and local size by launcher of MPI.
MPI = {
    "mpirun (Open MPI)": [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
    "mpirun (MVAPICH)": [f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")],
    "mpiexec (MPICH, Intel MPI)": ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
    "mpiexec (Cray)": ["PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"],
}
# Above these values, the variables say that there are other ranks. A process without others may have the job's
# SLURM_NTASKS, as a batch script does, and SLURM_PROCID 0.
SIGNS_OF_OTHERS = {
    **dict.fromkeys(("WORLD_SIZE", "CROSS_SIZE", "LOCAL_WORLD_SIZE"), 1),
    **dict.fromkeys(("LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "PMIX_RANK"), 0),
    **{name: int(name.endswith(("SIZE", "NRANKS"))) for names in MPI.values() for name in names},
}
# torch 2.11 looks at these in this order and takes the first that is set.
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets the segments of torch's allocator on a GPU grow, unless the user has set it up otherwise.

    Every micro-batch has another size: fixed segments would leave gaps that the next one does not fit into.
    """
    if not any(name in environment for name in ALLOCATOR_SETTINGS):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def enter_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that torch reads from those of srun or MPI; deepspeed's and torchrun's own win.

    A process without others takes the first GPU that it sees, and all cores; several on this host share the cores.

    Raises:
        ConfigError: this process is one of several, but its rank or their meeting place is not set.
    """
    if given := environment.pop("RANK", ""):  # set again below: a rank without it says itself what is wrong
        rank, size = _number({"RANK": given}, "RANK"), _number(environment, "WORLD_SIZE")
        if rank is None or size is None or rank >= size:
            raise ConfigError([f"RANK is {rank}, WORLD_SIZE is {size or 'not set'}; ranks count from 0; {HOW}"])
        if size > 1 or (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
            environment["RANK"] = given
            environment.setdefault("LOCAL_RANK", "0")
        else:
            environment.pop("LOCAL_RANK", None)  # a single rank needs no meeting place
        ranks_here = _number(environment, "LOCAL_WORLD_SIZE") or _number(environment, "LOCAL_SIZE")
        _share_cores(environment, ranks_here, len(os.sched_getaffinity(0)))
    elif (place := _place(environment)) is not None:
        _set_torch_variables(place, environment)
    else:
        _check_single_process(environment)
        environment.pop("LOCAL_RANK", None)
    # DeepSpeed insists that Open MPI's variable equals LOCAL_RANK. It does not where mpirun has started torchrun, or
    # where Slurm shows each task one GPU.
    if environment.get("OMPI_COMM_WORLD_LOCAL_RANK"):
        environment["OMPI_COMM_WORLD_LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")


def _place(environment: Mapping[str, str]) -> Place | None:
    """The place that srun or a launcher of MPI gave this process; None without one, and without other ranks."""
    slurm = _slurm_place(environment)
    for launcher, names in MPI.items():
        rank, size, local_rank, local_size = (_number(environment, name) for name in names)
        if rank is None or size is None or local_rank is None or size == 1:
            continue
        if slurm is not None and slurm[:2] == (rank, size):
            break  # srun speaks PMI too, and knows more
        host = first_host(environment.get("SLURM_JOB_NODELIST", ""))  # mpirun in a job of Slurm puts rank 0 there
        job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or ""
        return Place(rank, size, local_rank, local_size, launcher, host, job)
    return slurm


def is_step(environment: Mapping[str, str]) -> bool:
    """True inside of a step of srun's with several tasks; False in the batch script and in salloc's shell."""
    step, tasks = _number(environment, "SLURM_STEP_ID"), _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    return step is not None and step < FIRST_SPECIAL_STEP and tasks > 1


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    """The place of one of a step's several tasks, which srun started; None anywhere else."""
    if not is_step(environment):
        return None
    rank, size, local_rank = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment['SLURM_STEP_ID']}"
    return Place(rank, size, local_rank, _tasks_here(environment), "srun", host, job)


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: `node[03-05,07],gpu1` -> `node03`; empty for an empty list."""
    first, *_ = re.split(r",(?![^\[]*\])", nodelist)  # at commas outside of brackets
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """The number of tasks on this node, from a list like `4(x2),3`; None where it does not say."""
    node, of_nodes = _number(environment, "SLURM_NODEID"), []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        of_nodes += [int(tasks)] * int(nodes or 1)
    return of_nodes[node] if node is not None and node < len(of_nodes) else None


def _set_torch_variables(place: Place, environment: MutableMapping[str, str]) -> None:
    """Sets torch's variables by a place; MASTER_ADDR and MASTER_PORT stay where they are set.

    Raises:
        ConfigError: nothing says where rank 0 is.
    """
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = "127.0.0.1" if place.local_size == place.world_size else place.first_host
    if not environment["MASTER_ADDR"]:
        raise ConfigError(
            [
                f"{place.launcher} has started {place.world_size} ranks on several hosts but MASTER_ADDR is not set; "
                "set it to the host of rank 0 (mpirun -x MASTER_ADDR=…, mpiexec -genv MASTER_ADDR …)"
            ]
        )
    local_rank, local_size = place.local_rank, place.local_size
    # Slurm may show this task one GPU of the node's several (--gpus-per-task, --gpu-bind), as number 0.
    several = (_number(environment, "SLURM_GPUS_ON_NODE") or 0) > 1 or environment.get("SLURM_GPUS_PER_TASK")
    if several and len(list(filter(str.strip, environment.get("CUDA_VISIBLE_DEVICES", "").split(",")))) == 1:
        local_rank, local_size = 0, 1
    environment.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(local_rank))
    if local_size is not None:
        environment["LOCAL_WORLD_SIZE"] = str(local_size)
    _share_cores(environment, place.local_size, _number(environment, "SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
    if not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(port_of_job(place.job))
    if place.rank == 0:
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        say(f"{place.launcher}: {place.world_size} ranks, which meet at {where}")


def _check_single_process(environment: Mapping[str, str]) -> None:
    """Raises ConfigError where a variable says that there are other ranks; warns of a forgotten srun."""
    for name, most in SIGNS_OF_OTHERS.items():
        if (value := _number(environment, name) or 0) > most:
            raise ConfigError([f"{name} is {value} but RANK is not set; {HOW}, or unset {name} to run one process"])
    tasks, step = _number(environment, "SLURM_NTASKS") or 1, _number(environment, "SLURM_STEP_ID")
    if tasks > 1 and environment.get("SLURM_JOB_ID") and (step is None or step >= FIRST_SPECIAL_STEP):
        say(f"WARNING: Slurm has given this job {tasks} tasks, and this is a single process; srun starts all of them")


def _share_cores(environment: MutableMapping[str, str], ranks_here: int | None, cores: int) -> None:
    """Sets OMP_NUM_THREADS where nobody has: else each of several ranks on this host starts a thread per core.

    torch and DeepSpeed's Adam on the CPU read it when they are imported, which is later.

    Args:
        cores: cores of all ranks here together; srun and mpirun may have bound this one to some of them.
    """
    if ranks_here and ranks_here > 1 and not environment.get("OMP_NUM_THREADS"):
        share = min(cores // ranks_here, len(os.sched_getaffinity(0)))
        environment["OMP_NUM_THREADS"] = str(max(share, 1))


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The number in a variable; None where it is not set. Raises ConfigError for anything else."""
    text = environment.get(name, "")
    if text and not re.fullmatch("[0-9]{1,18}", text):
        raise ConfigError([f"{name} is {shown(text)}, expected a number; {HOW}"])
    return int(text) if text else None
