"""Norms and gated networks against upstream's; fails where another transformers computes something else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from higgs_ds.model.fused_mlp import FusedRmsNorm, add_mlps, adopt
from tests.model.test_fused_lora import share_masks, share_that_arrives

LIMITS = [(torch.float64, 5e-7), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]


def norm_of(size=48):
    norm = LlamaRMSNorm(size, eps=1e-5)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize(("dtype", "limit"), LIMITS, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_and_its_gradients_are_upstreams(dtype, limit, trained):
    torch.manual_seed(0)
    upstreams = nn.Sequential(norm_of()).to(dtype).requires_grad_(trained)
    ours = copy.deepcopy(upstreams)
    assert adopt(ours, FusedRmsNorm) == 1 and adopt(ours, FusedRmsNorm) == 1
    assert type(ours[0]) is FusedRmsNorm
    assert upstreams.state_dict().keys() == ours.state_dict().keys()
    rows, found = torch.randn(33, 48, dtype=dtype), []
    for block in (upstreams, ours):
        given = rows.clone().requires_grad_()
        out = block(given)
        out.float().pow(2).sum().backward()
        found.append([out, given.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    assert len(found[0]) == 2 + trained
    for wanted, got in zip(*found, strict=True):
        assert wanted.norm() > 0 and (got - wanted).norm() <= limit * wanted.norm()


def test_another_norm_is_left_alone():
    class Other(LlamaRMSNorm):
        pass

    model = nn.ModuleList([Other(8)])
    assert adopt(model, FusedRmsNorm) == 0 and type(model[0]) is Other


class Networks(nn.Module):
    """A network for the first rows and one for the others, added to what the rows were."""

    def __init__(self, activation="silu"):
        super().__init__()
        config = LlamaConfig(hidden_size=48, intermediate_size=80, hidden_act=activation, mlp_bias=False)
        self.text, self.audio = LlamaMLP(config), LlamaMLP(config)

    def forward(self, rows, residual, sizes):
        parts = rows.split(sizes)
        return residual + torch.cat([self.text(parts[0]), self.audio(parts[1])])


def networks_with_lora(targets, dropout=0.0, activation="silu"):
    torch.manual_seed(0)
    base = Networks(activation).requires_grad_(False)
    if not targets:
        return base, base
    config = LoraConfig(r=4, lora_alpha=10, lora_dropout=dropout, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(base, config), base


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


def outcome(model, run, rows, residual, sizes):
    """Output, and gradients of both inputs and of all that learns."""
    given, added = rows.clone().requires_grad_(), residual.clone().requires_grad_()
    out = run(given, added, sizes)
    out.float().pow(2).sum().backward()
    assert torch.equal(given, rows) and torch.equal(added, residual)  # neither was written to
    return [out, given.grad, added.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(("dtype", "limit"), LIMITS, ids=str)
@pytest.mark.parametrize("sizes", [[20, 13], [33, 0], [0, 33]], ids=str)
@pytest.mark.parametrize(
    ("targets", "dropout"),
    [((), 0.0), (PROJECTIONS, 0.0), (PROJECTIONS, 0.3), (["up_proj"], 0.3), (["down_proj"], 0.0)],
    ids=str,
)
def test_networks_and_their_gradients_are_upstreams(targets, dropout, sizes, dtype, limit, monkeypatch):
    model, theirs = networks_with_lora(targets, dropout)
    model.to(dtype).train()
    again = copy.deepcopy(model)
    ours = again.base_model.model if targets else again
    if dropout:
        share_masks(model, monkeypatch)
    rows, residual = torch.randn(33, 48, dtype=dtype), torch.randn(33, 48, dtype=dtype)
    wanted = outcome(model, theirs, rows, residual, sizes)
    got = outcome(again, lambda *given: add_mlps([ours.text, ours.audio], *given), rows, residual, sizes)
    assert len(wanted) == len(got) == 3 + 2 * 2 * len(targets)
    for one, other in zip(wanted, got, strict=True):
        assert (other - one).norm() <= limit * one.norm()
    assert all(one.norm() > 0 for one in wanted) or 0 in sizes


@pytest.mark.parametrize("term", [0.003, 0.001, 0.0005])
def test_a_small_term_of_down_proj_arrives_in_bf16(term):
    """LoRA's term in multiples of the residual, which is some seven times what the network adds to it."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=768, intermediate_size=2048, mlp_bias=False)
    base = nn.ModuleDict({"text": LlamaMLP(config), "audio": LlamaMLP(config)}).requires_grad_(False)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=["down_proj"], init_lora_weights=False)
    model = get_peft_model(base, settings).eval()
    for mlp in base.values():
        mlp.gate_proj.weight.normal_(0, 768**-0.5)
        mlp.up_proj.weight.normal_(0, 768**-0.5)
        mlp.down_proj.base_layer.weight.normal_(0, 0.15 / (0.6 * 2048**0.5))
        mlp.down_proj.lora_A["default"].weight.data.normal_(0, 1 / (0.6 * 2048**0.5))
        mlp.down_proj.lora_B["default"].weight.data.normal_(0, term / (2 * 16**0.5))
    model.to(torch.bfloat16)
    rows, residual, sizes = torch.randn(600, 768).bfloat16(), torch.randn(600, 768).bfloat16(), [200, 400]

    def computed(networks, run, dtype):
        return run([networks["text"], networks["audio"]], rows.to(dtype), residual.to(dtype), sizes)

    def pefts(mlps, given, added, parts):
        return added + torch.cat([mlp(part) for mlp, part in zip(mlps, given.split(parts), strict=True)])

    exact = copy.deepcopy(base).double()
    whole = computed(exact, pefts, torch.float64)
    for mlp in exact.values():
        mlp.down_proj.lora_B["default"].weight.data.zero_()
    without = computed(exact, pefts, torch.float64)
    own = whole - without
    assert 0.7 * term < own.pow(2).mean().sqrt() < 1.4 * term
    ours = share_that_arrives(computed(base, add_mlps, torch.bfloat16), without, own)
    assert 0.97 <= ours <= 1.03
    assert ours >= share_that_arrives(computed(base, pefts, torch.bfloat16), without, own) - 0.02


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.7), (0.3, 0.5)])
def test_networks_keep_less_than_upstreams(dropout, share):
    model, networks = networks_with_lora(PROJECTIONS, dropout)
    model.to(torch.bfloat16).train()
    rows = torch.randn(33, 48, dtype=torch.bfloat16).requires_grad_()
    ours = kept_for_backward(lambda: add_mlps([networks.text, networks.audio], rows, rows, [20, 13]))
    assert ours < share * kept_for_backward(lambda: networks(rows, rows, [20, 13]))


def test_a_network_of_another_kind_computes_itself():
    model, networks = networks_with_lora(PROJECTIONS, activation="gelu")
    rows, sizes = torch.randn(9, 48), [4, 5]
    assert torch.equal(add_mlps([networks.text, networks.audio], rows, rows, sizes), networks(rows, rows, sizes))
    networks.text.gate_proj.base_layer.weight.requires_grad_(True)  # learns: ours would give it no gradient
    add_mlps([networks.text, networks.audio], rows, rows, sizes).sum().backward()
    assert networks.text.gate_proj.base_layer.weight.grad.any()
