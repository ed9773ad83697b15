"""Defaults ← YAML ← flags: the words of a command line to a `TrainConfig`, checked once and completely."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import types
import typing
from pathlib import Path

import yaml

from .config import ALIASES, OPTIONS, TrainConfig, cross_checks
from .errors import ConfigError, nearest

MAX_YAML_BYTES = 1_000_000


def _convert(name: str, value):
    """A flag's text or a YAML value in the field's type; ValueError says what was expected."""
    hint = OPTIONS[name].hint
    arms = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in arms and (value is None or str(value).lower() in ("none", "null")):
        return None
    if value is None:
        raise ValueError("needs a value")
    kind = next(arm for arm in arms if arm is not type(None))
    if typing.get_origin(kind) is list:
        (item_kind,) = typing.get_args(kind)
        items = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else value
        if not isinstance(items, list) or not items or items == [""]:
            raise ValueError(f"expected a list, got {value!r}")
        return [_scalar(item_kind, item) for item in items]
    return _scalar(kind, value)


def _scalar(kind, value):
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError(f"expected true or false, got {value!r}")
    if kind is str:
        if isinstance(value, str) and not value.strip():
            raise ValueError("is empty; give a value, or leave it out")
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        raise ValueError(f"expected text, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"expected a number, got {value!r}")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"expected a number, got {value!r}") from None
    except OverflowError:  # a YAML integer of hundreds of digits
        raise ValueError("expected a number of usual size, got a whole number beyond a float's range") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value!r}")
    if kind is int:
        if number != int(number):
            raise ValueError(f"expected a whole number, got {value!r}")
        return int(number)
    return number


def _range_problem(name: str, value) -> str | None:
    rules = OPTIONS[name].field.metadata
    if value is None:
        return "is required" if rules.get("required") else None
    if "choices" in rules and value not in rules["choices"]:
        return f"{value!r} is not one of {', '.join(rules['choices'])}"
    if "least" in rules and value < rules["least"]:
        return f"{value!r} is below {rules['least']}"
    if "most" in rules and value > rules["most"]:
        return f"{value!r} is above {rules['most']}"
    if "above" in rules and value <= rules["above"]:
        return f"{value!r} must be above {rules['above']}"
    if "below" in rules and value >= rules["below"]:
        return f"{value!r} must be below {rules['below']}"
    return None


def build_parser() -> argparse.ArgumentParser:
    """Flags as text: conversion and checks are done together afterwards, so that all errors show at once."""
    parser = argparse.ArgumentParser(
        prog="train_ds.py",
        description="LoRA fine-tuning of Higgs Audio v2 on DeepSpeed.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of the same names; flags win")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, (section, hint, f) in OPTIONS.items():
        group = groups.get(section) or groups.setdefault(section, parser.add_argument_group(section))
        names = [f"--{name}"] + [f"--{alias}" for alias, target in ALIASES.items() if target == name]
        shown = f.default if f.default is not dataclasses.MISSING else " ".join(map(str, f.default_factory()))
        options: dict = {"dest": name, "default": argparse.SUPPRESS}
        if hint is bool:
            options |= {"nargs": "?", "const": "true"}
        elif typing.get_origin(hint) is list or name == "codebook_weights":
            options |= {"nargs": "+"}
        choices = f.metadata.get("choices")
        metavar = "|".join(choices) if choices else name.split("_")[-1].upper()
        suffix = "" if f.metadata.get("required") or shown is None else f" (default: {shown})"
        group.add_argument(*names, metavar=metavar, help=(f.metadata["help"] + suffix).replace("%", "%%"), **options)
    return parser


def parse_args(argv: list[str], *, may_lack: tuple[str, ...] = ()) -> TrainConfig:
    """Defaults ← YAML ← flags; required options named in `may_lack` may be left out.

    Raises:
        ConfigError: with every problem found, each naming its flag or `file: key`.
    """
    parser = build_parser()
    given, unknown = parser.parse_known_args(argv)
    flags = vars(given)
    flags.pop("local_rank", None)
    config_file = flags.pop("config", None)
    problems: list[str] = []
    valid = [*OPTIONS, *ALIASES, "config"]
    for word in unknown:
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            close = nearest(name, valid).replace("'", "'--", 1)
            problems.append(f"--{name}: unknown flag{close}")
        else:
            problems.append(f"{word!r}: not a flag, and no flag takes it")

    values: dict[str, tuple[str, object]] = {}
    if config_file is not None:
        for key, value in _read_yaml(config_file, problems).items():
            name = ALIASES.get(str(key), str(key))
            if name not in OPTIONS:
                problems.append(f"{config_file}: {key}: unknown key{nearest(str(key), valid)}")
            elif name in values:
                problems.append(f"{config_file}: {key}: given twice (as {name} and under another name)")
            else:
                values[name] = (f"{config_file}: {key}", value)
    for name, value in flags.items():
        text = " ".join(value) if isinstance(value, list) else value
        values[name] = (f"--{name}", text)

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


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values: a key given twice or an alias, by which a few lines become gigabytes, is an error."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: write its value out", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: str, problems: list[str]) -> dict:
    try:
        if Path(path).stat().st_size > MAX_YAML_BYTES:
            problems.append(f"--config: {path} is larger than {MAX_YAML_BYTES:,} bytes, no file of options")
            return {}
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _PlainLoader)
    except OSError as error:
        problems.append(f"--config: {path} cannot be read: {error.strerror or error}")
        return {}
    except RecursionError:
        problems.append(f"--config: {path} is nested too deeply for a file of options")
        return {}
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: bytes or dates that cannot be
        problems.append(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
        return {}
    if data is None:
        return {}
    if not isinstance(data, dict):
        problems.append(f"--config: {path} must hold `name: value` lines, it holds a {type(data).__name__}")
        return {}
    return data
