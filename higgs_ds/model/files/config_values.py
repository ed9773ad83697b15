"""Value types of a config.json, rotary parameters, and validation of a table of fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict

from ...errors import ConfigError, first_of, reading, shown

Count = Annotated[int, Field(ge=1, le=1024)]  # of layers, heads, codebooks: lists of this length are made
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Positive = Annotated[float, Field(gt=0, lt=1e12)]
Dtype = Literal["bfloat16", "float16", "float32"]


@with_config(ConfigDict(strict=True, extra="forbid"))
class DefaultRope(TypedDict):
    """Rotary parameters without scaling."""

    rope_type: Literal["default"]
    rope_theta: Positive


@with_config(ConfigDict(strict=True, extra="forbid"))
class Llama3Rope(TypedDict):
    """Rotary parameters with Llama 3's scaling."""

    rope_type: Literal["llama3"]
    rope_theta: Positive
    factor: Positive
    high_freq_factor: Positive
    low_freq_factor: Positive
    original_max_position_embeddings: Size


ROPE: TypeAdapter = TypeAdapter(Annotated[DefaultRope | Llama3Rope, Field(discriminator="rope_type")])


def checked(kind: TypeAdapter, raw: Any, where: str) -> Any:
    """Validates `raw` against a table of fields; unknown fields are left out.

    Raises:
        ConfigError: a line for each field that is missing, of the wrong type or out of range.
    """
    try:
        return kind.validate_python(raw)
    except ValidationError as error:
        problems = []
        for one in error.errors(include_url=False):
            name = ".".join(map(str, one["loc"]))
            is_what = "is missing" if one["type"] == "missing" else f"is {shown(one['input'])}: {one['msg']}"
            problems.append(f"{where}: {name} {is_what}" if name else f"{where} {is_what}")
    raise ConfigError(first_of(problems))


def rope_of(scaling: dict | None, theta: object, where: str) -> dict[str, Any]:
    """Rotary parameters by transformers' names: `rope_theta`, `rope_type` and that type's own.

    Args:
        scaling: `rope_scaling` of a Llama config, or None.
        theta: its `rope_theta`.
        where: prefix of each message.

    Raises:
        ConfigError: an unknown rope type, or parameters that do not belong to it.
    """
    found = dict(scaling or {"rope_type": "default"})
    found["rope_type"] = found.pop("type", None) or found.get("rope_type")  # its older name
    rope = checked(ROPE, {**found, "rope_theta": theta}, f"{where}: rope parameters")
    if rope.get("low_freq_factor", 0) >= rope.get("high_freq_factor", 1):
        raise ConfigError([f"{where}: low_freq_factor {rope['low_freq_factor']} must be below high_freq_factor"])
    return rope


def read_json(file: Path, flag: str) -> dict:
    """Reads a JSON object from a file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    with reading(f"{flag}: {file} cannot be read"):
        raw = from_json(file.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError(f"it holds {type(raw).__name__}, expected a JSON object")
    return raw
