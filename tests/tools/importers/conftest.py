"""Clips to import without decoding."""

import pytest


@pytest.fixture
def clips(tmp_path):
    """A folder with clips a.wav to e.wav and a text file beside each."""
    for name in "abcde":
        (tmp_path / f"{name}.wav").write_bytes(b"RIFF")
        (tmp_path / f"{name}.txt").write_text(f"Text {name}.\n")
    return tmp_path
