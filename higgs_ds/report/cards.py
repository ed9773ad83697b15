"""README.md of an adapter and of a merged checkpoint: what it was trained with, and how each stack speaks with it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from ..data.chatml import BOSON_EXAMPLE, SYSTEM_PROMPT, AudioRef, Row
from ..errors import ConfigError
from ..model.files.layouts import BOSON, TRANSFORMERS
from ..model.voice_record import PROMPT_FACTS
from ..options.sections import revision_of
from ..process import loss_text

COUNTED_ROWS = 1000
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.95}  # as vllm-omni serves
SPEAK = "--text 'All circuits are busy now.' --output_file speech.wav --overwrite"
SAMPLER_NOTE = """Sampler: greedy gives the training sentences back (`--sampler greedy`). vllm-omni draws with
temperature 1.0, top-k 50, top-p 0.95 and repetition-aware resampling, window 7, at most 2 repeats
(`--sampler served`); boson_multimodal's engine with temperature 0.7, top-p 0.95 and the same resampling
(`--sampler boson`)."""


def pinned(name: str, revision: str | None) -> tuple[str, str | None]:
    """A base as a snippet names it from any folder: a local one by its whole path, Boson's at its revision."""
    if os.path.isdir(name):
        return os.path.abspath(name), None
    return name, revision_of(name, revision)


def prompt_facts(rows: Sequence[Row]) -> dict[str, object]:
    """Lines of a card on the prompts of the training rows, from the first of them."""
    counted = [rows[place] for place in islice(range(len(rows)), COUNTED_ROWS)]
    clips = [sum(isinstance(p, AudioRef) for turn in row.messages for p in turn.content) for row in counted]
    scenes = sum(row.has_scene for row in counted)
    systems = sum(row.messages[0].role == "system" for row in counted)
    of = f"of {len(counted)} rows" if len(counted) == len(rows) else f"of the first {len(counted)} rows"
    counts = (sum(n > 1 for n in clips), scenes, systems)
    return {fact: f"{count} {of}" for fact, count in zip(PROMPT_FACTS, counts, strict=True)}


def adapter_card(
    table: dict[str, object],
    *,
    base: str,
    revision: str | None,
    layout: str,
    codec: str,
    codec_revision: str | None,
    folder: Path,
) -> str:
    """Of a LoRA adapter.

    Args:
        table: what it was trained with, a line each.
        base: as `pinned` gives it, with `revision`.
        layout: of the base.
        codec: hub id or folder, with its revision.
        folder: where the adapter lies.
    """
    place = str(folder.resolve())
    where = _flags(base_ckpt=base, base_revision=revision, adapter=place)
    tokenizer = _codec_flags(codec, codec_revision)
    served = f"{tokenizer} " if _is_served(codec) else ""
    at = f", revision={revision!r}" if revision else ""
    peft = f"""
In boson_multimodal, with peft:

```python
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel

model = HiggsAudioModel.from_pretrained({base!r}{at})
model = PeftModel.from_pretrained(model, {place!r}).merge_and_unload()
```
"""
    return f"""---
library_name: peft
base_model: {base}
pipeline_tag: text-to-speech
---
# LoRA adapter for Higgs Audio v2

{_table(table)}

```bash
python -m higgs_ds generate {where} {tokenizer} {SPEAK}
```
{peft if layout == BOSON else ""}
No server applies an adapter to this model: merge it, then serve the folder, whose README.md says how.

```bash
python -m higgs_ds merge {where} {served}--output_dir {shlex.quote(place + "-merged")} --layout transformers
```

{SAMPLER_NOTE}
{_prompt_note(table)}The base's licence holds for what is made of it.

Trained with higgs_ds.
"""


def merged_card(
    table: dict[str, object],
    *,
    base: str,
    revision: str | None,
    layout: str,
    codec: str,
    codec_revision: str | None,
    folder: Path,
) -> str:
    """Of a merged checkpoint; the arguments are `adapter_card`'s, `layout` is that of the folder."""
    place = str(folder.resolve())
    at = f" at revision `{revision}`" if revision else ""
    rows = {"base": f"`{base}`{at}", **table, "layout": layout}
    speak = _in_transformers(place) if layout == TRANSFORMERS else _in_boson(place, codec, codec_revision)
    return f"""---
base_model: {base}
pipeline_tag: text-to-speech
---
# Higgs Audio v2 with a trained voice merged in

{_table(rows)}

{speak}
higgs_ds:

```bash
python -m higgs_ds generate --merged {shlex.quote(place)} {_codec_flags(codec, codec_revision)} {SPEAK}
```

{SAMPLER_NOTE}
{_prompt_note(table)}The base's licence holds for what is made of it. Merged with higgs_ds.
"""


def _in_transformers(place: str) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in SAMPLING.items())
    return f"""transformers 5.3 and later:

```python
from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration

processor = AutoProcessor.from_pretrained({place!r})
model = HiggsAudioV2ForConditionalGeneration.from_pretrained({place!r}, dtype="auto")
messages = [
    {{"role": "system", "content": {SYSTEM_PROMPT!r}}},
    {{"role": "user", "content": "All circuits are busy now."}},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
codes = model.generate(**inputs, max_new_tokens=1024, {settings})
processor.save_audio(processor.decode(codes), "speech.wav")
```

vllm-omni serves the same folder (no scene, 1,024 frames at most):

```bash
vllm serve {shlex.quote(place)} --omni
```
"""


def _in_boson(place: str, codec: str, codec_revision: str | None) -> str:
    here = os.path.isdir(codec)
    revision = revision_of(codec, codec_revision)
    fetch = f"snapshot_download({codec!r}{f', revision={revision!r}' if revision else ''})"
    return f"""boson_multimodal:

```python
import soundfile
import torch
from boson_multimodal.data_types import ChatMLSample, Message
from boson_multimodal.serve.serve_engine import HiggsAudioServeEngine
{"" if here else "from huggingface_hub import snapshot_download" + chr(10)}
codec = {repr(_found(codec)) if here else fetch}
device = "cuda" if torch.cuda.is_available() else "cpu"
engine = HiggsAudioServeEngine({place!r}, codec, device=device)
sample = ChatMLSample(
    messages=[
        Message(role="system", content={SYSTEM_PROMPT!r}),
        Message(role="user", content="All circuits are busy now."),
    ]
)
said = engine.generate(sample, max_new_tokens=1024, temperature=0.7, top_p=0.95, force_audio_gen=True)
soundfile.write("speech.wav", said.audio, said.sampling_rate)
```
"""


def _prompt_note(table: dict[str, object]) -> str:
    """A warning of how a voice trained on boson_multimodal's prompts must not be served."""
    if table.get("prompt style") != BOSON_EXAMPLE:
        return ""
    return (
        "Prompts: as boson_multimodal's example builds them. Before a reference clip they have no system turn, which "
        "transformers and\nvllm-omni always build: clone a voice in boson_multimodal or with `generate`.\n"
    )


def _found(codec: str) -> str:
    """A codec as a command names it from any folder."""
    return os.path.abspath(codec) if os.path.isdir(codec) else codec


def _codec_flags(codec: str, revision: str | None) -> str:
    return _flags(codec=_found(codec), codec_revision=None if os.path.isdir(codec) else revision)


def _is_served(codec: str) -> bool:
    """True where transformers' processor could load it, which the sample codec and Boson's own folder are not for."""
    from ..model.files.processor_files import codec_reference

    try:
        codec_reference(codec, TRANSFORMERS)
    except ConfigError:
        return False
    return True


def _flags(**values: str | None) -> str:
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in values.items() if value)


def _table(rows: dict[str, object]) -> str:
    lines = [f"| {key} | {loss_text(value) if isinstance(value, float) else value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
