"""Atomic writes: to a temporary file beside the target, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import ConfigError, reason_of, words_of
from .process import say

# Bytes of a name that are kept of it in the name beside, so that this too is no longer than 255.
_STEM_BYTES = 220


def _stem(path: Path) -> str:
    return os.fsencode(path.name)[:_STEM_BYTES].decode("utf-8", "ignore")


def name_beside(path: Path) -> Path:
    """The name that `replacing` writes to: this process's alone, as the ids of two hosts' processes may be equal."""
    return path.with_name(f".{_stem(path)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to, which takes the place of `path` once the block is through.

    A block that raises leaves `path` as it was, and nothing beside it. The file's content is on the disk before it is
    renamed: a crash of the machine leaves the one or the other, never an empty file. Not `synced`, for files by the
    thousand that can be made again, only a crash of the process does.
    """
    path = Path(path)
    beside = name_beside(path)
    _remove(beside)
    try:
        yield beside
        for file in (p for p in (beside, *sorted(beside.rglob("*"))) if synced and p.is_file()):
            sync(file)
        if beside.is_dir() and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # a folder cannot be replaced in one call; by a file it is not replaced at all
        os.replace(beside, path)
    finally:
        _remove(beside)


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose content is that of `folder`, which is not there or empty, once the block is through.

    A new `folder` appears in one step. One that is there is filled from within, its config.json last: it may be the
    root of a disk, or where a shell stands. A block that raises leaves nothing. Raises OSError.
    """
    is_there = folder.is_dir()
    beside = name_beside(folder / folder.name if is_there else folder)
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in (p for p in sorted(beside.rglob("*")) if p.is_file()):
            sync(file)
        if not is_there:
            os.replace(beside, folder)
            return
        for file in sorted(beside.iterdir(), key=lambda file: (file.name.endswith("config.json"), file.name)):
            os.replace(file, folder / file.name)
    finally:
        _remove(beside)


def remove_leftovers(path: Path) -> None:
    """Removes what `replacing` was writing of `path` in a killed process; for whoever alone writes there."""
    made = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9]+-[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for left in [left for left in path.parent.iterdir() if made.fullmatch(left.name)]:
            _remove(left)


def first_free(path: Path) -> Path:
    """`path` where nothing has that name, not even a link to nowhere; else the first of `path-1`, `path-2`, … ."""
    names = (path.name + (f"-{n}" if n else "") for n in itertools.count())
    return next(place for name in names if not os.path.lexists(place := path.with_name(name)))


def write_text(path: Path, text: str) -> None:
    """Writes a file, UTF-8, never half of it. Raises OSError."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Writes a file into a folder that is there, and removes it. Raises OSError."""
    probe = folder / f".writable-{os.getpid()}-{secrets.token_hex(4)}"  # process ids of two hosts may be equal
    probe.touch()
    probe.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Brings a file, or a folder's list of names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(*folders: Path) -> None:
    """Brings the folders' lists of names to the disk, where the file system has that; says it once where it has not.

    What was written stands all the same: a crash of the whole machine within the next seconds may lose it.
    """
    for folder in folders:
        try:
            sync(folder)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise
            _say_unsynced(folder, reason_of(error))


@functools.cache
def _say_unsynced(folder: Path, reason: str) -> None:
    say(f"WARNING: {folder} cannot be brought to the disk at once ({reason}): this file system does it by itself")


def stamp(path: Path) -> tuple[int, int, int]:
    """A file's size and times of change, in nanoseconds: the same for all hosts that share it, another for every copy.

    No copy has the time at which the system itself noted the last change. Raises OSError.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def sha256(path: Path) -> str:
    """Of a file's content, in hex. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns an error of the disk into one ConfigError; `what` is the flag with its file or folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk is either one
        raise ConfigError([f"{what} cannot be written: {words_of(error)}"]) from error
