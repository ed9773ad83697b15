"""What the licence of Higgs TTS 3 asks of those who pass a derivative on: lines for its card and its NOTICE.

LoRA weights and merged models are derivatives: their maker owns them, and passes them on under the same licence only.
"""

from __future__ import annotations

LICENCE = "Boson Higgs TTS 3 Research and Non-Commercial License"
NOTICE = f"Boson Higgs TTS 3 is licensed under the {LICENCE}, Copyright (c) Boson AI USA, Inc. All Rights Reserved."
DERIVED = "Derived from Higgs TTS 3, licensed from Boson AI USA, Inc."


def card_section(changed: str) -> str:
    """The section on the licence of a model card; `changed` says what was changed, as a sentence."""
    return (
        f"## Licence\n\n{DERIVED} {changed}\n\n{NOTICE}\n\n"
        f"It may be used, changed and passed on under the {LICENCE} alone: for research and other non-commercial ends. "
        "Pass that licence and this notice on with it, keep the sentences above in its card, documentation and "
        'download page, and give it no name that begins with "Higgs TTS 3". It and its speech must not train other '
        "generative models, and no real person's voice may be cloned without their explicit, verifiable consent.\n"
    )
