"""What the values of a row's JSON mean: what counts as not given, numbers given as text, blanks; and how they look."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

TOO_DEEP = "nested too deeply to be read"

_DECIMAL = re.compile(r"[-+]?\d{1,15}(\.\d*)?")


class _Object(dict):
    """A JSON object that remembers which of its keys were given more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = [key for key, count in counts.items() if count > 1]


def parse_int(digits: str) -> int | float:
    """int() raises on 4300 digits and float() on an int past 1e308; read as a float, both end as a plain infinity."""
    return int(digits) if len(digits) <= 18 else float(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_int=parse_int)


def given(value: Any) -> Any:
    """None where a field stands and says nothing: null, blanks, and the NaN that pandas writes for either."""
    if isinstance(value, str):
        return value if value and not value.isspace() else None
    return None if isinstance(value, float) and math.isnan(value) else value


def number(value: Any) -> Any:
    """A number that is given as text, as tables have it, as a number; whatever else is given as it is."""
    value = given(value)
    return float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value.strip()) else value


def without_blanks(pieces: list[Any]) -> tuple[Any, ...]:
    """A turn's content without the blanks at its two ends, as servers trim texts; those within it stay."""
    if len(pieces) == 1 and isinstance(pieces[0], str):
        text = pieces[0].strip()
        return (text,) if text else ()
    for end, trimmed in ((0, str.lstrip), (-1, str.rstrip)):
        while pieces and isinstance(pieces[end], str):
            pieces[end] = trimmed(pieces[end])
            if pieces[end]:
                break
            del pieces[end]
    return tuple(piece for piece in pieces if piece != "")


def shown(value: Any) -> str:
    """A JSON value in a few printable characters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    return json.dumps(value)
