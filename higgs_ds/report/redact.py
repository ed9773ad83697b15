"""Removal of secrets from the config shown in W&B; a DeepSpeed file may contain some."""

from __future__ import annotations

import re
from typing import Any

SECRET_KEY = re.compile(r"api[_-]?key|access[_-]?key|private[_-]?key|secret|password|credential|token$", re.IGNORECASE)


def redact(value: Any, key: str = "") -> Any:
    """Copies a config, with "[redacted]" for values under keys that suggest a key, token, secret or password."""
    if isinstance(value, dict):
        return {name: redact(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    return "[redacted]" if SECRET_KEY.search(key) and value is not None else value
