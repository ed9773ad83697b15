"""Settings of torch's memory allocator on a GPU; imported before torch, which it must not import."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# torch 2.11 looks at these in this order and takes the first that is set.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets the allocator's segments grow, unless the user has set it up otherwise.

    Every micro-batch has another size: fixed segments would leave gaps that the next one does not fit into.
    """
    if not any(name in environment for name in VARIABLES):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
