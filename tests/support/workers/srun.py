"""Stands for Slurm's srun: `srun [OPTION…] PYTHON train_ds.py FLAG…` as two tasks on this node, which are forked.

Hands on signals and ends with the highest code of its tasks, as srun does. SRUN_PATCH in the environment names what is
done to each of them first, see patches.py.
"""

import json
import os
import signal
import sys

from higgs_ds.process import end_process
from tests.support.workers import forks

TASKS = 2


def task(number: int, flags: list[str]) -> int:
    for name in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    os.environ.update(
        SLURM_STEP_ID="0",
        SLURM_STEP_NUM_TASKS=str(TASKS),
        SLURM_STEP_NUM_NODES="1",
        SLURM_STEP_NODELIST="node01",
        SLURM_STEP_TASKS_PER_NODE=str(TASKS),
        SLURM_NODEID="0",
        SLURM_PROCID=str(number),
        SLURM_LOCALID=str(number),
    )
    if patch := json.loads(os.environ.get("SRUN_PATCH", "null")):
        getattr(forks.patches, patch[0])(*patch[1:])
    return forks.train_ds.main(flags)


def main(words: list[str]) -> int:
    flags = words[words.index("train_ds.py") + 1 :]
    import deepspeed  # noqa: F401 - once for all

    tasks: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: [os.kill(pid, number) for pid in tasks])
    for number in range(TASKS):
        pid = os.fork()
        if pid == 0:
            end_process(task(number, flags))
        tasks.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) % 256 for pid in tasks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
