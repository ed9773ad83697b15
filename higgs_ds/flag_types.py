"""What argparse makes of a flag's words: an empty one is no name, though pathlib takes it for the working folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def name(text: str) -> str:
    """A folder, a file or a hub id. Raises ArgumentTypeError for an empty word."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a value, or leave it out")
    return text


def path(text: str) -> Path:
    """A file or a folder. Raises ArgumentTypeError for an empty word."""
    return Path(name(text))
