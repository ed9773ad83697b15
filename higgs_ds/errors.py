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
    """Number that a process ends with; a queue decides by it."""

    OK = 0
    FAILED = 1  # a checklist with a failure, an unexpected error, another rank that died or got stuck
    CONFIG = 2  # wrong flags, configuration or data; nothing was trained
    BAD_LOSS = 3  # a loss that is not real, with --on_bad_loss raise
    STOPPED = 75  # asked to stop; saved, --resume auto goes on


class ConfigError(ValueError):
    """Faults of flags, YAML, DeepSpeed's JSON, a checkpoint or data: all problems at once, one a line.

    The commands print it and end with `ExitCode.CONFIG`.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever a library raises inside into one line: no module has to foresee what may be wrong with a file.

    Args:
        what: the flag with the file, folder or line, as `--adapter: /x/adapter_config.json`; the line begins with it.

    Raises:
        ConfigError: `what: the library's own words`; a ConfigError from inside passes as it is. `--debug` shows the
            traceback of what was raised.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([f"{what}: {words_of(error)}"]) from error


def words_of(error: BaseException) -> str:
    """Words of a library, in one line of at most 300 characters; led by the error's type unless a file is at fault."""
    reason = getattr(error, "strerror", None)
    text = " ".join((reason or str(error)).split())
    text = text if len(text) <= 300 else f"{text[:299]}…"
    if reason or (isinstance(error, (ValueError, UnicodeError)) and text):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shown(value: object) -> str:
    """A value as an error quotes it: one line of some 60 characters at most, however long or deep it is."""
    return _SHORT.repr(value)


def reason_of(error: Exception) -> str:
    """Words of the system on a file that it refuses, without number and path; any other error's own words."""
    return getattr(error, "strerror", None) or str(error)


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the valid name that `name` misspells, or an empty string.

    The cutoff takes a slip of the keyboard (`batchsize`, `warm_ratio`) and no other word (`keep_steps`, `max_epochs`):
    a suggestion that is followed must not make another run of it.
    """
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.87)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_of(problems: list[str], most: int = 20) -> list[str]:
    """The first `most` of them, and how many more there are: what a console can show of them."""
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"… and {len(problems) - most} more"]
