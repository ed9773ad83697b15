"""LoRA in one pass against PEFT's own layer; fails where another PEFT computes something else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from higgs_ds.lora import OnePassLora, adopt_lora


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.fixture
def pair():
    """The same LoRA model twice: PEFT's, and ours."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=10, lora_dropout=0.3, target_modules=["first", "second"], init_lora_weights=False)
    pefts = get_peft_model(Two(), lora)
    ours = copy.deepcopy(pefts)
    assert adopt_lora(ours) == 2
    assert all(type(m) is OnePassLora for n, m in ours.named_modules() if n.endswith(("first", "second")))
    assert pefts.state_dict().keys() == ours.state_dict().keys()
    return pefts, ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_and_gradients_are_pefts_with_dropout(pair, dtype):
    found = []
    for model in pair:
        model.to(dtype).train()
        rows = torch.linspace(-1, 1, 6 * 24, dtype=dtype).view(6, 24).requires_grad_()
        torch.manual_seed(1)
        out = model(rows)
        out.float().pow(2).sum().backward()
        found.append([out, rows.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    limit = 1e-12 if dtype == torch.float64 else 2e-2
    assert len(found[0]) == 2 + 4
    for wanted, ours in zip(*found, strict=True):
        assert (ours - wanted).norm() <= limit * wanted.norm() and wanted.norm() > 0


def test_what_is_not_plain_is_pefts(pair):
    pefts, ours = (model.eval() for model in pair)
    sequences, rows = torch.randn(2, 3, 24), torch.randn(5, 24)
    assert torch.equal(ours(sequences), pefts(sequences))
    with ours.disable_adapter(), pefts.disable_adapter():
        assert torch.equal(ours(rows), pefts(rows))
    ours.merge_adapter()
    pefts.merge_adapter()
    assert torch.equal(ours(rows), pefts(rows))
    ours.unmerge_adapter()
    pefts.unmerge_adapter()
    assert torch.allclose(ours(rows), pefts(rows), atol=1e-5)
