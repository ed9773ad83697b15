"""PEFT's LoRA layer with one pass over the output instead of three: the update is added by the product that makes it.

PEFT computes `base(x) + lora_B(lora_A(dropout(x))) * scaling`: three tensors as large as the output. Modules, weights
and names stay PEFT's, so that saving, merging and ZeRO-3's gathering know them as before.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn


class _Adding(nn.Linear):
    """`lora_B`, which adds to what it is given."""

    def forward(self, rows: torch.Tensor, onto: torch.Tensor | None = None, scaling: float = 1.0) -> torch.Tensor:
        if onto is None:
            return super().forward(rows)
        return torch.addmm(onto, rows, self.weight.t(), alpha=scaling)


class OnePassLora(PeftLinear):
    """LoRA on [rows, features]; whatever is not plain LoRA in training is left to PEFT."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        adapters = self.active_adapters
        plain = len(adapters) == 1 and x.ndim == 2 and not (self.disable_adapters or self.merged or args or kwargs)
        if not plain or adapters[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        (name,) = adapters
        down = self.lora_A[name](self.lora_dropout[name](x))
        return self.lora_B[name](down, self.base_layer(x), self.scaling[name])


def adopt_lora(model: nn.Module) -> int:
    """Turns PEFT's linear LoRA layers into these, in place; returns how many."""
    layers = [module for module in model.modules() if type(module) is PeftLinear]
    for layer in layers:
        layer.__class__ = OnePassLora
        for up in layer.lora_B.values():
            if type(up) is nn.Linear and up.bias is None:
                up.__class__ = _Adding
            else:
                layer.__class__ = PeftLinear
    return sum(isinstance(layer, OnePassLora) for layer in layers)
