"""Options as fields of pydantic models, with metadata beyond type and range."""

from __future__ import annotations

import re
import typing
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

NOTHING = ("none", "null", "~")  # spellings of null, for options that accept it
FIXED = "fixed"  # a resumed run must not change it
SAID = "said"  # a resumed run that changes it gets a warning, since its trajectory differs


class Other(NamedTuple):
    """Another trainer's spelling of an option: its values mapped to ours."""

    words: dict[str, str]
    bare: str | None = "true"  # value of the flag without a value; None if it needs one
    only: bool = True  # no other values than these; else they are read as ours

    def __str__(self) -> str:
        return ", ".join(f"{theirs}: {ours}" for theirs, ours in self.words.items())


def option(default: Any, text: str, *, also: str = "", others: dict[str, Other] | None = None, **rest: Any) -> Any:
    """Declares an option with its help text.

    Args:
        also: aliases with the same values, separated by blanks.
        others: aliases with other values.
        rest: `resume`, `required` and `verbatim` of `Option`, and pydantic's constraints (ge, gt, le, lt, …).
    """
    rules: Any = {name: rest.pop(name) for name in ("resume", "required", "verbatim") if name in rest}
    rules |= {"also": tuple(also.split()), "others": others or {}}
    return Field(default, description=text, json_schema_extra=rules, **rest)


class Option(NamedTuple):
    """An option's section, field, properties of its type, and metadata."""

    section: str
    field: FieldInfo
    is_switch: bool  # boolean
    choices: tuple[str, ...]  # allowed values; empty if open
    is_list: bool
    may_be_none: bool
    also: tuple[str, ...]
    others: dict[str, Other]
    resume: str | None = None  # FIXED, SAID, or None: may change on resume
    required: bool = False
    verbatim: bool = False  # list items are not split at blanks and commas

    @classmethod
    def of(cls, section: str, field: FieldInfo) -> Option:
        """From a field declared by `option`."""
        arms = (field.annotation, *typing.get_args(field.annotation))
        choices = next((typing.get_args(arm) for arm in arms if typing.get_origin(arm) is Literal), ())
        is_list = any(typing.get_origin(arm) is list for arm in arms)
        rules: Any = field.json_schema_extra
        return cls(section, field, field.annotation is bool, choices, is_list, type(None) in arms, **rules)

    @property
    def default(self) -> str:
        """The default as shown in help and documentation; empty for None."""
        default = self.field.default
        return "" if default is None else " ".join(default) if isinstance(default, list) else str(default)


class Section(BaseModel):
    """A group of options. Values may be text, as on a command line; their types convert them."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True, str_min_length=1
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_words(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads `none` as None if the option accepts it; splits lists given as `a,b` or as several words."""
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
    """The options of all sections, by name."""
    return {
        name: Option.of(section, field)
        for section, kind in typing.get_type_hints(config).items()
        if isinstance(kind, type) and issubclass(kind, Section)
        for name, field in kind.model_fields.items()
    }
