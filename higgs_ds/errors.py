"""User errors, their messages, and the exit codes of every command."""

from __future__ import annotations

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator
from enum import IntEnum

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class ExitCode(IntEnum):
    """A process's exit code, for queues to act on."""

    OK = 0
    FAILED = 1  # a failed check, an unexpected error, another rank that died or hung
    CONFIG = 2  # wrong flags, configuration or data; nothing was trained
    BAD_LOSS = 3  # a loss check failed, with --on_bad_loss raise
    STOPPED = 75  # stopped on request; saved, --resume auto continues


class ConfigError(ValueError):
    """Problems with flags, YAML, DeepSpeed's JSON, a checkpoint or data: all at once, one per line.

    Commands print it and end with `ExitCode.CONFIG`.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns any library's exception into one line, so that no module has to foresee what may be wrong with a file.

    Args:
        what: prefix of the line: flag and file, folder or line number, as `--adapter: /x/adapter_config.json`.

    Raises:
        ConfigError: `what: the library's message`; a ConfigError from inside passes unchanged. `--debug` shows the
            original traceback.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([f"{what}: {words_of(error)}"]) from error


def words_of(error: BaseException) -> str:
    """A library's message as one line of at most 300 characters, after the error's type unless it is about a value."""
    reason = getattr(error, "strerror", None)
    text = " ".join((reason or str(error)).split())
    text = text if len(text) <= 300 else f"{text[:299]}…"
    if reason or (isinstance(error, (ValueError, UnicodeError)) and text):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shown(value: object) -> str:
    """A value quoted for an error message: one line of about 60 characters at most."""
    return _SHORT.repr(value)


def reason_of(error: Exception) -> str:
    """The system's message without number and path; for other errors, their own message."""
    return getattr(error, "strerror", None) or str(error)


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the valid name that `name` misspells, or an empty string.

    The cutoff accepts typing errors (`batchsize`, `warm_ratio`) but no other word (`keep_steps`, `max_epochs`), so that
    following a suggestion never starts a different run.
    """
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.87)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_of(problems: list[str], most: int = 20) -> list[str]:
    """The first `most` problems, and the number of the others."""
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"… and {len(problems) - most} more"]
