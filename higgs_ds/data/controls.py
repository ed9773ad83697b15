"""Tokens that steer the model, which a text must not hold: the tokenizer would make real control ids of them."""

from __future__ import annotations

import re

# The collator finds clips by these tokens, so one inside a text would be taken for a clip that is not there.
AUDIO_PLACEHOLDERS = ("<|AUDIO|>", "<|AUDIO_OUT|>")
# Markup that Boson's own prompts put into the text of a system or user turn.
MARKUP = frozenset(
    "<|scene_desc_start|> <|scene_desc_end|> <|generation_instruction_start|> <|generation_instruction_end|>".split()
)
# For what is read without a checkpoint: the control tokens that all tokenizers of this family have.
_FAMILY = (
    "begin_of_text end_of_text start_header_id end_header_id eom_id eot_id audio_bos audio_eos audio_out_bos AUDIO "
    "AUDIO_OUT recipient scene_desc_start scene_desc_end generation_instruction_start generation_instruction_end"
).split()
# Sound tags are special tokens too, and are meant to stand in a text: <SE>[Laughter]</SE>, <SE_s>, <SE_e>. So are
# Higgs TTS 3's tags of sound and delivery, such as <|sfx:laughter|>.
_SOUND_TAG = re.compile(r"</?SE(_[A-Za-z]+)?>|\[[^\[\]]*\]")
_TAG = re.compile(r"<\|(emotion|style|sfx|prosody):\w+\|>")

DEFAULT_CONTROLS = re.compile(
    "|".join(re.escape(f"<|{name}|>") for name in _FAMILY) + r"|<\|reserved_special_token_\d+\|>"
)


def control_tokens(tokenizer) -> re.Pattern[str]:
    """Pattern of `find_control`: every special token of a tokenizer but its sound tags, and the placeholders.

    Tags such as `<|sfx:laughter|>` are its group `tag`, which a text may hold.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special or re.fullmatch(r"<\|.*\|>", token.content)}
    special.update(getattr(tokenizer, "all_special_tokens", ()), AUDIO_PLACEHOLDERS)
    tokens = sorted((t for t in special if t and not _SOUND_TAG.fullmatch(t)), key=lambda t: (-len(t), t))
    tags = [token for token in tokens if _TAG.fullmatch(token)]
    pattern = "|".join(re.escape(token) for token in tokens if token not in tags)
    return re.compile(f"{pattern}|(?P<tag>{'|'.join(map(re.escape, tags))})" if tags else pattern)


def without_tags(text: str, controls: re.Pattern[str]) -> str:
    """A text without the tags that the model knows, which nobody reads aloud."""
    return controls.sub(lambda found: "" if found.lastgroup == "tag" else found[0], text)


def find_control(text: str, controls: re.Pattern[str], *, markup: bool = False) -> str | None:
    """Problem of a text that holds a control token; `markup` lets those pass that mark a scene."""
    if controls.search(text) is None:
        return None
    for found in controls.finditer(text):
        token = found[0]
        if found.lastgroup == "tag":
            continue
        if token in AUDIO_PLACEHOLDERS:
            return f"holds {token}, which stands for a clip; give clips as audio content"
        if not (markup and token in MARKUP):
            return f"holds {token}, which the tokenizer makes a control token of; take it out"
    return None
