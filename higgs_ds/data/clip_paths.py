"""Places of a manifest's clips: beside it, else under `--audio_root` or the working folder."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..errors import reason_of

URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
MISSING = "does not exist"


class ClipPaths:
    """Turns what a row says into an absolute path."""

    def __init__(self, manifest: str | Path, audio_root: str | Path | None = None):
        folder = os.path.dirname(os.path.abspath(manifest))
        roots = [os.path.abspath(os.path.expanduser(audio_root))] if audio_root else []
        self.folders = list(dict.fromkeys([folder, *roots, os.getcwd()]))
        self.elsewhere: Counter[str] = Counter()  # paths that were found in another folder than the manifest's

    def find(self, value: str) -> tuple[Path, str | None]:
        """(path, what is wrong with it); one that is elsewhere than beside the manifest is counted."""
        path = self._join(self.folders[0], value)
        problem = file_problem(path)
        if problem is not None and problem.startswith(MISSING):
            for folder in self.folders[1:]:
                other = self._join(folder, value)
                if other != path and os.path.exists(other):
                    self.elsewhere[folder] += 1
                    return Path(other), file_problem(other)
        return Path(path), problem

    def path(self, value: str) -> Path:
        """The same, of a clip that was found before; looked for only where some are not beside the manifest."""
        folders = self.folders if self.elsewhere else ()
        found = (path for folder in folders if os.path.exists(path := self._join(folder, value)))
        return Path(next(found, None) or self._join(self.folders[0], value))

    def holds(self, value: str) -> bool:
        """True if a file of that name is in one of the folders."""
        return any(os.path.exists(self._join(folder, value)) for folder in self.folders)

    @staticmethod
    def _join(folder: str, value: str) -> str:
        return os.path.join(folder, os.path.expanduser(value) if value.startswith("~") else value)

    def said(self, file: str) -> list[str]:
        """One line for each other folder that clips were found in."""
        return [
            f"{file}: {count:,} path{'s' * (count != 1)} found in {folder}, not in the manifest's own folder"
            for folder, count in self.elsewhere.most_common()
        ]

    def where_they_would_be(self, values: Iterable[str]) -> str:
        """One sentence for a manifest none of whose clips is there; `values` are some of its paths."""
        values = list(values)
        for value in values[:20]:
            if found := self._search(value):
                return found
        return (
            f"e.g. {shown_path(values[0])}; looked in {', '.join(self.folders)}: "
            "give the folder that they are relative to as --audio_root"
        )

    def _search(self, value: str) -> str | None:
        """Looks for a file of the same name: its last parts, under the folders known, those above and those within."""
        parts = Path(os.path.expanduser(value)).parts
        roots = [*self.folders]
        for folder in self.folders:
            roots += [str(parent) for parent in list(Path(folder).parents)[:3]]
            roots += [*_subfolders(folder), *_subfolders(os.path.dirname(folder))]
        for tail in (os.path.join(*parts[i:]) for i in range(len(parts)) if parts[i] != os.sep):
            for root in dict.fromkeys(roots):
                if not os.path.isfile(path := os.path.join(root, tail)):
                    continue
                if tail == value:
                    return f"{shown_path(value)} exists in {root}: give --audio_root {root}"
                before = value[: len(value) - len(tail)]
                return f"{shown_path(value)} exists as {path}: put {root}{os.sep} in the place of {before!r}"
        return None


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in itertools.islice(entries, 1000) if entry.is_dir()][:100]
    except OSError:
        return []


def file_problem(path: str | Path) -> str | None:
    """Reason why a path is no audio file, without opening it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return f"{MISSING}; paths are relative to the manifest's folder"
    except (OSError, ValueError) as error:  # ValueError: a character that no file name has here
        return f"cannot be read ({reason_of(error)})"
    if stat.S_ISDIR(status.st_mode):
        return "is a directory; give the path of an audio file"
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        return "is not a regular file"
    if status.st_size == 0:
        return "is empty (0 bytes)"
    return None


def shown_path(value: str) -> str:
    """A path in a few printable characters."""
    return repr(value if len(value) <= 200 else value[:200] + "...")
