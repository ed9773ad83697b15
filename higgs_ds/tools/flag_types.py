"""Types of the verbs' flags, and a shorthand to add them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("bf16", "fp16", "fp32")


def name(text: str) -> str:
    """Parses a name, path or hub id. Raises ArgumentTypeError if it is empty, e.g. an unset shell variable."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or omit the flag")
    return text


def path(text: str) -> Path:
    """Parses a path. Raises ArgumentTypeError if it is empty, which pathlib would take as the working directory."""
    return Path(name(text))


def adder(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """Returns a function that adds a flag: its names with an optional metavar, its help, and its type.

    The type is a tuple for choices, bool for a switch. Further arguments are passed to argparse.
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
    """Adds the flags of the base checkpoint, its revision, and adapters of another base."""
    add = adder(parser)
    add("--base_ckpt", base_help, name, default=default)
    add("--base_revision", "revision of the base on the hub")
    add("--other_base", "accept an adapter that was trained on another base", bool)


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """Returns a type for a number from `least` to `most`, both included."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    read.__name__ = kind.__name__  # argparse prints it in error messages
    return read
