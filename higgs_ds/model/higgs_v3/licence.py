"""Notices that the licence of Higgs TTS 3 requires for derivatives such as LoRA weights and merged models."""

from __future__ import annotations

NOTICE = (
    "Boson Higgs TTS 3 is licensed under the Boson Higgs TTS 3 Research and Non-Commercial License, "
    "Copyright (c) Boson AI USA, Inc. All Rights Reserved."
)
DERIVED = "Derived from Higgs TTS 3, licensed from Boson AI USA, Inc."
