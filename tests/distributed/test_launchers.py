"""The command that goes on with a run, by whatever started it."""

import pytest

from higgs_ds.distributed import launchers
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
    ],
)
def test_what_one_command_started_on_several_is_not_gone_on_with_by_a_part_of_them(
    launcher, environment, kind, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["train_ds.py", "--local_rank=1", *NEEDED, "--resume"])
    monkeypatch.setattr(launchers, "_words_of", lambda pid: launcher)
    command = resume_command([(2, 1)] if launcher else [], environment)
    assert command == f"the same {kind} command, with: train_ds.py {' '.join(NEEDED)} --resume auto"


@pytest.mark.parametrize(
    ("launcher", "environment", "command"),
    [
        (TORCHRUN, {"WORLD_SIZE": "2"}, " ".join(TORCHRUN)),
        (TORCHRUN, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, " ".join(TORCHRUN)),
        (TORCHRUN, {"SLURM_STEP_ID": "4294967291", "SLURM_NTASKS": "8"}, " ".join(TORCHRUN)),  # in a batch script
        ([], {"WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ([], {"WORLD_SIZE": "2", "RANK": "0"}, None),  # whoever set these does so again
    ],
)
def test_what_was_typed_here_is_named_as_it_was_typed(launcher, environment, command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_ds.py", *NEEDED])
    monkeypatch.setattr(launchers, "_words_of", lambda pid: launcher)
    typed = command or f"python train_ds.py {' '.join(NEEDED)}"
    assert resume_command([(2, 1)] if launcher else [], environment) == f"{typed} --resume auto"
