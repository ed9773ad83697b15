"""higgs_ds.json, saved with an adapter or a merged model: prompt format and base used in training."""

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
# Rows of `cards.prompt_details`, in order; all DETAILS are kept for the merged model's card.
PROMPT_DETAILS = ("rows with a reference clip", "rows with a scene", "rows with a system turn")
BASE_DETAIL = "base in training"  # if it was not as in its files
DETAILS = (*PROMPT_DETAILS, BASE_DETAIL)

_PLAIN = re.compile(r"[A-Za-z0-9 ]{1,80}")


@dataclass(frozen=True)
class VoiceRecord:
    """Prompt format and base that a voice was trained with."""

    prompt_style: str
    details: dict[str, str] = field(default_factory=dict)  # rows of a card

    def table(self) -> dict[str, str]:
        """Rows of a card."""
        return {"prompt style": self.prompt_style, **self.details}


def base_detail(base_dtype: str | None) -> dict[str, str]:
    """A card's row on `--base_dtype`, if it was given."""
    return {} if base_dtype is None else {BASE_DETAIL: f"frozen layers in {base_dtype}"}


def base_note(folder: Path, flag: str) -> str | None:
    """A note for users of the full base with an adapter that was trained on a quantized one; None for none."""
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
    """Reads the record in a voice's folder; None if there is none.

    Args:
        flag: the flag that named the folder, for the message.

    Raises:
        ConfigError: unreadable, or an unknown prompt style.
    """
    file = Path(folder) / RECORD
    if not os.path.isfile(file):  # problems of the folder itself are reported by its own reader
        return None
    raw = read_json(file, flag)
    style = raw.get("prompt_style")
    if style not in PROMPT_STYLES:
        raise ConfigError([f"{flag}: {file}: prompt_style {shown(style)} is not one of {', '.join(PROMPT_STYLES)}"])
    details = {name: raw[name] for name in DETAILS if isinstance(raw.get(name), str)}
    # A card is a Markdown table: only plain words, so that a detail cannot break out of its cell.
    return VoiceRecord(style, {name: detail for name, detail in details.items() if _PLAIN.fullmatch(detail)})


def settled_style(asked: str | None, folder: Path | None, flag: str) -> tuple[str, str | None]:
    """The prompt style to speak with, and a note if it is the voice's own rather than the default.

    Raises:
        ConfigError: `--prompt_style` differs from the voice's, or its record is invalid.
    """
    record = None if folder is None else read_record(folder, flag)
    if asked and record and asked != record.prompt_style:
        raise ConfigError(
            [f"--prompt_style: {asked}, but {folder} was trained on {record.prompt_style} prompts; leave the flag out"]
        )
    style = asked or (record.prompt_style if record else SERVED)
    return style, f"prompt style {style}, as {folder} was trained" if style != SERVED and not asked else None
