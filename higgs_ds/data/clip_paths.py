"""Search for a manifest's clips: in `--audio_root`, then beside the manifest, then in the working directory."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


class ClipPaths:
    """Resolves the clip paths of a manifest's rows to absolute paths."""

    def __init__(self, manifest: str | Path, audio_root: str | Path | None = None):
        self.own = os.path.dirname(os.path.abspath(manifest))
        self.root = os.path.abspath(os.path.expanduser(audio_root)) if audio_root else None
        self.folders = list(dict.fromkeys([*([self.root] if self.root else []), self.own, os.getcwd()]))
        self.elsewhere: Counter[str] = Counter()  # clips in folders other than the manifest's

    def find(self, value: str) -> Path | None:
        """Returns a file's path, or None if it is not found. Counts files outside the manifest's folder."""
        if value[:1] in ("/", "~"):
            return Path(path) if (path := _file("", value)) else None
        for folder in self.folders:
            if path := _file(folder, value):
                if folder != self.own:
                    self.elsewhere[folder] += 1
                return Path(path)
        return None

    def path(self, value: str) -> Path:
        """Returns the path of a clip found before; searches only if some clips are not beside the manifest."""
        if not self.elsewhere and value.isascii():
            return Path(_join(self.own, value))
        paths = (_file(folder, value) for folder in self.folders)
        return Path(next(filter(None, paths), None) or _join(self.own, value))

    def holds(self, value: str) -> bool:
        """Returns True if a file of this name is in one of the folders."""
        return any(_file(folder, value) for folder in self.folders)

    def notes(self, file: str) -> list[str]:
        """Returns one line for each other folder with clips."""
        unused = self.root not in (None, self.own) and self.root not in self.elsewhere
        return [
            *([f"{file}: no clip found under --audio_root {self.root}"] if unused else []),
            *(
                f"{file}: {count:,} path{'s' * (count != 1)} found in {folder}, not in the manifest's own folder"
                for folder, count in self.elsewhere.most_common()
            ),
        ]


def _join(folder: str, value: str) -> str:
    return os.path.expanduser(value) if value[:1] in ("/", "~") else f"{folder}/{value}"


def _file(folder: str, value: str) -> str | None:
    """Returns the file of this name in a folder, composed (NFC) or decomposed (NFD); None if it is not found."""
    path = _join(folder, value)
    if os.path.isfile(path):
        return path
    if value.isascii():
        return None
    parts = Path(path).parts
    found = parts[0]
    for part in parts[1:]:
        spellings = (os.path.join(found, f(part)) for f in (str, _composed, _decomposed))
        found = next(filter(os.path.lexists, spellings), "")
        if not found:
            return None
    return found if os.path.isfile(found) else None


_composed, _decomposed = (functools.partial(unicodedata.normalize, form) for form in ("NFC", "NFD"))
