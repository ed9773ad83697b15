"""LoRA in one pass against PEFT's own layer; fails where another PEFT computes something else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from higgs_ds import lora
from higgs_ds.lora import OnePassLora, adopt_lora, dropped_by_bits, dropped_by_kernel


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
    config = LoraConfig(
        r=4, lora_alpha=10, lora_dropout=0.3, target_modules=["first", "second"], init_lora_weights=False
    )
    pefts = get_peft_model(Two(), config)
    ours = copy.deepcopy(pefts)
    assert adopt_lora(ours) == 2
    assert all(type(m) is OnePassLora for n, m in ours.named_modules() if n.endswith(("first", "second")))
    assert pefts.state_dict().keys() == ours.state_dict().keys()
    return pefts, ours


class Dropping(nn.Module):
    """A dropout that draws as ours does on a CPU, for PEFT's layer."""

    def __init__(self, probability):
        super().__init__()
        self.p = probability

    def forward(self, rows):
        _, kept, scale = dropped_by_bits(rows.detach(), self.p)
        return rows * kept * scale


@pytest.mark.parametrize("way", [dropped_by_bits, dropped_by_kernel])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_output_and_gradients_are_pefts_with_dropout(pair, dtype, way, monkeypatch):
    pefts, _ = pair
    if way is dropped_by_bits:
        for layer in (pefts.base_model.model.first, pefts.base_model.model.second):
            layer.lora_dropout["default"] = Dropping(0.3)
    monkeypatch.setattr(lora, "dropped_by_bits", way)  # the other is a GPU's, and runs here as well
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


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.99])
@pytest.mark.parametrize("way", [dropped_by_bits, dropped_by_kernel])
def test_dropout_keeps_its_share_everywhere_and_the_mean(way, probability):
    torch.manual_seed(2)
    rows = torch.ones(999, 1001)  # not a multiple of the four values that one draw serves
    dropped, kept, scale = way(rows, probability)
    assert kept.dtype == torch.bool and torch.equal(dropped, kept * torch.tensor(scale))
    assert scale == pytest.approx(1 / (1 - probability), rel=2e-3)
    share, deviation = 1 - probability, (probability * (1 - probability)) ** 0.5  # of one value
    flat = kept.flatten().float() - share
    for some in (flat, *(flat[place::4] for place in range(4))):  # four values share a draw
        assert abs(some.mean()) < 5 * deviation / some.numel() ** 0.5
    neighbours = flat[:-1] * flat[1:]
    assert abs(neighbours.mean()) < 5 * deviation**2 / neighbours.numel() ** 0.5
    assert not torch.equal(way(rows, probability)[1], kept)


def test_dropout_of_no_rows_and_of_nearly_everything():
    assert dropped_by_bits(torch.ones(0, 24), 0.1)[0].shape == (0, 24)
    dropped, kept, scale = dropped_by_bits(torch.ones(64, 64), 0.999999)
    assert scale == 2**16 and torch.isfinite(dropped).all() and kept.float().mean() < 0.01


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
