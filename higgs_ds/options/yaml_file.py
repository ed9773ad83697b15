"""A YAML file of options: plain values, each number in its own spelling, and one line for whatever does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from ..errors import reason_of, shown
from ..files import read_settings

TAGS = "tag:yaml.org,2002:"


class Numeral(str):
    """What YAML 1.1 reads as a number, as it is spelt: as a text `2026_01` is not 202601, nor `0755` 493."""

    @property
    def is_decimal(self) -> bool:
        """Not octal (010), hexadecimal, binary or in sixties (1:30), which are other numbers than they look."""
        return not re.fullmatch(r"[+-]?0([xb].*|[0_]*[1-9][0-9_]+)", self) and ":" not in self


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

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:  # a month 13
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
        except (ArithmeticError, AttributeError, LookupError, TypeError):  # whatever a tag breaks that does not fit
            value = shown(node.value) if isinstance(node, yaml.ScalarNode) else "its value"
            problem = f"{value} does not fit {shown(node.tag.replace(TAGS, '!!'))[1:-1]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_numeral(self, node) -> Numeral:
        return Numeral(self.construct_scalar(node))


for _kind in ("int", "float"):
    _PlainLoader.add_constructor(f"{TAGS}{_kind}", _PlainLoader.construct_numeral)


def read_plain_yaml(path: str, problems: list[str]) -> dict[str, object]:
    """The options in a file by their names, numbers as `Numeral`; empty where `problems` gets a line."""
    try:
        data = yaml.load(read_settings(Path(path)), _PlainLoader)
    except OSError as error:
        problems.append(f"--config: {path} cannot be read: {reason_of(error)}")
        return {}
    except RecursionError:
        problems.append(f"--config: {path} is nested too deeply for a file of options")
        return {}
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: bytes that are no text
        problems.append(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
        return {}
    if data is None:
        return {}
    if not isinstance(data, dict):
        problems.append(f"--config: {path} must hold `name: value` lines, it holds a {type(data).__name__}")
        return {}
    return {str(key): value for key, value in data.items()}
