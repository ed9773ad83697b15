"""The command that goes on with a run, by whatever started it."""

from types import SimpleNamespace

import pytest

from higgs_ds.distributed.launchers import resume_command
from higgs_ds.options.parse import parse_args

NEEDED = ["--train_manifest", "train.json", "--output_dir", "out"]


@pytest.mark.parametrize(
    "given",
    ["", "--resume", "--resume=out/x", "--resume_from_checkpoint a/b"],
)
def test_the_command_that_goes_on_says_so_once(given, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_ds.py", *given.split(), *NEEDED])
    command = resume_command([], {})
    assert command == f"python train_ds.py {' '.join(NEEDED)} --resume auto"
    assert parse_args(command.split()[2:]).run.resume == "auto"


SRUN = {"WORLD_SIZE": "8", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}
NODE = ["/venv/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "train_ds.py", *NEEDED]
TORCHRUN = ["/venv/bin/python", "/venv/bin/torchrun", "--nproc_per_node", "2", "train_ds.py", *NEEDED]


@pytest.mark.parametrize(
    ("launcher", "environment", "kind"),
    [
        ([], SRUN, "sbatch or srun"),
        ([], {"WORLD_SIZE": "8", "OMPI_COMM_WORLD_SIZE": "8"}, "mpirun"),
        ([], {"WORLD_SIZE": "8", "PMI_SIZE": "8"}, "mpiexec"),
        (NODE, {"WORLD_SIZE": "8"}, "launch/multi_node.sh (or deepspeed --hostfile)"),
        (TORCHRUN, SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, "sbatch or srun"),
        # What was typed here is named as it was typed.
        (TORCHRUN, {"WORLD_SIZE": "2"}, None),
        (TORCHRUN, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (TORCHRUN, {"SLURM_STEP_ID": "4294967291", "SLURM_NTASKS": "8"}, None),  # in a batch script
        ([], {"WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ([], {"WORLD_SIZE": "2", "RANK": "0"}, None),  # whoever set these does so again
    ],
)
def test_what_one_command_started_on_several_is_not_gone_on_with_by_a_part_of_them(
    launcher, environment, kind, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["train_ds.py", *NEEDED, "--resume"])
    command = resume_command([SimpleNamespace(cmdline=lambda: launcher)] if launcher else [], environment)
    typed = " ".join(launcher or ["python", "train_ds.py", *NEEDED])
    typed = f"the same {kind} command, with: train_ds.py {' '.join(NEEDED)}" if kind else typed
    assert command == f"{typed} --resume auto"
