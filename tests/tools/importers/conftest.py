"""Clips to import, which nothing decodes."""

import pytest


@pytest.fixture
def clips(tmp_path):
    """A folder with the clips a.wav to e.wav, each with a text beside it."""
    for name in "abcde":
        (tmp_path / f"{name}.wav").write_bytes(b"RIFF")
        (tmp_path / f"{name}.txt").write_text(f"Text {name}.\n")
    return tmp_path
