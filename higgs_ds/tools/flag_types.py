"""Flags of the verbs: how they are added, and their types."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("bf16", "fp16", "fp32")


def name(text: str) -> str:
    """A name, folder, file or hub id. Raises ArgumentTypeError for an empty one, as an unset shell variable gives."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave it out")
    return text


def path(text: str) -> Path:
    """A file or a folder. Raises ArgumentTypeError for an empty word, which pathlib takes for the working folder."""
    return Path(name(text))


def adder(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """A function that adds a flag by its names with a metavar, its help, and its type.

    Choices are a tuple, a switch is a bool. More arguments are argparse's own.
    """

    def add(names: str, about: str, kind: Any = str, **more: Any) -> None:
        words = names.split()
        if words[-1].isupper():
            more["metavar"] = words.pop()
        if kind is bool:
            more["action"] = "store_true"
        else:
            more |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument(*words, help=about, **more)

    return add


def base_flags(parser: argparse.ArgumentParser, base_help: str, default: str | None = None) -> None:
    """The base checkpoint, its revision, and whether an adapter may be of another one."""
    add = adder(parser)
    add("--base_ckpt", base_help, name, default=default)
    add("--base_revision", "revision of the base on the hub")
    add("--other_base", "accept an adapter that was trained on another base", bool)


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type for a number of this range, both ends included."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    read.__name__ = kind.__name__  # which argparse quotes
    return read
