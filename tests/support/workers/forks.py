"""Imports everything once, then forks ranks of `train_ds.py`, or of `check`, on request: a start costs 1 s, not 10.

Reads one JSON object a line: {"start": [FLAG…], "env": {…}, "output": FILE, "patch": [NAME, ARGUMENT…] or null} answers
the process id, {"poll": PID} its return code (negative for a signal) or null. `patch` names a function of
`tests/support/workers/patches.py` that is called in the rank before it runs.
"""

import json
import os
import sys

import torch
import transformers.integrations  # noqa: F401

import train_ds
from higgs_ds import run  # noqa: F401
from higgs_ds.codec import sample  # noqa: F401
from higgs_ds.process import end_process
from higgs_ds.report import tracking  # noqa: F401
from higgs_ds.tools import cli
from tests.support.workers import patches

torch.set_num_threads(1)


def rank(order: dict) -> int:
    """In the forked process: everything that a fresh `python train_ds.py` does after its imports."""
    os.setpgid(0, 0)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in ((0, nothing), (1, output), (2, output)):
        os.dup2(file, number)
    os.environ.update(order["env"])
    if order["patch"]:
        name, *arguments = order["patch"]
        getattr(patches, name)(*arguments)
    flags = order["start"]
    return cli.main(flags) if flags[0] == "check" else train_ds.main(flags)


def main() -> int:
    import deepspeed  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    codes: dict[int, int] = {}
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "start" in order:
            pid = os.fork()
            if pid == 0:
                answers.close()
                end_process(rank(order))
            print(pid, file=answers)
            continue
        pid = order["poll"]
        if pid not in codes:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps(codes.get(pid)), file=answers)
    return 0


if __name__ == "__main__":
    end_process(main())
