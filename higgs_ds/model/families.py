"""The model families that are trained."""

from __future__ import annotations

from .family import Family
from .higgs_v2.family import HiggsV2

HIGGS_V2 = HiggsV2.name


def family_of(model_type: str) -> Family:
    """The family of a checkpoint by its config's `model_type`.

    Raises:
        KeyError: no family has this model type.
    """
    return {HIGGS_V2: HiggsV2()}[model_type]
