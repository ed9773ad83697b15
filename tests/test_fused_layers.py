"""Norms and gated networks against upstream's; fails where another transformers computes something else."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from higgs_ds.fused_layers import FusedMlp, FusedRmsNorm, adopt_layers


class Block(nn.Module):
    def __init__(self, activation="silu"):
        super().__init__()
        self.norm = LlamaRMSNorm(48, eps=1e-5)
        self.norm.weight.data.uniform_(0.5, 1.5)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=48, intermediate_size=80, hidden_act=activation, mlp_bias=False))

    def forward(self, rows):
        return self.mlp(self.norm(rows))


def kept_for_backward(run) -> int:
    """Bytes, without weights."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter) and tensor._base is None:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 5e-7), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("trained", [False, True])
def test_output_and_gradients_are_upstreams(dtype, limit, trained):
    torch.manual_seed(0)
    upstreams = Block().to(dtype).requires_grad_(trained)
    ours = copy.deepcopy(upstreams)
    assert adopt_layers(ours) == 2 and adopt_layers(ours) == 2
    assert (type(ours.norm), type(ours.mlp)) == (FusedRmsNorm, FusedMlp)
    assert upstreams.state_dict().keys() == ours.state_dict().keys()
    rows, found = torch.randn(33, 48, dtype=dtype), []
    for block in (upstreams, ours):
        given = rows.clone().requires_grad_()
        out = block(given)
        out.float().pow(2).sum().backward()
        found.append([out, given.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    assert len(found[0]) == 2 + 4 * trained
    for wanted, got in zip(*found, strict=True):
        assert wanted.norm() > 0 and (got - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gated_network_is_upstreams_to_the_bit_and_keeps_less(dtype):
    torch.manual_seed(0)
    upstreams = Block().mlp.to(dtype).requires_grad_(False)
    ours = copy.deepcopy(upstreams)
    adopt_layers(ours)
    rows = torch.randn(33, 48, dtype=dtype)
    gradients = []
    for mlp in (upstreams, ours):
        given = rows.clone().requires_grad_()
        mlp(given).float().pow(2).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    rows.requires_grad_()
    assert kept_for_backward(lambda: ours(rows)) < 0.7 * kept_for_backward(lambda: upstreams(rows))


def test_what_is_something_else_is_left_alone():
    class Other(LlamaRMSNorm):
        pass

    model = nn.ModuleList([Other(8), Block("gelu").mlp])
    assert adopt_layers(model) == 0 and [type(m) for m in model] == [Other, LlamaMLP]
