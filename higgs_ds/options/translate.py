"""Translate other trainers' options: `--bf16`, `--report_to wandb`, …"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import nearest, shown
from .sections import ALIASES, OPTIONS, OTHERS

YES_OR_NO = {"true": "true", "1": "true", "yes": "true", "false": "false", "0": "false", "no": "false"}
PRECISIONS = ("bf16", "fp16")


class Given(NamedTuple):
    """A value with the flag or key that it came from, for messages."""

    where: str
    value: object


def in_our_words(given: Mapping[str, object], prefix: str, problems: list[str]) -> dict[str, Given]:
    """Renames options to those of `OPTIONS`; `bf16` and `fp16` are left to `settle_dtype`.

    Args:
        given: values of flags or a file, under any alias.
        prefix: prefix of names in messages, `--` or `run.yaml: `.
        problems: receives a line for each unknown or repeated name and each unknown value.
    """
    found: dict[str, Given] = {}
    for name, value in given.items():
        where = f"{prefix}{shown(name)[1:-1]}"
        own, other = OTHERS.get(name, (ALIASES.get(name, name), None))
        if own not in OPTIONS:
            problems.append(f"{where}: unknown {'flag' if prefix == '--' else 'key'}{suggestion(name, prefix)}")
            continue
        if other is not None:
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            word = value.strip().lower() if isinstance(value, str) else ""
            word = YES_OR_NO.get(word, word)
            if word in other.words or (name in PRECISIONS and word == "false"):
                value = word if name in PRECISIONS else other.words[word]
            elif other.only:
                known = "true or false" if "true" in other.words else " or ".join(other.words)
                problems.append(f"{where}: should be {known}, got {shown(value)}")
                continue
        key = name if name in PRECISIONS else own
        if key in found:
            problems.append(f"{where}: given twice, as {found[key].where.removeprefix(prefix)} too; leave one out")
        found[key] = Given(where, value)
    if "dtype" in found and (twice := [name for name in PRECISIONS if name in found]):
        problems.append(f"{found['dtype'].where}: given twice, as {twice[0]} too; leave one out")
    return found


def settle_dtype(file: dict[str, Given], flags: dict[str, Given], problems: list[str]) -> None:
    """Replaces `bf16` and `fp16` by `dtype`: the true one, or fp32 if only `bf16` is given and false; flags win."""
    of_file, of_flags = ({name: said.pop(name) for name in PRECISIONS if name in said} for said in (file, flags))
    said = of_flags if any(given.value == "true" for given in of_flags.values()) else of_file | of_flags
    true = [name for name in said if said[name].value == "true"]
    if len(true) == 2:
        problems.append(f"{said[true[1]].where}: bf16 and fp16 are both true; leave one out")
    if true or "bf16" in said:
        name = true[0] if true else "bf16"
        (flags if of_flags else file)["dtype"] = Given(said[name].where, name if true else "fp32")


def suggestion(name: str, prefix: str) -> str:
    """The known name that an unknown one misspells, or an empty string."""
    hint = nearest(name, [*OPTIONS, *ALIASES, *OTHERS, *(["config"] if prefix == "--" else [])])
    return hint.replace("'", "'--", 1) if prefix == "--" else hint
