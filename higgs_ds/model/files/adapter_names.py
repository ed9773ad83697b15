"""Names of trained parameters, in the model and in PEFT's files, and the layers that a name selects."""

from __future__ import annotations

from collections.abc import Iterable

ADAPTER = "default"  # PEFT's name for the one adapter
TRAINING_MODULE = "model."  # what the training forward adds before PEFT's names
PREFIX = "base_model.model."  # before a module's name in PEFT's files


def peft_key(name: str) -> str:
    """A weight's name in the training module, or in the PEFT model within it -> its key in PEFT's file.

    A module that is trained whole has the same name in both: there PEFT leaves its own part of a name away.
    """
    return name.removeprefix(TRAINING_MODULE).replace(f".{ADAPTER}.", ".")


def names_layer(target: str, module: str) -> bool:
    """True where a target, as in `target_modules`, means a module: its name, or the end of its path."""
    return module == target or module.endswith("." + target)


def layers_named(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Modules that one of the targets means, in their order."""
    targets = list(targets)
    return [module for module in modules if any(names_layer(target, module) for target in targets)]


def naming_nothing(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Targets that mean none of the modules, in their order."""
    modules = list(modules)
    return [target for target in targets if not any(names_layer(target, module) for module in modules)]
