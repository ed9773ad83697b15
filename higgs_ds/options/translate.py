"""Options as other trainers name them and with their values, in this one's: `--bf16`, `--report_to wandb`, …

A name with the same values is an alias (`config.ALIASES`); those whose values need words of ours stand here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..errors import nearest, shown
from .sections import ALIASES, OPTIONS


def yes_or_no(value: object) -> bool:
    """true, yes, 1 or their opposites; ValueError for anything else."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError(f"expected true or false, got {shown(value)}")


class Foreign(NamedTuple):
    """An option of others: which of ours it stands for, how its value reads there, and the same for people."""

    target: str
    value: Callable[[object], object]
    text: str
    bare: str | None = "true"  # the value of the flag alone; None: it needs one


def _recomputed(value: object) -> str:
    return "full" if yes_or_no(value) else "none"


def _resumed(value: object) -> object:
    """A word for yes or no, or a checkpoint's folder."""
    try:
        return "auto" if value is not None and yes_or_no(value) else "none"
    except ValueError:
        return value


def _heads(value: object) -> object:
    """A word for yes or no, or which head."""
    try:
        return "audio" if yes_or_no(value) else "none"
    except ValueError:
        return value


def _reported(value: object) -> str:
    names = re.split(r"[\s,]+", value.strip().lower()) if isinstance(value, str) else value
    if names in (["wandb"], ["none"]):
        return {"wandb": "auto", "none": "disabled"}[names[0]]
    others = [name for name in names if name not in ("wandb", "none")] if isinstance(names, list) else []
    foreign = ", ".join(shown(name).strip("'") for name in others[:3]) or shown(value)
    raise ValueError(f"{foreign} is not written here; wandb or none, and metrics.jsonl and loss.png always")


FOREIGN = {
    "resume": Foreign("resume", _resumed, "without a value: auto", bare="auto"),
    "train_heads": Foreign("train_heads", _heads, "without a value: audio", bare="audio"),
    "resume_from_checkpoint": Foreign("resume", _resumed, "true: auto, false: none"),
    "gradient_checkpointing": Foreign("activation_checkpointing", _recomputed, "true: full, false: none"),
    "report_to": Foreign("wandb_mode", _reported, "wandb: auto, none: disabled", bare=None),
    "bf16": Foreign("dtype", yes_or_no, "true: bf16, false: fp32 unless --fp16"),
    "fp16": Foreign("dtype", yes_or_no, "true: fp16"),
}


def in_our_words(
    given: Mapping[str, object], prefix: str, problems: list[str], beneath: Mapping[str, object] | None = None
) -> dict[str, tuple[str, object]]:
    """Options by the names of `OPTIONS`: where each was given, for errors, and its value.

    Args:
        given: what flags or a file hold, by whichever name.
        prefix: what a name is written with, `--` or `run.yaml: `.
        problems: gets a line for each name that is unknown or given twice and each value that cannot be read.
        beneath: what the file under the flags holds: `--bf16 false` is fp16 where the file says `fp16: true`.
    """
    found: dict[str, tuple[str, object]] = {}
    for name, value in given.items():
        foreign = FOREIGN.get(name)
        own = foreign.target if foreign else ALIASES.get(name, name)
        where = f"{prefix}{shown(name)[1:-1]}"
        if own not in OPTIONS:
            problems.append(f"{where}: unknown {'flag' if prefix == '--' else 'key'}{suggestion(name, prefix)}")
            continue
        before = found[own][0].removeprefix(prefix) if own in found else name
        if before != name and {before, name} != {"bf16", "fp16"}:
            problems.append(f"{where}: given twice, as {before} too; leave one out")
            continue
        try:
            found[own] = (where, foreign.value(value) if foreign else value)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    where, _ = found.get("dtype", ("", None))
    if where in (f"{prefix}bf16", f"{prefix}fp16"):
        says = _true_or_false(given)
        if not any(says.values()):
            says = _true_or_false(beneath or {}) | says
        if says.get("bf16") and says.get("fp16"):
            problems.append(f"{where}: bf16 and fp16 are both true; leave one out")
        del found["dtype"]
        if says != {"fp16": False}:  # which is not what the default would be
            found["dtype"] = (where, "fp16" if says.get("fp16") else "bf16" if says.get("bf16") else "fp32")
    return found


def _true_or_false(given: Mapping[str, object]) -> dict[str, bool]:
    """What `bf16` and `fp16` are given as, where that can be read."""
    says = {}
    for name in ("bf16", "fp16"):
        with contextlib.suppress(ValueError, KeyError):
            says[name] = yes_or_no(given[name])
    return says


def suggestion(name: str, prefix: str) -> str:
    """The known name that an unknown one misspells, or an empty string."""
    if prefix != "--" and name == "config":
        return ", a file of options names no other one"
    hint = nearest(name, [*OPTIONS, *ALIASES, *FOREIGN, *(["config"] if prefix == "--" else [])])
    return hint.replace("'", "'--", 1) if prefix == "--" else hint
