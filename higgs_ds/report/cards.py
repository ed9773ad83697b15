"""Model cards (README.md) of adapters and merged checkpoints: training details, and how to use the voice.

The texts are in `templates/*.md.j2`; this file collects their values.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2

from ..data.chatml import SYSTEM_PROMPT, AudioRef, Row
from ..errors import ConfigError
from ..model.higgs_v2.layouts import TRANSFORMERS
from ..model.higgs_v3.family import LAYOUT as NATIVE
from ..model.higgs_v3.licence import DERIVED, NOTICE
from ..model.voice_record import PROMPT_DETAILS
from ..options.sections import revision_of
from ..process import loss_text

COUNTED_ROWS = 1000
SPEAK = "--text 'All circuits are busy now.' --output_file speech.wav --overwrite"


def pinned(name: str, revision: str | None) -> tuple[str, str | None]:
    """Returns a base's name and revision for a snippet: an absolute path, or a hub id with its revision."""
    if os.path.isdir(name):
        return os.path.abspath(name), None
    return name, revision_of(name, revision)


def prompt_details(rows: Sequence[Row]) -> dict[str, object]:
    """Counts features of the training prompts over the first rows, as rows of a card."""
    counted = [rows[place] for place in islice(range(len(rows)), COUNTED_ROWS)]
    clips = [sum(isinstance(p, AudioRef) for turn in row.messages for p in turn.content) for row in counted]
    scenes = sum(row.has_scene for row in counted)
    systems = sum(row.messages[0].role == "system" for row in counted)
    of = f"of {len(counted)} rows" if len(counted) == len(rows) else f"of the first {len(counted)} rows"
    counts = (sum(n > 1 for n in clips), scenes, systems)
    return {detail: f"{count} {of}" for detail, count in zip(PROMPT_DETAILS, counts, strict=True)}


def adapter_card(table: dict[str, object], *, base: str, revision: str | None, folder: Path, **more: Any) -> str:
    """Renders the card of a LoRA adapter.

    Args:
        table: training details by name.
        base: from `pinned`, with `revision`.
        folder: the adapter's folder.
        more: `layout` of the base; `codec`, a hub id or folder, with `codec_revision`.
    """
    voice_flags = _flags(base_ckpt=base, base_revision=revision, adapter=str(folder.resolve()))
    details = {"rows": table, "base": base, "revision": revision, "voice_flags": voice_flags}
    return _card("adapter", details, folder, **more)


def merged_card(table: dict[str, object], *, base: str, revision: str | None, folder: Path, **more: Any) -> str:
    """Renders the card of a merged checkpoint; arguments as in `adapter_card`, with `layout` of the folder."""
    at = f" at revision `{revision}`" if revision else ""
    rows = {"base": f"`{base}`{at}", **table, "layout": more["layout"]}
    return _card("merged", {"rows": rows, "base": base}, folder, **more)


def _card(
    template: str, details: dict[str, Any], folder: Path, *, layout: str, codec: str, codec_revision: str | None
) -> str:
    codec_folder = os.path.abspath(codec) if os.path.isdir(codec) else None
    codec_flags = _flags(codec=codec_folder or codec, codec_revision=None if codec_folder else codec_revision)
    details |= {"codec": codec, "codec_folder": codec_folder, "codec_revision": revision_of(codec, codec_revision)}
    details |= {"codec_flags": codec_flags, "is_served": _is_served(codec), "layout": layout}
    details |= {"place": str(folder.resolve()), "speak": SPEAK, "system_prompt": SYSTEM_PROMPT}
    details |= {"derived": DERIVED, "notice": NOTICE}
    name = f"{template}_v3.md.j2" if layout == NATIVE else f"{template}.md.j2"
    return _templates().get_template(name).render(details)


@cache
def _templates() -> jinja2.Environment:
    """Loads the templates, Markdown with code: no HTML escaping; values are quoted by `repr` and `quote`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **blocks)
    environment.filters |= {"repr": repr, "quote": shlex.quote, "loss_text": loss_text}
    return environment


def _is_served(codec: str) -> bool:
    """Checks if transformers' processor can load the codec; it cannot load the sample codec or Boson's own folder."""
    from ..model.higgs_v2.processor_files import codec_reference

    try:
        codec_reference(codec, TRANSFORMERS)
    except ConfigError:
        return False
    return True


def _flags(**values: str | None) -> str:
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in values.items() if value)
