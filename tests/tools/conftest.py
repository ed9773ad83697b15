"""Fixtures to run verbs as from the command line."""

from __future__ import annotations

import pytest

from higgs_ds.model.higgs_v2 import speaker as speaking
from higgs_ds.tools.cli import main


@pytest.fixture
def said(capsys):
    """Runs a verb; returns its exit code and printed lines."""

    def run(*words) -> tuple[int, list[str]]:
        capsys.readouterr()
        try:
            code = main([*map(str, words)])
        except SystemExit as end:  # argparse
            code = end.code
        printed = capsys.readouterr()
        return code, (printed.out + printed.err).strip().splitlines()

    return run


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fails if a checkpoint or a recogniser is loaded."""

    def loaded(*_, **__):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(speaking, "load_checkpoint", loaded)
    monkeypatch.setattr("faster_whisper.WhisperModel", loaded)
