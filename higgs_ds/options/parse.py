"""Defaults ← YAML ← flags: the words of a command line to a `TrainConfig`, checked once and completely."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import types
import typing
from pathlib import Path

from ..errors import ConfigError, shown
from .checks import EITHER_OR, cross_checks
from .sections import ALIASES, OPTIONS, TrainConfig
from .translate import FOREIGN, in_our_words, suggestion, yes_or_no
from .yaml_file import Numeral, read_plain_yaml

LARGEST = 2**53 - 1  # of whole numbers: beyond it a float, or a reader of JSON, holds another one
LONGEST_NAME = 255  # bytes, on every file system in use


def _kind(hint):
    """A type without its `| None`."""
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(arm for arm in arms if arm is not type(None))


def _convert(name: str, value):
    """A flag's text or a YAML value in the field's type; ValueError says what was expected."""
    kind = _kind(OPTIONS[name].hint)
    if kind is not OPTIONS[name].hint and (value is None or str(value).lower() in ("none", "null")):
        return None
    if value is None:
        raise ValueError("needs a value")
    if typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        whole = OPTIONS[name].field.metadata.get("whole", False)
        items = value
        if isinstance(value, str) and (item_kind is str or not isinstance(value, Numeral)):
            items = [value] if whole else re.split(r"[\s,]+", value.strip())
        if not isinstance(items, list) or not items or (items == [""] and not whole):
            raise ValueError(f"expected a list, got {shown(value)}")
        return [_scalar(item_kind, item) for item in items]
    return _scalar(kind, value)


def _scalar(kind, value):
    if kind is bool:
        return yes_or_no(value)
    if kind is str:
        return _text(value)
    if not isinstance(value, str):
        raise ValueError(f"expected a number, got {shown(value)}")
    if isinstance(value, Numeral) and not value.is_decimal:
        raise ValueError(f"expected a number in plain decimals, got {shown(value)}")
    if kind is int and re.fullmatch(r"\s*[+-]?[0-9]{1,4000}\s*", value):
        return int(value)  # every digit of it
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"expected a number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {shown(value)}")
    if kind is int:
        if number != int(number):
            raise ValueError(f"expected a whole number, got {shown(value)}")
        return int(number)
    return number


def _text(value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {shown(value)}")
    if not value.strip():
        raise ValueError("is empty; give a value, or leave it out")
    if not value.isprintable():  # a line break or NUL in a path, bytes that are no text
        raise ValueError(f"holds a character that cannot be printed: {shown(value)}")
    if max(len(part.encode()) for part in value.split("/")) > LONGEST_NAME:
        raise ValueError(f"is longer than a file's name may be: {shown(value)}")
    return str(value)


def text_flag(text: str) -> str:
    """A text or a path as `argparse` takes it from a verb's flag: not blank, printable, no longer than names may be."""
    try:
        return _text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_flag(text: str) -> Path:
    """`text_flag`, as a path."""
    return Path(text_flag(text))


def _range_problem(name: str, value) -> str | None:
    rules = OPTIONS[name].field.metadata
    if value is None:
        return "is required" if rules.get("required") else None
    whole = isinstance(value, int) and not isinstance(value, bool)
    most = rules.get("most", LARGEST if whole else None)
    if "choices" in rules and value not in rules["choices"]:
        return f"{shown(value)} is not one of {', '.join(rules['choices'])}"
    if "least" in rules and value < rules["least"]:
        return f"{shown(value)} is below {rules['least']}"
    if most is not None and value > most:
        return f"{shown(value)} is above {most}"
    if "above" in rules and value <= rules["above"]:
        return f"{shown(value)} must be above {rules['above']}"
    if "below" in rules and value >= rules["below"]:
        return f"{shown(value)} must be below {rules['below']}"
    return None


class _Parser(argparse.ArgumentParser):
    """argparse whose own complaints are one line, without the usage."""

    def error(self, message: str):
        raise ConfigError([message.removeprefix("argument ")])


class _Given(argparse.Action):
    """Keeps a flag's text by the name that was written, in `given`; of words that are taken whole, a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        whole = self.dest in OPTIONS and OPTIONS[self.dest].field.metadata.get("whole")
        text = " ".join(values) if isinstance(values, list) and not whole else values
        namespace.given[option_string.removeprefix("--")] = text


@functools.cache
def build_parser(prog: str = "train_ds.py") -> argparse.ArgumentParser:
    """Flags as text: conversion and checks are done together afterwards, so that all errors show at once."""
    parser = _Parser(
        prog=prog,
        description="LoRA fine-tuning of Higgs Audio v2 on DeepSpeed.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the same names; flags win")
    # DeepSpeed's launcher passes the one, torch.distributed.launch the other.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, (section, hint, f) in OPTIONS.items():
        group = groups.get(section) or groups.setdefault(section, parser.add_argument_group(section))
        names = [f"--{name}"] + [f"--{alias}" for alias, target in ALIASES.items() if target == name]
        shown_default = f.default if f.default is not dataclasses.MISSING else " ".join(map(str, f.default_factory()))
        options: dict = {"dest": name, "default": argparse.SUPPRESS, "action": _Given}
        if hint is bool:
            options |= {"nargs": "?", "const": "true"}
        elif typing.get_origin(_kind(hint)) is list:
            options |= {"nargs": "+"}
        elif name in FOREIGN:
            options |= {"nargs": "?", "const": FOREIGN[name].bare}
        choices = f.metadata.get("choices")
        metavar = "|".join(choices) if choices else name.split("_")[-1].upper()
        suffix = "" if f.metadata.get("required") or shown_default is None else f" (default: {shown_default})"
        group.add_argument(*names, metavar=metavar, help=(f.metadata["help"] + suffix).replace("%", "%%"), **options)
    others = parser.add_argument_group("as other trainers say it")
    for name, foreign in FOREIGN.items():
        if name not in OPTIONS:
            nargs = {"nargs": "+"} if foreign.bare is None else {"nargs": "?", "const": foreign.bare}
            text = f"--{foreign.target}; {foreign.text}"
            others.add_argument(f"--{name}", metavar="VALUE", help=text, dest=name, action=_Given, **nargs)
    return parser


def parse_args(argv: list[str], *, may_lack: tuple[str, ...] = (), prog: str = "train_ds.py") -> TrainConfig:
    """Defaults ← YAML ← flags; required options named in `may_lack` may be left out; help names the command `prog`.

    Raises:
        ConfigError: with every problem found, each naming its flag or `file: key`.
    """
    parser = build_parser(prog)
    words, unknown = parser.parse_known_args(argv, argparse.Namespace(given={}))
    problems: list[str] = []
    for before, word in zip(["", *unknown], unknown, strict=False):
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            problems.append(f"--{shown(name)[1:-1]}: unknown flag{suggestion(name, '--')}")
        elif not before.startswith("--"):  # or it is the value of the one before
            problems.append(f"{shown(word)}: not a flag, and no flag takes it")

    in_file = {} if words.config is None else read_plain_yaml(words.config, problems)
    values = in_our_words(in_file, f"{words.config}: ", problems)
    flags = in_our_words(words.given, "--", problems, beneath=in_file)
    for name, other in EITHER_OR:
        if name in flags and other not in flags and _says_something(name, flags[name][1]):
            values.pop(other, None)  # of the file, which the flag wins over
    values |= flags

    config = TrainConfig(given=frozenset(values))
    for name in OPTIONS:
        where, value = values.get(name, (f"--{name}", None))
        try:
            if name in values:
                config.set(name, _convert(name, value))
            problem = _range_problem(name, config.get(name))
        except ValueError as error:
            problem = str(error)
        if problem and not (name in may_lack and name not in values):
            problems.append(f"{where}: {problem}")
    if not problems:
        problems += cross_checks(config)
    if problems:
        raise ConfigError(problems)
    return config


def _says_something(name: str, value: object) -> bool:
    """Whether this value of one of `EITHER_OR` leaves no room for the other: a batch size of 1 goes with tokens."""
    return str(value).strip().lower() not in ("none", "null", *(("1",) if name == "batch_size" else ()))
