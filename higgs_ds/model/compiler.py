"""Availability of torch.compile's toolchain, and the time spent compiling."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
import torch._dynamo

from ..errors import ConfigError


def seconds_compiling() -> float:
    """Seconds that this process has spent compiling so far."""
    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


def check_compiler(device_type: str) -> None:
    """Checks for the C++ compiler and headers that torch.compile needs.

    Raises:
        ConfigError: naming what is missing.
    """
    variable, usual = ("CXX", ["g++"]) if device_type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not any(map(shutil.which, names)):
        found = f"there is no {' and no '.join(names)} here (apt-get install g++, or its path as {variable})"
    elif not header.is_file():
        found = f"{header} is not here (apt-get install python3-dev)"
    else:
        return
    raise ConfigError([f"--compile: torch.compile builds kernels with a compiler, but {found}; or leave it out"])
