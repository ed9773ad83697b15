"""The names of LoRA's weights: in the module that is trained, and in PEFT's files."""

from __future__ import annotations

ADAPTER = "default"  # PEFT's name for the one adapter
TRAINING_MODULE = "model."  # what the training forward adds before PEFT's names


def peft_key(name: str) -> str:
    """A weight's name in the training module, or in the PEFT model within it -> its key in PEFT's file."""
    return name.removeprefix(TRAINING_MODULE).replace(f".{ADAPTER}.", ".")
