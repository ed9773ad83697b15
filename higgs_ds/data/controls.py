"""Control tokens, which texts must not contain: the tokenizer would turn them into real control ids."""

from __future__ import annotations

import re

# The collator finds clips by these tokens; one inside a text would stand for a missing clip.
AUDIO_PLACEHOLDERS = ("<|AUDIO|>", "<|AUDIO_OUT|>")
# Markup in system and user turns of Boson's own prompts.
MARKUP = frozenset(
    "<|scene_desc_start|> <|scene_desc_end|> <|generation_instruction_start|> <|generation_instruction_end|>".split()
)
# Control tokens of all tokenizers of this family, for use without a checkpoint.
_FAMILY = (
    "begin_of_text end_of_text start_header_id end_header_id eom_id eot_id audio_bos audio_eos audio_out_bos AUDIO "
    "AUDIO_OUT recipient scene_desc_start scene_desc_end generation_instruction_start generation_instruction_end"
).split()
# Sound tags are special tokens that texts may contain: <SE>[Laughter]</SE>, <SE_s>, <SE_e>. So are the tags of Higgs
# TTS 3 for sounds and delivery, such as <|sfx:laughter|>.
_SOUND_TAG = re.compile(r"</?SE(_[A-Za-z]+)?>|\[[^\[\]]*\]")
_TAG = re.compile(r"<\|(emotion|style|sfx|prosody):\w+\|>")

DEFAULT_CONTROLS = re.compile(
    "|".join(re.escape(f"<|{name}|>") for name in _FAMILY) + r"|<\|reserved_special_token_\d+\|>"
)


def control_tokens(tokenizer) -> re.Pattern[str]:
    """Returns the pattern for `find_control`: a tokenizer's special tokens without sound tags, and the placeholders.

    Tags such as `<|sfx:laughter|>`, which texts may contain, are in its group `tag`.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special or re.fullmatch(r"<\|.*\|>", token.content)}
    special.update(getattr(tokenizer, "all_special_tokens", ()), AUDIO_PLACEHOLDERS)
    tokens = sorted((t for t in special if t and not _SOUND_TAG.fullmatch(t)), key=lambda t: (-len(t), t))
    tags = [token for token in tokens if _TAG.fullmatch(token)]
    pattern = "|".join(re.escape(token) for token in tokens if token not in tags)
    return re.compile(f"{pattern}|(?P<tag>{'|'.join(map(re.escape, tags))})" if tags else pattern)


def without_tags(text: str, controls: re.Pattern[str]) -> str:
    """Removes the model's tags for sounds and delivery, which are not spoken."""
    return controls.sub(lambda found: "" if found.lastgroup == "tag" else found[0], text)


def find_control(text: str, controls: re.Pattern[str], *, markup: bool = False) -> str | None:
    """Returns the problem of a text with a control token, or None; `markup` allows the tokens of a scene."""
    if controls.search(text) is None:
        return None
    for found in controls.finditer(text):
        token = found[0]
        if found.lastgroup == "tag":
            continue
        if token in AUDIO_PLACEHOLDERS:
            return f"contains {token}, which stands for a clip; give clips as audio content"
        if not (markup and token in MARKUP):
            return f"contains {token}, which is a control token of the tokenizer; remove it"
    return None
