"""Errors that a user can make, how they are told, and the exit codes of every command."""

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
    """Turns whatever a library raises inside into one line, so that no room foresees what may be wrong with a file.

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


def first_line(error: BaseException) -> str:
    """Of what it says; its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the valid name that `name` misspells, or an empty string.

    Only for a slip of the keyboard or another form of the same words (`batchsize`, `warm_ratio`): a name of which one
    word is another one (`save_steps` beside `max_steps`) is no suggestion, since it would make another run of it.
    """
    close = [(difflib.SequenceMatcher(None, name, other).ratio(), other) for other in valid if _alike(name, other)]
    return f" (did you mean '{max(close)[1]}'?)" if close else ""


def _alike(name: str, other: str) -> bool:
    """True if every word of one is a word of the other, or nearly; a word and a longer form of it count as one."""
    words, others = (text.lower().replace("-", "_").split("_") for text in (name, other))
    if len(words) != len(others):
        words, others = ["".join(words)], ["".join(others)]
        return difflib.SequenceMatcher(None, words[0], others[0]).ratio() >= 0.9
    return all(_same_word(word, other) for word, other in zip(words, others, strict=True))


def _same_word(word: str, other: str) -> bool:
    short, long = sorted((word, other), key=len)
    if len(short) >= 3 and long.startswith(short):
        return True
    return word == other or (len(short) >= 3 and difflib.SequenceMatcher(None, word, other).ratio() >= 0.8)


def first_of(problems: list[str], most: int = 20) -> list[str]:
    """The first `most` of them, and how many more there are: what a console can show of them."""
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"… and {len(problems) - most} more"]
