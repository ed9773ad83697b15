"""Types of the paths of `generate`, `recite`, `merge` and `export` for argparse: any that a file system may know.

Only an empty word is refused here, which pathlib takes for the working folder. What else is wrong with a path is said
by whoever opens it, in one line; `parse.path_flag`, of files that a run is to be written to, is stricter.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def name(text: str) -> str:
    """A folder, a file or a hub id. Raises ArgumentTypeError for an empty word."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave it out")
    return text


def path(text: str) -> Path:
    """A file or a folder. Raises ArgumentTypeError for an empty word."""
    return Path(name(text))
