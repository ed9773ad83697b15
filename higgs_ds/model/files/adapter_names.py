"""Names of trained parameters in the model and in PEFT's files, and matching of layers by name."""

from __future__ import annotations

from collections.abc import Iterable

ADAPTER = "default"  # PEFT's name for the one adapter
TRAINING_MODULE = "model."  # prefix that the training forward adds to PEFT's names
PREFIX = "base_model.model."  # prefix of a module's name in PEFT's files


def peft_key(name: str) -> str:
    """Key in PEFT's file of a weight named as in the training module or in the PEFT model inside it.

    A module that is trained in full has the same name in both.
    """
    return name.removeprefix(TRAINING_MODULE).replace(f".{ADAPTER}.", ".")


def names_layer(target: str, module: str) -> bool:
    """True if a target, as in `target_modules`, is the module's full name or the end of its path."""
    return module == target or module.endswith("." + target)


def layers_named(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Modules matched by at least one target, in their order."""
    targets = list(targets)
    return [module for module in modules if any(names_layer(target, module) for target in targets)]


def naming_nothing(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Targets that match no module, in their order."""
    modules = list(modules)
    return [target for target in targets if not any(names_layer(target, module) for module in modules)]
