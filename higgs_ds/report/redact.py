"""Secrets kept out of what a run reports."""

from __future__ import annotations

import re
from typing import Any

SECRET_KEY = re.compile(r"api[_-]?key|access[_-]?key|private[_-]?key|secret|password|credential|token$", re.IGNORECASE)
# Keys such as eos_token or audio_out_token name an entry of the vocabulary.
VOCABULARY_KEY = re.compile(r"(^|_)(bos|eos|pad|unk|sep|cls|mask|text|audio|in|out)_token$", re.IGNORECASE)


def redact(config: dict) -> dict:
    """Return a copy of `config` with "[redacted]" for every value whose key names a key, token, secret or password.

    Counts and vocabulary entries (max_tokens_per_batch, text_tokens, eos_token) are kept, as are None and booleans.
    """
    return {key: _redact_value(str(key), value) for key, value in config.items()}


def _redact_value(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redact_value(key, item) for item in value]
    is_secret = SECRET_KEY.search(key) and not VOCABULARY_KEY.search(key)
    return "[redacted]" if is_secret and value is not None and not isinstance(value, bool) else value
