"""Two places for tensors on a machine that has one: what lives on the CPU by design, and what would be on the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class Residence(TorchDispatchMode):
    """Follows tensors as a device does: a result of host tensors alone is a host tensor, `.to(…)` moves one to the
    device and `.cpu()` back. Collectives refuse host tensors, as NCCL does; `host_only` refuses all others anywhere.
    """

    def __init__(self):
        super().__init__()
        self._host: dict[int, torch.Tensor] = {}  # by storage, kept alive so that no other gets its place
        self.host_only = False
        self.collectives = 0

    def put_on_host(self, tensors) -> None:
        for tensor in tensors:
            self._host[tensor.untyped_storage()._cdata] = tensor

    def on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        collective = func.namespace == "c10d"
        self.collectives += collective
        if collective and any(map(self.on_host, given)):
            raise RuntimeError(f"{func.name()}: a tensor of the CPU in a GPU's collective")
        if self.host_only and not all(map(self.on_host, given)):
            raise RuntimeError(f"{func.name()}: a tensor of the GPU where only the host may be touched")
        out = func(*args, **(kwargs or {}))
        if not collective and given and all(map(self.on_host, given)):
            self.put_on_host(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out

    @contextlib.contextmanager
    def watching(self) -> Iterator[Residence]:
        """Inside, the mode is on and moves between the two places are seen, though both are the CPU."""
        to, cpu = torch.Tensor.to, torch.Tensor.cpu

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            with _disable_current_modes():
                return tensor.detach().clone()

        def moved_to(tensor, *args, **kwargs):
            place = kwargs.get("device", args[0] if args else None)
            out = to(tensor, *args, **kwargs)
            return copy(out) if isinstance(place, (str, torch.device)) and self.on_host(out) else out

        def moved_back(tensor, *args, **kwargs):
            out = copy(tensor)
            self.put_on_host([out])
            return out

        torch.Tensor.to, torch.Tensor.cpu = moved_to, moved_back
        try:
            with self:
                yield self
        finally:
            torch.Tensor.to, torch.Tensor.cpu = to, cpu


def tensors_within(value: object, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, through containers, attributes and what a function closes over."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, ModuleType)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        return
    parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        parts += value.values()
    elif isinstance(value, (list, tuple, set)):
        parts += value
    parts += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    parts += [value.__self__] if hasattr(value, "__self__") else []
    for part in parts:
        yield from tensors_within(part, seen)
