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
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigError, shown
from ..process import say
from .ports import port_of_job

HOW = "start with deepspeed, torchrun, srun or mpirun (docs/many-machines.md)"
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on Slurm numbers the batch script, the shell of salloc, …


@dataclass(frozen=True)
class Place:
    """A process's place among several ranks, as its launcher says."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int | None
    first_host: str  # rank 0's; empty where the launcher does not say
    job: str = ""  # the same text on every rank, another one for another job


class MpiNames(NamedTuple):
    """The variables of one kind of MPI launcher; of several for one number, the first that is set counts."""

    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


MPI = (
    MpiNames(
        "mpirun (Open MPI)",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    MpiNames(
        "mpirun (MVAPICH)",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    # MPICH and Intel MPI have the first of the local names, Cray the second.
    MpiNames(
        "mpiexec (PMI)",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)
# Above these values, the variables say that there are other ranks. A process without others may have the job's
# SLURM_NTASKS, as a batch script does, and SLURM_PROCID 0.
SIGNS_OF_OTHERS = {
    **dict.fromkeys(("WORLD_SIZE", "CROSS_SIZE", "LOCAL_WORLD_SIZE"), 1),
    **dict.fromkeys((name for names in MPI for name in (names.size, *names.local_size)), 1),
    **dict.fromkeys(("LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "PMIX_RANK"), 0),
    **dict.fromkeys((name for names in MPI for name in (names.rank, *names.local_rank)), 0),
}


def enter_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets the variables that torch reads from those of srun or MPI; deepspeed's and torchrun's own win.

    A process without others takes the first GPU that it sees, and all cores; several on this host share the cores.

    Raises:
        ConfigError: this process is one of several, but its rank or their meeting place is not set.
    """
    if environment.get("RANK"):
        try:
            _check_torch_variables(environment)
        except ConfigError:
            environment.pop("RANK")  # else all but rank 0 would leave the error to rank 0
            raise
        ranks_here = _first_number(environment, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
        _share_cores(environment, ranks_here, len(os.sched_getaffinity(0)))
    elif (place := _mpi_place(environment) or _slurm_place(environment)) is not None:
        _set_torch_variables(place, environment)
    else:
        _check_single_process(environment)
        for name in ("RANK", "LOCAL_RANK"):
            environment.pop(name, None)
    # DeepSpeed insists that Open MPI's variable equals LOCAL_RANK. It does not where mpirun has started torchrun, or
    # where Slurm shows each task one GPU.
    if environment.get("OMPI_COMM_WORLD_LOCAL_RANK"):
        environment["OMPI_COMM_WORLD_LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")


def _check_torch_variables(environment: MutableMapping[str, str]) -> None:
    """Checks the variables of deepspeed or torchrun; a single rank needs no meeting place."""
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is None or world_size is None:
        raise ConfigError([f"RANK is {rank} but WORLD_SIZE is not set; {HOW}"])
    if not rank < world_size:
        raise ConfigError([f"RANK is {rank} but WORLD_SIZE is {world_size}; ranks count from 0; {HOW}"])
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and world_size > 1:
        raise ConfigError([f"RANK is {rank} of {world_size} but {' and '.join(missing)} is not set; {HOW}"])
    if missing:
        for name in ("RANK", "LOCAL_RANK"):
            environment.pop(name, None)
        return
    environment.setdefault("LOCAL_RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_PORT"):
        _number(environment, name)


def _set_torch_variables(place: Place, environment: MutableMapping[str, str]) -> None:
    """Sets torch's variables by a place; MASTER_ADDR and MASTER_PORT stay where they are set.

    Raises:
        ConfigError: nothing says where rank 0 is.
    """
    local_rank, local_size = place.local_rank, place.local_size
    if _has_its_own_gpu(environment):
        local_rank, local_size = 0, 1
    environment.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(local_rank))
    if local_size is not None:
        environment["LOCAL_WORLD_SIZE"] = str(local_size)
    cores = _number(environment, "SLURM_CPUS_ON_NODE") or os.cpu_count() or 1
    _share_cores(environment, place.local_size, cores)
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = "127.0.0.1" if place.local_size == place.world_size else place.first_host
    if not environment["MASTER_ADDR"]:
        raise ConfigError(
            [
                f"{place.launcher} has started {place.world_size} ranks on several hosts but MASTER_ADDR is not set; "
                "set it to the host of rank 0 (mpirun -x MASTER_ADDR=…, mpiexec -genv MASTER_ADDR …)"
            ]
        )
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
    tasks = _number(environment, "SLURM_NTASKS") or 1
    if tasks > 1 and environment.get("SLURM_JOB_ID") and not is_step(environment):
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


def _mpi_place(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher of MPI gave this process; None without one, and without other ranks."""
    for names in MPI:
        rank, size = _number(environment, names.rank), _number(environment, names.size)
        if rank is None or size is None or size == 1:
            continue
        slurm = _slurm_place(environment)
        if slurm is not None and (slurm.rank, slurm.world_size) == (rank, size):
            return slurm  # srun speaks PMI too, and knows more
        local_rank, local_size = (_first_number(environment, local) for local in (names.local_rank, names.local_size))
        if local_rank is None:
            raise ConfigError([f"{names.rank} is {rank} of {size} but {names.local_rank[0]} is not set; {HOW}"])
        hosts = environment.get("SLURM_JOB_NODELIST", "")  # mpirun in a job of Slurm puts rank 0 on the first of them
        job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or ""
        return Place(names.launcher, rank, size, local_rank, local_size, first_host(hosts), job)
    return None


def is_step(environment: Mapping[str, str]) -> bool:
    """True inside of a step of srun's; False in the batch script and in salloc's shell."""
    step = _number(environment, "SLURM_STEP_ID")
    return step is not None and step < FIRST_SPECIAL_STEP


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    """The place of one of a step's several tasks, which srun started; None anywhere else."""
    size = _number(environment, "SLURM_STEP_NUM_TASKS") or 1
    if not is_step(environment) or size == 1:
        return None
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    if rank is None or local_rank is None:
        raise ConfigError([f"Slurm's step has {size} tasks but SLURM_PROCID or SLURM_LOCALID is not set; {HOW}"])
    host = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment['SLURM_STEP_ID']}"
    return Place("srun", rank, size, local_rank, _tasks_here(environment), host, job)


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: `node[03-05,07],gpu1` -> `node03`; empty for an empty list."""
    first, *_ = re.split(r",(?![^\[]*\])", nodelist)  # at commas outside of brackets
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """The number of tasks on this node, from a list like `4(x2),3`; None where it does not say."""
    node = _number(environment, "SLURM_NODEID")
    of_nodes: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        of_nodes += [int(tasks)] * int(nodes or 1)
    return of_nodes[node] if node is not None and node < len(of_nodes) else None


def _has_its_own_gpu(environment: Mapping[str, str]) -> bool:
    """True where Slurm shows this task one GPU of the node's several (--gpus-per-task, --gpu-bind), as number 0."""
    shown_gpus = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    several = (_number(environment, "SLURM_GPUS_ON_NODE") or 0) > 1
    return len(shown_gpus) == 1 and (several or bool(environment.get("SLURM_GPUS_PER_TASK")))


def _first_number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """The number in the first of these variables that is set."""
    return next((value for name in names if (value := _number(environment, name)) is not None), None)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The number in a variable; None where it is not set. Raises ConfigError for anything else."""
    text = environment.get(name, "")
    if text and not re.fullmatch("[0-9]{1,18}", text):
        raise ConfigError([f"{name} is {shown(text)}, expected a number; {HOW}"])
    return int(text) if text else None
