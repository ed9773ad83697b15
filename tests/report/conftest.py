"""For all tests of the sinks."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """Hides the user's W&B account from the tests, and this process's W&B service from later processes."""
    for name in wandb_variables():
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    yield
    for name in wandb_variables():  # wandb stores its service's socket there, for child processes
        del os.environ[name]


def wandb_variables() -> list[str]:
    return [name for name in os.environ if name.startswith("WANDB_")]
