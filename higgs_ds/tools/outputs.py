"""Checks of the tools' output folders."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..files import check_writable, writing


def writable_folder(folder: Path) -> None:
    """Creates `--output_dir` if needed. Raises ConfigError if files cannot be written there."""
    with writing(f"--output_dir: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)


def empty_place(folder: Path) -> Path:
    """Resolves the path of `--output_dir`. Raises ConfigError unless it is new or an empty folder."""
    with writing(f"--output_dir: {folder}"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError([f"--output_dir: {folder} exists; it is not overwritten"])
        return folder.resolve()
