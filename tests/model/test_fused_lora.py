"""Groups of projections with LoRA against PEFT's own layers; fails where another PEFT computes something else."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from higgs_ds.model import fused_lora as lora
from higgs_ds.model.fused_head import FusedHead
from higgs_ds.model.fused_lora import (
    LoraHead,
    Projection,
    ProjectionGroup,
    dropout_by_bits,
    dropout_by_kernel,
    dropout_factor,
    project,
)

EVERY, SOME = ["q", "k", "v"], ["q", "v"]


class Three(nn.Module):
    """Three projections of one input."""

    def __init__(self, bias=False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 40, bias), nn.Linear(24, 16, bias), nn.Linear(24, 16, bias)

    def forward(self, rows):
        return [self.q(rows), self.k(rows), self.v(rows)]


def with_lora(targets=EVERY, *, dropout=0.3, bias=False, base=None, **settings):
    """PEFT on `Three`, ranks and scalings different from layer to layer."""
    torch.manual_seed(0)
    patterns = {"rank_pattern": {"v": 7}, "alpha_pattern": {"q": 3}}
    config = LoraConfig(
        r=4, lora_alpha=10, lora_dropout=dropout, target_modules=targets, init_lora_weights=False, **patterns | settings
    )
    return get_peft_model(base or Three(bias), config)


def layers_of(model):
    inner = model.base_model.model
    return [inner.q, inner.k, inner.v]


def same_mask(rows, probability):
    """A dropout that gives rows of one shape one mask, so that PEFT's layers share it as ours do."""
    draw = torch.Generator().manual_seed(rows.shape[-1])
    kept = torch.rand(rows.shape, generator=draw) >= probability
    return rows * kept * dropout_factor(probability, "cpu"), kept


class SameMask(nn.Module):
    def __init__(self, probability):
        super().__init__()
        self.p = probability

    def forward(self, rows):
        return same_mask(rows, self.p)[0]


def share_masks(model, monkeypatch):
    """PEFT's layers and ours drop out the same."""
    monkeypatch.setattr(lora, "dropout_by_bits", same_mask)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = SameMask(module.lora_dropout["default"].p)


def assert_same(pefts, ours, limit, *, learned, rows_learn=True):
    """Outputs and gradients of `pefts()` and `ours()`, each (outputs, rows, model)."""
    found = []
    for run in (pefts, ours):
        outs, rows, model = run()
        sum(out.float().pow(2).sum() * (place + 1) for place, out in enumerate(outs)).backward()
        found.append(
            [*outs, *([rows.grad] if rows_learn else []), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    assert len(found[0]) == len(found[1]) == 3 + rows_learn + learned
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).norm() <= limit * wanted.norm() and wanted.norm() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [EVERY, SOME], ids="".join)
@pytest.mark.parametrize("rows_learn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_pefts(dtype, rows_learn, targets, dropout, monkeypatch):
    pefts = with_lora(targets, dropout=dropout).to(dtype).train()
    ours = copy.deepcopy(pefts)
    assert ProjectionGroup.from_layers(layers_of(ours)) is not None
    if dropout:
        share_masks(pefts, monkeypatch)

    def given():
        return torch.linspace(-1, 1, 6 * 24, dtype=dtype).view(6, 24).requires_grad_(rows_learn)

    def theirs():
        rows = given()
        return pefts(rows), rows, pefts

    def mine():
        rows = given()
        return project(layers_of(ours), rows), rows, ours

    limit = 1e-12 if dtype == torch.float64 else 2e-2
    assert_same(theirs, mine, limit, learned=2 * len(targets), rows_learn=rows_learn)


def test_rslora_is_scaled_by_the_root_of_the_rank_as_pefts():
    pefts = with_lora(dropout=0.0, use_rslora=True).double().train()
    ours = copy.deepcopy(pefts)
    group = ProjectionGroup.from_layers(layers_of(ours))
    assert [p.scaling for p in group.projections] == pytest.approx([3 / 4**0.5, 10 / 4**0.5, 10 / 7**0.5])
    drawn = [torch.linspace(-1, 1, 6 * 24, dtype=torch.float64).view(6, 24).requires_grad_() for _ in range(2)]
    assert_same(
        lambda: (pefts(drawn[0]), drawn[0], pefts),
        lambda: (project(layers_of(ours), drawn[1]), drawn[1], ours),
        1e-12,
        learned=6,
    )


def test_layers_on_one_input_share_a_mask_and_draw_anew():
    ours = with_lora(rank_pattern={}, alpha_pattern={}).train()
    group = ProjectionGroup.from_layers(layers_of(ours))
    rows = torch.ones(64, 24)
    first, saved = group.forward(rows)
    assert saved.dropout_mask.shape == rows.shape and 0.6 < saved.dropout_mask.float().mean() < 0.8
    assert saved.rank_columns.shape == (64, 3 * 4)
    wanted = (rows * saved.dropout_mask * dropout_factor(0.3, "cpu")) @ group.projections[1].lora_A.t()
    assert torch.allclose(saved.rank_columns[:, 4:8], wanted, atol=1e-5)
    assert not torch.equal(group.forward(rows)[0][0], first[0])
    ours.eval()
    assert ProjectionGroup.from_layers(layers_of(ours)).forward(rows)[1].dropout_mask is None


def share_that_arrives(with_lora, without, term) -> float:
    """How much of LoRA's term is in a result, by projection on it: 1 where all of it is, whatever the rounding."""
    difference, term = (with_lora.double() - without).detach().flatten(), term.detach().flatten()
    return float(difference @ term / (term @ term))


def one_layer(kind: str, sizes: tuple[int, int], term: float):
    """PEFT's model of one frozen layer in bf16, as wide as given, its output of rms 1 and LoRA's of rms `term`."""
    torch.manual_seed(3)
    base = nn.ModuleDict({kind: nn.Linear(*sizes, bias=False)}).requires_grad_(False)
    base[kind].weight.normal_(0, sizes[0] ** -0.5)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=[kind], init_lora_weights=False))
    layer = model.base_model.model[kind]
    layer.lora_A["default"].weight.data.normal_(0, sizes[0] ** -0.5)
    layer.lora_B["default"].weight.data.normal_(0, term / (2 * 16**0.5))
    return model.to(torch.bfloat16).eval(), layer


WIDTHS = {
    "q_proj": (768, 768),
    "o_proj": (768, 768),
    "k_proj": (768, 256),
    "v_proj": (768, 256),
    "gate_proj": (768, 2048),
}
WIDTHS |= {"up_proj": (768, 2048), "text_lm_head": (768, 4096), "audio_lm_head": (768, 8 * 1026)}


@pytest.mark.parametrize("term", [0.003, 0.001, 0.0005])
@pytest.mark.parametrize("kind", WIDTHS)
def test_a_small_term_of_lora_arrives_in_bf16(kind, term):
    """PEFT adds it to a rounded product, where half of a term of 0.1 % is lost; one product rounds once."""
    model, layer = one_layer(kind, WIDTHS[kind], term)
    if kind.endswith("head"):
        layer.base_layer.__class__, layer.__class__ = FusedHead, LoraHead
    rows = torch.randn(512, WIDTHS[kind][0]).bfloat16()
    wide, exact = rows.double(), copy.deepcopy(layer).double()
    without = wide @ exact.base_layer.weight.t()
    own = exact.lora_B["default"](exact.lora_A["default"](wide)) * 2
    assert 0.8 * term < own.pow(2).mean().sqrt() / without.pow(2).mean().sqrt() < 1.2 * term
    (ours,) = project([layer], rows)
    assert 0.97 <= share_that_arrives(ours, without, own) <= 1.03
    pefts = share_that_arrives(PeftLinear.forward(layer, rows), without, own)
    assert pefts < 0.95  # it is a loss that this can see


def test_no_rows():
    ours = with_lora().train()
    rows = torch.ones(0, 24, requires_grad=True)
    outs = project(layers_of(ours), rows)
    assert [out.shape for out in outs] == [(0, 40), (0, 16), (0, 16)]
    sum(out.sum() for out in outs).backward()
    gradients = [p.grad for p in ours.parameters() if p.requires_grad]
    assert len(gradients) == 6 and not any(gradient.any() for gradient in gradients)


def test_nothing_is_kept_where_nothing_learns():
    ours = with_lora().train()
    with torch.no_grad():
        outs = project(layers_of(ours), torch.ones(3, 24))
    assert not any(out.requires_grad for out in outs)


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.eval().merge_adapter()


def second_adapter(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=EVERY, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def trained_base(model):
    model.base_model.model.k.base_layer.weight.requires_grad_(True)


def other_dropout(model):
    model.base_model.model.v.lora_dropout["default"].p = 0.1


@pytest.mark.parametrize("change", [disabled, merged, second_adapter, trained_base, other_dropout])
def test_what_is_not_plain_computes_itself(change):
    model = with_lora().train()
    change(model)
    assert ProjectionGroup.from_layers(layers_of(model)) is None
    assert_it_computes_itself(model)


@pytest.mark.parametrize("settings", [{"bias": True}, {"use_dora": True}, {"lora_bias": True, "bias": True}], ids=str)
def test_neither_do_other_layers(settings):
    model = with_lora(**settings).train()
    assert ProjectionGroup.from_layers(layers_of(model)) is None
    assert_it_computes_itself(model)


def assert_it_computes_itself(model):
    rows, found = torch.randn(5, 24), []
    for run in (model, lambda rows: project(layers_of(model), rows)):
        torch.manual_seed(1)
        found.append(run(rows))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_linear_layer_of_another_class_computes_itself():
    class Other(nn.Linear):
        pass

    assert Projection.from_layer(Other(4, 4, bias=False).requires_grad_(False)) is None
    assert Projection.from_layer(nn.Linear(4, 4, bias=False).requires_grad_(False)).lora_A is None
    assert Projection.from_layer(nn.Linear(4, 4, bias=False)) is None  # it learns


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.99])
@pytest.mark.parametrize(("way", "device"), [(dropout_by_bits, "cpu"), (dropout_by_kernel, "cuda")])
def test_dropout_keeps_its_share_everywhere_and_the_mean(way, device, probability):
    torch.manual_seed(2)
    rows = torch.ones(999, 1001)  # not a multiple of the four values that one draw serves
    (dropped, kept), scale = way(rows, probability), dropout_factor(probability, device)
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
    assert dropout_by_bits(torch.ones(0, 24), 0.1)[0].shape == (0, 24)
    dropped, kept = dropout_by_bits(torch.ones(64, 64), 0.999999)
    assert dropout_factor(0.999999, "cpu") == 2**16 and torch.isfinite(dropped).all() and kept.float().mean() < 0.01
