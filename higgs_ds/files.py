"""Atomic writes: to a temporary file beside the target, synced, then renamed."""

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

# Bytes of a name kept in its temporary name, so that this stays within 255.
_STEM_BYTES = 220


def _stem(path: Path) -> str:
    return os.fsencode(path.name)[:_STEM_BYTES].decode("utf-8", "ignore")


def name_beside(path: Path) -> Path:
    """The temporary name used by `replacing`; random, since process ids of two hosts may be equal."""
    return path.with_name(f".{_stem(path)}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """Gives a temporary path for a file or folder, which replaces `path` at the end of the block.

    If the block raises, `path` is unchanged and the temporary path is removed. Content is synced before the rename, so
    that a machine crash leaves the old or the new version. With `synced=False`, for thousands of files that can be
    recreated, this holds for a crash of the process only.
    """
    path = Path(path)
    beside = name_beside(path)
    _remove(beside)
    try:
        yield beside
        for file in (p for p in (beside, *sorted(beside.rglob("*"))) if synced and p.is_file()):
            sync(file)
        if beside.is_dir() and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # os.replace cannot replace a folder that has content
        os.replace(beside, path)
    finally:
        _remove(beside)


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder, whose content fills the new or empty `folder` at the end of the block.

    A new `folder` appears in one step. An existing one is filled file by file, config.json last, as it may be a mount
    point or a shell's working directory. If the block raises, nothing is left. Raises OSError.
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
    """Removes temporary files of `replacing` left by a killed process; only for the sole writer of `path`."""
    made = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9]+-[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for left in [left for left in path.parent.iterdir() if made.fullmatch(left.name)]:
            _remove(left)


def first_free(path: Path) -> Path:
    """`path` if unused, even by a broken link; else the first unused of `path-1`, `path-2`, … ."""
    names = (path.name + (f"-{n}" if n else "") for n in itertools.count())
    return next(place for name in names if not os.path.lexists(place := path.with_name(name)))


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically. Raises OSError."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Creates and removes a file in an existing folder. Raises OSError."""
    probe = folder / f".writable-{os.getpid()}-{secrets.token_hex(4)}"  # process ids of two hosts may be equal
    probe.touch()
    probe.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Syncs a file or a folder's entries to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(*folders: Path) -> None:
    """Syncs folders' entries to disk; a file system that does not support it is reported once.

    Without it, only a machine crash within the next seconds may lose what was written.
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
    say(f"WARNING: {folder} cannot be synced to disk ({reason}); this file system syncs by itself")


def stamp(path: Path) -> tuple[int, int, int]:
    """A file's size, mtime and ctime in nanoseconds: equal on all hosts that share it, different for every copy.

    A copy cannot keep the ctime. Raises OSError.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def sha256(*paths: Path) -> str:
    """SHA-256 of the files' concatenated content, in hex. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
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
    """Turns a disk error into a ConfigError; `what` is the flag with its file or folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk raises either
        raise ConfigError([f"{what} cannot be written: {words_of(error)}"]) from error
