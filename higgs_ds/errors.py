"""What a user can get wrong, how it is told, and the exit codes of every command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a process ends with; a queue decides by it."""

    OK = 0
    FAILED = 1  # a checklist with a failure, an unexpected error, another rank that died or got stuck
    CONFIG = 2  # wrong flags, configuration or data; nothing was trained
    BAD_LOSS = 3  # a loss that is not real, with --on_bad_loss raise
    STOPPED = 75  # asked to stop; saved, --resume auto goes on


class ConfigError(ValueError):
    """What is wrong with flags, YAML, DeepSpeed's JSON, a checkpoint or data: all problems at once, one a line.

    The commands print it and end with `ExitCode.CONFIG`.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_of(problems: list[str], most: int = 20) -> list[str]:
    """The first `most` of them, and how many more there are: what a console can show of them."""
    if len(problems) <= most:
        return problems
    return [*problems[:most], f"… and {len(problems) - most} more"]
