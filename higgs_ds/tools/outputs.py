"""Folders that the tools write to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import ConfigError, words_of
from ..files import check_writable


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns an error of the disk into one ConfigError; `what` is the flag with its file or folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk is either one
        raise ConfigError([f"{what} cannot be written: {words_of(error)}"]) from error


def writable_folder(folder: Path) -> None:
    """Creates `--output_dir` if needed. Raises ConfigError if files cannot be written there."""
    with writing(f"--output_dir: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)


def empty_place(folder: Path) -> Path:
    """The whole path of `--output_dir`, links followed. Raises ConfigError unless it is new or an empty folder."""
    with writing(f"--output_dir: {folder}"):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError([f"--output_dir: {folder} exists; it is not overwritten"])
        if folder.is_symlink() and not folder.exists():
            raise ConfigError([f"--output_dir: {folder} is a broken link; name another folder"])
        return folder.resolve()
