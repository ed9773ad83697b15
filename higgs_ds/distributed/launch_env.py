"""Reads from the environment which of how many ranks this process is, and where they meet.

DeepSpeed's launcher and torchrun set the variables that torch reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT. srun and the launchers of MPI have variables of their own, which are put into those here. A process that is
one of several and has no rank is refused: it would train alone, in the output folder of the others. Imported before
torch, which this must not import.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ..errors import ConfigError, shown
from ..process import say

PORTS = range(20000, 30000)  # below the ports that systems hand out by themselves
DEFAULT_PORT = 29500  # DeepSpeed's and torchrun's
HOW = "start with deepspeed, torchrun, srun or mpirun (docs/many-machines.md)"
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # from here on Slurm numbers the batch script, the shell of salloc, …


@dataclass(frozen=True)
class Place:
    """A process's place among the ranks, as its launcher says."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int | None = None
    first_host: str | None = None  # where rank 0 is; None where the launcher does not say
    num_hosts: int | None = None
    job: str | None = None  # the same text on every rank, another one for another job


@dataclass(frozen=True)
class MpiNames:
    """Variables of one kind of MPI launcher; the first that is set counts."""

    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...] = ()


MPI = (
    MpiNames(
        "mpirun (Open MPI)",
        rank="OMPI_COMM_WORLD_RANK",
        size="OMPI_COMM_WORLD_SIZE",
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    MpiNames(
        "mpirun (MVAPICH)",
        rank="MV2_COMM_WORLD_RANK",
        size="MV2_COMM_WORLD_SIZE",
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    MpiNames(
        "mpiexec (PMI)",
        rank="PMI_RANK",
        size="PMI_SIZE",
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)

# Above these values, the variables say that there are other ranks. A process alone may have the job's SLURM_NTASKS, as
# a batch script does, and SLURM_PROCID 0.
SIGNS_OF_OTHERS = {
    **dict.fromkeys(("WORLD_SIZE", "CROSS_SIZE", "LOCAL_WORLD_SIZE", "PET_NNODES", "PET_NPROC_PER_NODE"), 1),
    **dict.fromkeys((name for names in MPI for name in (names.size, *names.local_size)), 1),
    **dict.fromkeys(("FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE"), 1),
    **dict.fromkeys(("LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "PMIX_RANK", "PALS_RANKID"), 0),
    **dict.fromkeys(("FLUX_TASK_RANK", "JSM_NAMESPACE_RANK"), 0),
    **dict.fromkeys((name for names in MPI for name in (names.rank, *names.local_rank)), 0),
}


def enter_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts what srun or MPI say into the variables that torch reads; those of deepspeed and torchrun win.

    A process that is alone takes the first GPU that it sees, and all cores; several on this host share the cores.

    Raises:
        ConfigError: this process is one of several, but its rank or their meeting place is not set.
    """
    if environment.get("RANK"):
        try:
            _complete(environment)
        except ConfigError:
            environment.pop("RANK")  # else all but rank 0 would leave the error to rank 0
            raise
        ranks_here = _first_number(environment, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
        _share_cores(environment, ranks_here, len(os.sched_getaffinity(0)))
    else:
        _take_place(environment)
    # DeepSpeed insists that Open MPI's variable equals LOCAL_RANK. It does not where mpirun has started torchrun, or
    # where Slurm shows each task one GPU.
    if environment.get("OMPI_COMM_WORLD_LOCAL_RANK"):
        environment["OMPI_COMM_WORLD_LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")


def _take_place(environment: MutableMapping[str, str]) -> None:
    """Sets torch's variables from what srun or MPI say, where RANK is not set."""
    environment.pop("RANK", None)  # empty
    place = _mpi_place(environment) or _slurm_place(environment)
    if place is None or place.world_size == 1:
        _refuse_one_of_several(environment)
        _warn_of_unused_tasks(environment)
        environment.pop("LOCAL_RANK", None)
        return
    local_rank, local_size = place.local_rank, place.local_size
    if _has_its_own_gpu(environment, local_size):
        local_rank, local_size = 0, 1
    environment.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(local_rank))
    if local_size is not None:
        environment["LOCAL_WORLD_SIZE"] = str(local_size)
    cores = _count(environment.get("SLURM_CPUS_ON_NODE", "")) or os.cpu_count() or 1
    _share_cores(environment, place.local_size, cores)
    _set_meeting_place(place, environment)
    if place.rank == 0:
        where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        say(f"{place.launcher}: {place.world_size} ranks, which meet at {where}")
        _warn_of_idle_gpus(place, environment)


def _share_cores(environment: MutableMapping[str, str], ranks_here: int | None, cores: int) -> None:
    """Sets OMP_NUM_THREADS where nobody has: else each of several ranks on this host starts a thread per core.

    torch and DeepSpeed's Adam on the CPU read it when they are imported, which is later.

    Args:
        cores: cores of all ranks here together; srun and mpirun may have bound this one to some of them.
    """
    if ranks_here and ranks_here > 1 and not environment.get("OMP_NUM_THREADS"):
        share = min(cores // ranks_here, len(os.sched_getaffinity(0)))
        environment["OMP_NUM_THREADS"] = str(max(share, 1))


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: `node[03-05,07],gpu1` -> `node03`; empty for an empty list."""
    first, *_ = re.split(r",(?![^\[]*\])", nodelist)  # at commas outside of brackets
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _complete(environment: MutableMapping[str, str]) -> None:
    """Checks what deepspeed or torchrun have set; a rank that is alone needs no meeting place."""
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if rank is None or world_size is None:
        raise ConfigError([f"RANK is {rank} but WORLD_SIZE is not set; {HOW}"])
    if not rank < world_size:
        raise ConfigError([f"RANK is {rank} but WORLD_SIZE is {world_size}; ranks count from 0; {HOW}"])
    _number(environment, "MASTER_PORT")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and world_size > 1:
        raise ConfigError([f"RANK is {rank} of {world_size} but {' and '.join(missing)} is not set; {HOW}"])
    if missing:
        for name in ("RANK", "LOCAL_RANK"):  # alone
            environment.pop(name, None)
        return
    environment.setdefault("LOCAL_RANK", "0")
    _number(environment, "LOCAL_RANK")


def _mpi_place(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher of MPI gave this process; None without one."""
    for names in MPI:
        size, rank = _number(environment, names.size), _number(environment, names.rank)
        if size is None or rank is None:
            continue
        slurm = _slurm_place(environment)
        if slurm is not None and (slurm.rank, slurm.world_size) == (rank, size):
            return slurm  # srun speaks PMI too, and knows more
        if size == 1:
            return Place(names.launcher, 0, 1, 0)
        local_rank = _first_number(environment, names.local_rank)
        if local_rank is None:
            raise ConfigError([f"{names.rank} is {rank} of {size} but {names.local_rank[0]} is not set; {HOW}"])
        job = next((environment[name] for name in names.job if environment.get(name)), None)
        # mpirun in a job of Slurm puts rank 0 on the job's first host.
        hosts = environment.get("SLURM_JOB_NODELIST", "")
        local_size = _first_number(environment, names.local_size)
        return Place(names.launcher, rank, size, local_rank, local_size, first_host(hosts) or None, job=job)
    return None


def is_step(environment: Mapping[str, str]) -> bool:
    """True inside of a step of srun's; False in the batch script and in salloc's shell."""
    step = _count(environment.get("SLURM_STEP_ID", ""))
    return step is not None and step < FIRST_SPECIAL_STEP


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    """The place of a task of srun; None in the batch script, in salloc's shell, and without Slurm."""
    if not is_step(environment):
        return None
    size = _first_number(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")) or 1
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    if size == 1:
        return Place("srun", 0, 1, 0)
    if rank is None or local_rank is None:
        raise ConfigError([f"Slurm's step has {size} tasks but SLURM_PROCID or SLURM_LOCALID is not set; {HOW}"])
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    return Place(
        "srun",
        rank,
        size,
        local_rank,
        local_size=_tasks_here(environment),
        # Where the user has laid out the tasks himself, rank 0 may be anywhere.
        first_host=None if environment.get("SLURM_DISTRIBUTION") == "arbitrary" else first_host(hosts) or None,
        num_hosts=_first_number(environment, ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")),
        job=f"{environment.get('SLURM_JOB_ID', '')}.{environment['SLURM_STEP_ID']}",
    )


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """The number of tasks on this node, from a list like `4(x2),3`; None where it does not say."""
    node = _number(environment, "SLURM_NODEID")
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if node is None:
        return None
    for tasks, nodes in counts:
        if node < int(nodes or 1):
            return int(tasks)
        node -= int(nodes or 1)
    return None


def _set_meeting_place(place: Place, environment: MutableMapping[str, str]) -> None:
    """Sets MASTER_ADDR and MASTER_PORT, unless they are set; the port is the same for all ranks of a job.

    Raises:
        ConfigError: nothing says where rank 0 is.
    """
    on_one_host = place.num_hosts == 1 or place.local_size == place.world_size
    if not environment.get("MASTER_ADDR"):
        address = "127.0.0.1" if on_one_host else place.first_host
        if address is None:
            started = (
                f"{place.launcher} has started {place.world_size} ranks on several hosts but MASTER_ADDR is not set"
            )
            how = "mpirun -x MASTER_ADDR=…, mpiexec -genv MASTER_ADDR …, export before srun"
            raise ConfigError([f"{started}; set it to the host of rank 0 ({how})"])
        environment["MASTER_ADDR"] = address
    elif not on_one_host and environment["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1"):
        given = f"MASTER_ADDR is {environment['MASTER_ADDR']} but the ranks are on several hosts"
        raise ConfigError([f"{given}; set it to the host of rank 0, or leave it out"])
    if not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(port_of_job(place.job))


def port_of_job(job: str | None) -> int:
    """The port where the ranks of a job meet, so chosen that jobs on one host rarely have the same."""
    if job is None:
        return DEFAULT_PORT
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def _refuse_one_of_several(environment: Mapping[str, str]) -> None:
    """Raises ConfigError where a variable says that there are other ranks."""
    for name, most in SIGNS_OF_OTHERS.items():
        if (value := _count(environment.get(name, ""))) is not None and value > most:
            raise ConfigError([f"{name} is {value} but RANK is not set; {HOW}, or unset {name} to run one alone"])


def _warn_of_unused_tasks(environment: Mapping[str, str]) -> None:
    """Says that srun was forgotten in a batch script."""
    tasks = _count(environment.get("SLURM_NTASKS", "")) or 0
    in_a_step = bool(environment.get("SLURM_STEP_NUM_TASKS"))
    if environment.get("SLURM_JOB_ID") and not in_a_step and tasks > 1:
        say(f"WARNING: Slurm has given this job {tasks} tasks, and this is one process alone; srun starts all of them")


def _warn_of_idle_gpus(place: Place, environment: Mapping[str, str]) -> None:
    """Says that Slurm gave this node more GPUs than tasks."""
    gpus = _count(environment.get("SLURM_GPUS_ON_NODE", "")) or 0
    if place.local_size and gpus > place.local_size:
        say(
            f"WARNING: {gpus} GPUs a node and {place.local_size} of srun's tasks: the other GPUs stand idle; give "
            f"srun --ntasks-per-node={gpus}, or start launch/torchrun.sh with --ntasks-per-node=1"
        )


def _has_its_own_gpu(environment: Mapping[str, str], local_size: int | None) -> bool:
    """True where Slurm shows this task one GPU of the node's several (--gpus-per-task, --gpu-bind), as number 0."""
    shown = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    gpus = _count(environment.get("SLURM_GPUS_ON_NODE", "")) or 0
    several = gpus >= (local_size or 1) > 1
    return len(shown) == 1 and (several or bool(environment.get("SLURM_GPUS_PER_TASK")))


def _first_number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """The number in the first of these variables that is set."""
    return next((value for name in names if (value := _number(environment, name)) is not None), None)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The number in a variable; None where it is not set. Raises ConfigError for anything else."""
    text = environment.get(name, "")
    if text and (count := _count(text)) is None:
        raise ConfigError([f"{name} is {shown(text)}, expected a number; {HOW}"])
    return count if text else None


def _count(text: str) -> int | None:
    """The number that at most 18 digits say; None for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
