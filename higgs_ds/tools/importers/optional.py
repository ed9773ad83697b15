"""Libraries of requirements-import.txt: imported when asked for, and held back from commands and the network."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ...errors import ConfigError

_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
_NETWORK = ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
_refused: list[str] = []  # events that raise now; a hook cannot be taken away again


def library(name: str) -> ModuleType:
    """The module. Raises ConfigError with what to install where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        advice = "pip install -r requirements-import.txt"
        raise ConfigError([f"{name} is needed for this format: {advice} ({error})"]) from error


@contextlib.contextmanager
def held_back(what: str) -> Iterator[None]:
    """Lets nothing that runs inside start a program or reach the network, whatever stands in the user's files.

    Raises:
        PermissionError: it tried to, named as `what`.
    """
    if not any(hook is _refuse for hook in _hooks):
        _hooks.append(_refuse)
        sys.addaudithook(_refuse)
    _refused[:] = [what]
    try:
        yield
    finally:
        _refused.clear()


_hooks: list[Any] = []


def _refuse(event: str, args: tuple) -> None:
    if not _refused:
        return
    if event in _PROGRAMS:
        raise PermissionError(f"{_refused[0]} would run a program ({args[0]}); nothing is run")
    if event in _NETWORK or (event == "socket.connect" and isinstance(args[1], tuple)):
        raise PermissionError(f"{_refused[0]} would reach the network; only what lies here is read")
