"""Parse defaults ← YAML ← flags to a `TrainConfig`, checked once and completely."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import ConfigError, reading, shown
from .checks import EITHER_OR, contradictions
from .option import NOTHING
from .sections import OPTIONS, OTHERS, TrainConfig, revision_of
from .translate import Given, in_our_words, settle_dtype, suggestion


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, without usage text."""

    def error(self, message: str):
        raise ConfigError([message.removeprefix("argument ")])


class _Given(argparse.Action):
    """Stores a flag's text in `given` under the name used; repeated lists are concatenated."""

    def __call__(self, parser, namespace, values, option_string=None):
        name = option_string.removeprefix("--")
        if name not in namespace.given:
            namespace.given[name] = values
        elif isinstance(values, list):
            namespace.given[name] += values
        else:
            namespace.problems.append(f"--{name}: given twice; leave one out")


@functools.cache
def build_parser(prog: str = "train_ds.py") -> argparse.ArgumentParser:
    """Builds a parser that keeps values as text; they are converted and checked later, to report all errors at once."""
    parser = _Parser(prog=prog, description="LoRA fine-tuning of Higgs Audio v2 and Higgs TTS 3.", allow_abbrev=False)
    text = "YAML file of options, by the same names; flags override it."
    parser.add_argument("--config", metavar="FILE.yaml", help=text, action=_Given)
    # Passed by DeepSpeed's launcher and by torch.distributed.launch.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, known in OPTIONS.items():
        group = groups.get(known.section) or groups.setdefault(known.section, parser.add_argument_group(known.section))
        names = [f"--{name}", *(f"--{alias}" for alias in known.also)]
        options: dict[str, Any] = {"dest": name, "action": _Given}
        if known.is_list:
            options["nargs"] = "+"
        elif known.is_switch or name in known.others:
            options |= {"nargs": "?", "const": known.others[name].bare if name in known.others else "true"}
        words = ("true", "false") if known.is_switch else known.choices
        metavar = "|".join(words) or name.split("_")[-1].upper()
        default = "" if known.required or not known.default else f" (default: {known.default})"
        group.add_argument(
            *names, metavar=metavar, help=f"{known.field.description}{default}".replace("%", "%%"), **options
        )
    group = parser.add_argument_group("other trainers' names")
    for name, (own, other) in OTHERS.items():
        if name != own:
            nargs: dict[str, Any] = {} if other.bare is None else {"nargs": "?", "const": other.bare}
            group.add_argument(f"--{name}", metavar="VALUE", help=f"--{own}; {other}", action=_Given, **nargs)
    return parser


class _TextLoader(yaml.BaseLoader):
    """YAML loader that keeps values as text and refuses repeated keys."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str) -> dict[str, object]:
    """Reads options from a file by name; a key without value is null. Raises ConfigError."""
    with reading(f"--config: {path}"):
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _TextLoader)
        if data and not isinstance(data, dict):
            raise ValueError(f"must hold `name: value` lines, it holds a {type(data).__name__}")
    return {key: "null" if value == "" else value for key, value in (data or {}).items()}


def parse_args(argv: list[str], *, may_lack: tuple[str, ...] = (), prog: str = "train_ds.py") -> TrainConfig:
    """Parses a command line.

    Args:
        argv: flags and values.
        may_lack: required options that may be missing here.
        prog: name of the command in the help.

    Raises:
        ConfigError: every problem, each naming its flag or `file: key`.
    """
    problems: list[str] = []
    words, unknown = build_parser(prog).parse_known_args(argv, argparse.Namespace(given={}, problems=problems))
    for before, word in zip(["", *unknown], unknown, strict=False):
        if word.startswith("--"):
            name = word[2:].split("=")[0]
            problems.append(f"--{shown(name)[1:-1]}: unknown flag{suggestion(name, '--')}")
        elif not before.startswith("--"):  # else it is the value of the unknown flag before it
            problems.append(f"{shown(word)}: neither a flag nor the value of one")

    path = words.given.pop("config", None)
    values = in_our_words({} if path is None else read_yaml(path), f"{path}: ", problems)
    flags = in_our_words(words.given, "--", problems)
    settle_dtype(values, flags, problems)
    for name, other in EITHER_OR:
        beside = ("1",) if name == "batch_size" else ()  # has no effect with a token budget
        if name in flags and other not in flags and not _is_open(flags[name], *beside):
            values.pop(other, None)  # the flag overrides the file
    values |= flags
    needed = [name for name, known in OPTIONS.items() if known.required and name not in may_lack]
    problems += [f"--{name}: is required" for name in needed if name not in values or _is_open(values[name])]

    config = _validated(values, problems)
    if config is not None and not problems:
        problems += contradictions(config)
    if config is None or problems:
        raise ConfigError(problems)
    model, data, optim = config.model, config.data, config.optim
    return config.settled(
        base_revision=revision_of(model.base_ckpt, model.base_revision),
        codec_revision=revision_of(data.codec, data.codec_revision),
        warmup_ratio=optim.warmup_ratio if optim.warmup_steps is None else None,
    )


def _is_open(given: Given, *more: str) -> bool:
    return isinstance(given.value, str) and given.value.strip().lower() in (*NOTHING, *more)


def _validated(values: dict[str, Given], problems: list[str]) -> TrainConfig | None:
    """Converts and validates values; on errors adds them to `problems` and returns None."""
    sections: dict[str, dict[str, object]] = {}
    for name, given in values.items():
        sections.setdefault(OPTIONS[name].section, {})[name] = given.value
    try:
        return TrainConfig.model_validate(sections)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            cause = fault.get("ctx", {}).get("error")
            if isinstance(cause, ConfigError):
                problems += cause.problems
                continue
            what = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
            problems.append(f"{values[str(fault['loc'][1])].where}: {what}, got {shown(fault['input'])}")
        return None
