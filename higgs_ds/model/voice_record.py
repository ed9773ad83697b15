"""higgs_ds.json, beside an adapter and in a merged folder: the prompts and the base that the voice was trained on."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..data.chatml import PROMPT_STYLES, SERVED
from ..errors import ConfigError, shown
from ..files import write_text
from .files.config_values import read_json

RECORD = "higgs_ds.json"
# What `cards.prompt_details` says of the training rows, in order; all DETAILS are kept for the merged card.
PROMPT_DETAILS = ("rows with a reference clip", "rows with a scene", "rows with a system turn")
BASE_DETAIL = "base in training"  # where that was not as its files have it
DETAILS = (*PROMPT_DETAILS, BASE_DETAIL)

_PLAIN = re.compile(r"[A-Za-z0-9 ]{1,80}")


@dataclass(frozen=True)
class VoiceRecord:
    """Prompts and base that a voice was trained on."""

    prompt_style: str
    details: dict[str, str] = field(default_factory=dict)  # lines of a card

    def table(self) -> dict[str, str]:
        """Lines of a card."""
        return {"prompt style": self.prompt_style, **self.details}


def base_detail(base_dtype: str | None) -> dict[str, str]:
    """The line of a card on `--base_dtype`, where it was given."""
    return {} if base_dtype is None else {BASE_DETAIL: f"frozen layers in {base_dtype}"}


def base_note(folder: Path, flag: str) -> str | None:
    """A line on an adapter that was trained on a quantized base, for who takes the base as it is."""
    record = read_record(folder, flag)
    if record is None or BASE_DETAIL not in record.details:
        return None
    return (
        f"{folder} was trained on a base with {record.details[BASE_DETAIL]}; taken here: the base as its files have it"
    )


def record_text(record: VoiceRecord) -> str:
    """The file's content."""
    details = {name: str(record.details[name]) for name in DETAILS if name in record.details}
    return json.dumps({"prompt_style": record.prompt_style, **details}, indent=2) + "\n"


def write_record(folder: Path, record: VoiceRecord) -> None:
    """Writes it into a folder. Raises OSError."""
    write_text(folder / RECORD, record_text(record))


def read_record(folder: Path, flag: str) -> VoiceRecord | None:
    """The record in a voice's folder; None where there is none.

    Args:
        flag: that named the folder, for the message.

    Raises:
        ConfigError: it cannot be read, or names a prompt style that there is not.
    """
    file = Path(folder) / RECORD
    if not os.path.isfile(file):  # whoever reads the folder itself says what is wrong with it
        return None
    raw = read_json(file, flag)
    style = raw.get("prompt_style")
    if style not in PROMPT_STYLES:
        raise ConfigError([f"{flag}: {file}: prompt_style {shown(style)} is not one of {', '.join(PROMPT_STYLES)}"])
    details = {name: raw[name] for name in DETAILS if isinstance(raw.get(name), str)}
    # A card is a table: what would end its cell or its line was not written by `write_record`.
    return VoiceRecord(style, {name: detail for name, detail in details.items() if _PLAIN.fullmatch(detail)})


def settled_style(asked: str | None, folder: Path | None, flag: str) -> tuple[str, str | None]:
    """The prompt style to speak with, and a line where it is the voice's own and not the default.

    Raises:
        ConfigError: `--prompt_style` asks for another style than the voice was trained on, or its record is broken.
    """
    record = None if folder is None else read_record(folder, flag)
    if asked and record and asked != record.prompt_style:
        raise ConfigError(
            [f"--prompt_style: {asked}, but {folder} was trained on {record.prompt_style} prompts; leave the flag out"]
        )
    style = asked or (record.prompt_style if record else SERVED)
    return style, f"prompt style {style}, as {folder} was trained" if style != SERVED and not asked else None
