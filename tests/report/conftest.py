"""For all tests of the sinks."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_wandb_account(monkeypatch, tmp_path):
    """The W&B account of whoever runs the tests must not be found, nor used."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
