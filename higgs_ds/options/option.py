"""An option as a field of a pydantic model, and all that stands on it beside its type and its range."""

from __future__ import annotations

import re
import typing
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

NOTHING = ("none", "null", "~")  # of a flag or in YAML, where an option may be left open
FIXED = "fixed"  # a resumed run that changes it is refused
SAID = "said"  # a resumed run that changes it is warned: its curve is another one


class Other(NamedTuple):
    """Another trainer's way to say an option: its words in ours."""

    words: dict[str, str]
    bare: str | None = "true"  # the word of the flag alone; None: it needs one
    only: bool = True  # no other words than these; else they are taken as our own

    def __str__(self) -> str:
        return ", ".join(f"{theirs}: {ours}" for theirs, ours in self.words.items())


def option(default: Any, text: str, *, also: str = "", others: dict[str, Other] | None = None, **rest: Any) -> Any:
    """A field with its help.

    Args:
        also: other names with the same values.
        others: other names with other words.
        rest: `resume`, `required` and `verbatim` of `Option`, and pydantic's rules for a value (ge, gt, le, lt, …).
    """
    rules: Any = {name: rest.pop(name) for name in ("resume", "required", "verbatim") if name in rest}
    rules |= {"also": tuple(also.split()), "others": others or {}}
    return Field(default, description=text, json_schema_extra=rules, **rest)


class Option(NamedTuple):
    """One option: where it stands, what its type says, and what pydantic has no place for."""

    section: str
    field: FieldInfo
    is_switch: bool  # true or false
    choices: tuple[str, ...]  # its only values; empty where it has others
    is_list: bool
    may_be_none: bool
    also: tuple[str, ...]
    others: dict[str, Other]
    resume: str | None = None  # FIXED, SAID, or None: a resumed run may change it
    required: bool = False
    verbatim: bool = False  # words of a list are not split at blanks and commas

    @classmethod
    def of(cls, section: str, field: FieldInfo) -> Option:
        """Of a field that `option` made."""
        arms = (field.annotation, *typing.get_args(field.annotation))
        choices = next((typing.get_args(arm) for arm in arms if typing.get_origin(arm) is Literal), ())
        is_list = any(typing.get_origin(arm) is list for arm in arms)
        rules: Any = field.json_schema_extra
        return cls(section, field, field.annotation is bool, choices, is_list, type(None) in arms, **rules)

    @property
    def default(self) -> str:
        """As help and documentation show it; empty for none."""
        default = self.field.default
        return "" if default is None else " ".join(default) if isinstance(default, list) else str(default)


class Section(BaseModel):
    """Options that belong together. Every value may be text, as on a command line; its type reads it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True, str_min_length=1
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_words(cls, value: Any, info: ValidationInfo) -> Any:
        """`none` for an option that may be left open; a list from `a,b` and from the words of a flag."""
        known = Option.of("", cls.model_fields[str(info.field_name)])
        if known.may_be_none and isinstance(value, str) and value.lower() in NOTHING:
            return None
        if not known.is_list or not isinstance(value, (str, list)):
            return value
        items = [value] if isinstance(value, str) else value
        if known.verbatim:
            return items
        words = [re.split(r"[\s,]+", item.strip()) if isinstance(item, str) else [item] for item in items]
        return [word for several in words for word in several]


def options_of(config: type[BaseModel]) -> dict[str, Option]:
    """The options of all sections by their names."""
    return {
        name: Option.of(section, field)
        for section, kind in typing.get_type_hints(config).items()
        if isinstance(kind, type) and issubclass(kind, Section)
        for name, field in kind.model_fields.items()
    }
