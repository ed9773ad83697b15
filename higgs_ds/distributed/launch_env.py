"""What started this process, read from its environment: which of how many ranks it is, and where they meet.

DeepSpeed's launcher and torchrun say so in the variables that torch reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT. srun and the launchers of MPI have variables of their own, which are put into those here. A process that is
evidently one of several and cannot know which is refused: left alone it would train a world of its own, in the folder
of the others. Imported before torch, which it must not import.
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
HOW = "start it with deepspeed, torchrun, srun or mpirun (docs/many-machines.md)"
MOST = 2**32 - 1  # of what a launcher counts, Slurm's numbers for special steps included
# Slurm's numbers for what is no step of srun's: the batch script, the shell of salloc, …
FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process."""

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
    """The variables of one kind of MPI launcher; the first that is set counts."""

    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...] = ()


MPI = (
    MpiNames(
        "mpirun (Open MPI)",
        *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        *(("OMPI_COMM_WORLD_LOCAL_RANK",), ("OMPI_COMM_WORLD_LOCAL_SIZE",)),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    MpiNames(
        "mpirun (MVAPICH)",
        *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
        *(("MV2_COMM_WORLD_LOCAL_RANK",), ("MV2_COMM_WORLD_LOCAL_SIZE",)),
    ),
    MpiNames(
        "mpiexec (PMI)",
        *("PMI_RANK", "PMI_SIZE"),
        *(("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")),
    ),
)


# Variables that say that there are others, where they are above this. Of sizes, only what no process alone has: a batch
# script has the job's SLURM_NTASKS, and SLURM_PROCID 0.
SIGNS_OF_OTHERS = {
    **dict.fromkeys(("WORLD_SIZE", "CROSS_SIZE", "LOCAL_WORLD_SIZE", "PET_NNODES", "PET_NPROC_PER_NODE"), 1),
    **dict.fromkeys((name for names in MPI for name in names.local_size), 1),
    **dict.fromkeys(("FLUX_JOB_SIZE", "JSM_NAMESPACE_SIZE"), 1),
    **dict.fromkeys(("LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "PMIX_RANK", "PALS_RANKID"), 0),
    **dict.fromkeys(("FLUX_TASK_RANK", "JSM_NAMESPACE_RANK"), 0),
    **dict.fromkeys((name for names in MPI for name in (names.rank, *names.local_rank)), 0),
}


def enter_launch(environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts what srun or MPI say into the variables that torch reads; those of deepspeed and torchrun win.

    A process of its own takes the first GPU that it sees, and all cores; several on this host share those.

    Raises:
        ConfigError: this process is one of several and cannot know which, or where they meet.
    """
    if environment.get("RANK"):
        try:
            _complete(environment)
        except ConfigError:
            environment.pop("RANK")  # as which it would keep silent: rank 0 speaks for all, of what all know
            raise
        ranks_here = _first_number(environment, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
        _share_cores(environment, ranks_here, len(os.sched_getaffinity(0)))
    else:
        _take_place(environment)
    # DeepSpeed holds Open MPI's against LOCAL_RANK. It is another one where mpirun has started torchrun, or Slurm shows
    # each task one GPU.
    if environment.get("OMPI_COMM_WORLD_LOCAL_RANK"):
        environment["OMPI_COMM_WORLD_LOCAL_RANK"] = environment.get("LOCAL_RANK", "0")


def _take_place(environment: MutableMapping[str, str]) -> None:
    """Without RANK: what srun or MPI say."""
    environment.pop("RANK", None)  # empty
    place = _mpi_place(environment) or _slurm_place(environment)
    if place is None or place.world_size == 1:
        _refuse_one_of_several(environment)
        _warn_of_unused_tasks(environment)
        environment.pop("LOCAL_RANK", None)
        return
    if not place.rank < place.world_size:
        raise ConfigError([f"{place.launcher}: rank {place.rank} of {place.world_size} ranks cannot be; {HOW}"])
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
    """OMP_NUM_THREADS, where nobody has set it: else each of several ranks on this host starts a thread a core.

    torch and DeepSpeed's Adam on the CPU read it when they are loaded, which is later.

    Args:
        cores: that all ranks here have together; srun and mpirun may have bound this one to some of them.
    """
    if ranks_here and ranks_here > 1 and not environment.get("OMP_NUM_THREADS"):
        share = min(cores // ranks_here, len(os.sched_getaffinity(0)))
        environment["OMP_NUM_THREADS"] = str(max(share, 1))


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: `node[03-05,07],gpu1` -> `node03`; empty for an empty list."""
    depth, end = 0, len(nodelist)
    for at, sign in enumerate(nodelist):
        depth += {"[": 1, "]": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            end = at
            break
    return re.sub(r"\[\s*([^\],-]*)[^\]]*\]", r"\1", nodelist[:end]).strip()


def _complete(environment: MutableMapping[str, str]) -> None:
    """What deepspeed or torchrun have said, checked; a rank that is alone needs no more than that."""
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if world_size is None:
        raise ConfigError([f"RANK is {rank}, but WORLD_SIZE is not set; {HOW}"])
    if not rank < world_size:
        raise ConfigError([f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks count from 0; {HOW}"])
    _number(environment, "MASTER_PORT")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and world_size > 1:
        raise ConfigError([f"RANK is {rank} of {world_size}, but {' and '.join(missing)} is not set; {HOW}"])
    if missing:
        for name in ("RANK", "LOCAL_RANK"):  # alone: it meets nobody
            environment.pop(name, None)
        return
    environment.setdefault("LOCAL_RANK", "0")
    _number(environment, "LOCAL_RANK")


def _mpi_place(environment: Mapping[str, str]) -> Place | None:
    for names in MPI:
        size, rank = _number(environment, names.size), _number(environment, names.rank)
        if size is None and rank is None:
            continue
        slurm = _slurm_place(environment)
        if slurm is not None and (slurm.rank, slurm.world_size) == (rank, size):
            return slurm  # srun speaks PMI too, and knows more
        if size is None or (rank is None and size > 1):
            known, unknown = (names.rank, names.size) if size is None else (names.size, names.rank)
            raise ConfigError([f"{known} is {environment[known]}, but {unknown} is not set; {HOW}"])
        if size == 1:
            return Place(names.launcher, 0, 1, 0)
        local_rank = _first_number(environment, names.local_rank)
        if local_rank is None:
            raise ConfigError([f"{names.rank} is {rank} of {size}, but {names.local_rank[0]} is not set; {HOW}"])
        job = next((environment[name] for name in names.job if environment.get(name)), None)
        # mpirun in a job of Slurm puts rank 0 on the job's first host.
        hosts = environment.get("SLURM_JOB_NODELIST", "")
        local_size = _first_number(environment, names.local_size)
        return Place(names.launcher, rank, size, local_rank, local_size, first_host(hosts) or None, job=job)
    return None


def is_step(environment: Mapping[str, str]) -> bool:
    """Whether this is inside of a step of srun's, and not in the batch script or salloc's shell."""
    step = _count(environment.get("SLURM_STEP_ID", ""))
    return step is not None and step < FIRST_SPECIAL_STEP


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    """As a task of srun; None in the batch script, in salloc's shell, and without Slurm."""
    step = _number(environment, "SLURM_STEP_ID")
    if step is None or not is_step(environment):
        return None
    size = _first_number(environment, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    if size is None or size == 1:
        return Place("srun", 0, 1, 0)
    if rank is None or local_rank is None:
        missing = "SLURM_PROCID" if rank is None else "SLURM_LOCALID"
        raise ConfigError([f"Slurm's step has {size} tasks, but {missing} is not set; {HOW}"])
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
        job=f"{environment.get('SLURM_JOB_ID', '')}.{step}",
    )


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """Of a list like `4(x2),3`, what stands for this node; None where nothing does."""
    node = _number(environment, "SLURM_NODEID")
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(",") if node is not None else ():
        if found := re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part.strip()):
            if node < (nodes := int(found[2] or 1)):
                return int(found[1])
            node -= nodes
    return None


def _set_meeting_place(place: Place, environment: MutableMapping[str, str]) -> None:
    """MASTER_ADDR and MASTER_PORT, unless they are given; the port is the same for all ranks of a job.

    Raises:
        ConfigError: nothing says where rank 0 is.
    """
    on_one_host = place.num_hosts == 1 or place.local_size == place.world_size
    if not environment.get("MASTER_ADDR"):
        address = "127.0.0.1" if on_one_host else place.first_host
        if address is None:
            raise ConfigError(
                [
                    f"{place.launcher} has started {place.world_size} ranks on several hosts, and does not say where "
                    "rank 0 is: set MASTER_ADDR to that host on all of them (mpirun -x MASTER_ADDR=…, mpiexec -genv "
                    "MASTER_ADDR …, export before srun)"
                ]
            )
        environment["MASTER_ADDR"] = address
    elif not on_one_host and environment["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            [
                f"MASTER_ADDR is {environment['MASTER_ADDR']}, which is another host on each of them; "
                "set it to the host of rank 0, or leave it out"
            ]
        )
    if not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(port_of_job(place.job))


def port_of_job(job: str | None) -> int:
    """Where the ranks of a job meet, so that jobs on one host rarely choose the same."""
    if job is None:
        return DEFAULT_PORT
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def _refuse_one_of_several(environment: Mapping[str, str]) -> None:
    for name, most in SIGNS_OF_OTHERS.items():
        if (value := _count(environment.get(name, ""))) is not None and value > most:
            raise ConfigError(
                [
                    f"{name} is {value}, but RANK is not set: this process is one of several and cannot know which; "
                    f"{HOW}, or unset {name} to run one alone"
                ]
            )


def _warn_of_unused_tasks(environment: Mapping[str, str]) -> None:
    tasks = _count(environment.get("SLURM_NTASKS", "")) or 0
    in_a_step = bool(environment.get("SLURM_STEP_NUM_TASKS"))
    if environment.get("SLURM_JOB_ID") and not in_a_step and tasks > 1:
        say(f"WARNING: Slurm has given this job {tasks} tasks, and this is one process alone; srun starts all of them")


def _warn_of_idle_gpus(place: Place, environment: Mapping[str, str]) -> None:
    gpus = _count(environment.get("SLURM_GPUS_ON_NODE", "")) or 0
    if place.local_size and gpus > place.local_size:
        say(
            f"WARNING: {gpus} GPUs a node and {place.local_size} of srun's tasks: the other GPUs stand idle; give "
            f"srun --ntasks-per-node={gpus}, or start launch/torchrun.sh with --ntasks-per-node=1"
        )


def _has_its_own_gpu(environment: Mapping[str, str], local_size: int | None) -> bool:
    """Whether Slurm shows this task one GPU of the node's several (--gpus-per-task, --gpu-bind), as number 0."""
    shown = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    gpus = _count(environment.get("SLURM_GPUS_ON_NODE", "")) or 0
    several = gpus >= (local_size or 1) > 1
    return len(shown) == 1 and (several or bool(environment.get("SLURM_GPUS_PER_TASK")))


def _first_number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if (value := _number(environment, name)) is not None), None)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The count in a variable; None where it is not set. Raises ConfigError for anything else."""
    text = environment.get(name, "")
    if not text:
        return None
    if (count := _count(text)) is None or count > MOST:
        raise ConfigError([f"{name} is {shown(text)}, no number from 0 to {MOST}; {HOW}"])
    return count


def _count(text: str) -> int | None:
    """The whole number that digits say; None for anything else. Python reads no more than some thousand of them."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(MOST)) else MOST + 1
