"""For all tests of the sinks."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """The W&B account of whoever runs the tests must not be found, nor used; nor this process's W&B by a later one."""
    for name in wandb_variables():
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    yield
    for name in wandb_variables():  # wandb puts its service's socket there, for child processes
        del os.environ[name]


def wandb_variables() -> list[str]:
    return [name for name in os.environ if name.startswith("WANDB_")]
