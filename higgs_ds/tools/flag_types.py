"""Argument types of the tools' flags, and what several of them share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

DTYPES = ("bf16", "fp16", "fp32")


def name(text: str) -> str:
    """A name, folder, file or hub id. Raises ArgumentTypeError for an empty one, as an unset shell variable gives."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a value, or leave it out")
    return text


def path(text: str) -> Path:
    """A file or a folder. Raises ArgumentTypeError for an empty word, which pathlib takes for the working folder."""
    return Path(name(text))


def base_flags(parser: argparse.ArgumentParser, base_help: str, default: str | None = None) -> None:
    """The base checkpoint, its revision, and whether an adapter may be of another one."""
    parser.add_argument("--base_ckpt", type=name, default=default, help=base_help)
    parser.add_argument("--base_revision", help="revision of the base on the hub")
    parser.add_argument("--other_base", action="store_true", help="accept an adapter that was trained on another base")


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
