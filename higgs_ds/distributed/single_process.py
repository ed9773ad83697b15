"""Stand-ins for the other ranks, and for the watch over them, in a process that has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..process import say

T = TypeVar("T")


@dataclass(frozen=True)
class SingleProcess:
    """`Ranks` of a process without others, as far as reading the data needs them."""

    rank: int = 0
    world_size: int = 1
    is_main: bool = True

    def gather(self, value: object) -> list:
        """The value, as a list of one."""
        return [value]

    def each(self, function: Callable[[], T]) -> T:
        """`function()`; a ConfigError is raised as it is."""
        return function()

    def named(self, ranks: list[int]) -> str:
        """`rank 0`."""
        return f"rank {ranks[0]}"

    def say(self, text: str) -> None:
        """A line to the console."""
        say(text)


class NoWatch:
    """`Watch` where nobody looks: told of every move, does nothing."""

    def at(self, step: int, doing: str) -> None:
        """This rank moved on."""

    def untimed(self, doing: str) -> None:
        """This rank moved on to something that takes as long as it takes."""

    def progressed(self) -> None:
        """This rank goes on with what it is doing."""
