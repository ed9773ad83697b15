"""Places of a manifest's clips: beside it, else under `--audio_root` or the working folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


class ClipPaths:
    """Turns what a row says into an absolute path."""

    def __init__(self, manifest: str | Path, audio_root: str | Path | None = None):
        folder = os.path.dirname(os.path.abspath(manifest))
        roots = [os.path.abspath(os.path.expanduser(audio_root))] if audio_root else []
        self.folders = list(dict.fromkeys([folder, *roots, os.getcwd()]))
        self.elsewhere: Counter[str] = Counter()  # paths that were found in another folder than the manifest's

    def find(self, value: str) -> Path | None:
        """A file's path, or None; one that is elsewhere than beside the manifest is counted."""
        for folder in self.folders:
            if os.path.isfile(path := _join(folder, value)):
                if folder != self.folders[0]:
                    self.elsewhere[folder] += 1
                return Path(path)
        return None

    def path(self, value: str) -> Path:
        """The same, of a clip that was found before; looked for only where some are not beside the manifest."""
        paths = [_join(folder, value) for folder in (self.folders if self.elsewhere else self.folders[:1])]
        return Path(paths[0] if len(paths) == 1 else next(filter(os.path.isfile, paths), paths[0]))

    def holds(self, value: str) -> bool:
        """True if a file of that name is in one of the folders."""
        return any(os.path.isfile(_join(folder, value)) for folder in self.folders)

    def said(self, file: str) -> list[str]:
        """One line for each other folder that clips were found in."""
        return [
            f"{file}: {count:,} path{'s' * (count != 1)} found in {folder}, not in the manifest's own folder"
            for folder, count in self.elsewhere.most_common()
        ]


def _join(folder: str, value: str) -> str:
    return os.path.join(folder, os.path.expanduser(value) if value.startswith("~") else value)
