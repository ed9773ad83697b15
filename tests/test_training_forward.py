"""The padding-free forward against upstream's: the same loss and the same gradient of every LoRA weight."""

import copy
import dataclasses

import pytest
import torch

from higgs_ds.collate import Collator
from higgs_ds.config import DEFAULT_LORA_TARGETS, ConfigError
from higgs_ds.forward import training_forward
from higgs_ds.model import attach_lora, load_base, read_model_config
from higgs_ds.padding_free import check_supported
from higgs_ds.tiny import write_tiny
from tests.test_collate import samples_of

TOLERANCE = 1e-6  # relative: |a - b| of the loss, L2 norm of the difference of each gradient
BATCHES = {
    "mixed lengths": ["text", "dialog", "speech", "clone"],
    "one row, padded left by upstream": ["speech"],
    "several clips in one row": ["dialog"],
    "several clips a row": ["dialog", "dialog", "speech"],
    "reference audio, not learned": ["clone", "clone"],
    "an earlier clip that is not learned": ["dialog from turn 3", "speech"],
    "no audio": ["text", "text"],
    "one row without audio": ["text"],
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """Two query heads on one key head, three layers."""
    folder = tmp_path_factory.mktemp("grouped")
    write_tiny(folder, seed=3, hidden_size=128, num_layers=3)
    return folder


@pytest.fixture(scope="module")
def config(base_dir):
    return read_model_config(base_dir)


def lora_on(base_dir, config, targets=DEFAULT_LORA_TARGETS, *, dtype="fp32", dropout=0.0):
    model = attach_lora(
        load_base(base_dir, config, dtype),
        rank=4,
        alpha=8,
        dropout=dropout,
        target_modules=list(targets),
        seed=1,
        base_name="tiny",
    )
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, where A would get no gradient
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


@pytest.fixture(scope="module")
def model(base_dir, config):
    return lora_on(base_dir, config)


def batch_of(names, tokenizer, config, **collate):
    return Collator.of(config, with_layout=True)(samples_of(names, tokenizer), **collate)


def without_text_labels(batch, config):
    """The same batch where nothing of the text is learned."""
    labels = torch.full_like(batch.label_ids, -100)
    layout = batch.layout
    rows = layout.head_rows[len(layout.text_targets) :]
    layout = dataclasses.replace(layout, head_rows=rows, text_targets=layout.text_targets[:0])
    return dataclasses.replace(batch, label_ids=labels, layout=layout)


def computed(module, batch, *, layout=True, seed=None):
    """(loss, stats, report, gradients by name)"""
    if seed is not None:
        torch.manual_seed(seed)
    inputs = batch.model_inputs()
    if not layout:
        inputs.pop("layout", None)
    counts = batch.codebook_counts
    scales = torch.tensor([0.3 / (8 * count) if count else 0.0 for count in counts]) if counts else torch.zeros(8)
    loss, stats, report = module(inputs, 0.7 / max(1, batch.text_count), scales)
    module.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    return loss.detach(), stats, report, gradients


def distance(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    size = float(wanted.double().norm())
    return float((ours.double() - wanted.double()).norm()) / size if size else float(ours.double().norm())


def assert_agree(ours, wanted, tolerance=TOLERANCE):
    assert ours[2].problems == wanted[2].problems == []
    assert distance(ours[0], wanted[0]) <= tolerance
    assert torch.allclose(ours[1][:2], wanted[1][:2], rtol=tolerance)
    assert torch.allclose(ours[1][3:], wanted[1][3:], rtol=tolerance)
    assert ours[3].keys() == wanted[3].keys()
    worst = max(ours[3], key=lambda name: distance(ours[3][name], wanted[3][name]))
    assert distance(ours[3][worst], wanted[3][worst]) <= tolerance, worst


@pytest.mark.parametrize("loss_impl", ["fused", "reference"])
@pytest.mark.parametrize("name", [*BATCHES, "no text labels", "a filler"])
def test_agrees_with_upstream_in_loss_and_every_gradient(name, loss_impl, model, config, tokenizer):
    if name == "a filler":
        batch = batch_of(["speech"], tokenizer, config, filler=True)
    elif name == "no text labels":
        batch = without_text_labels(batch_of(["speech", "dialog"], tokenizer, config), config)
    else:
        batch = batch_of(BATCHES[name], tokenizer, config)
    ours = computed(training_forward(model, config, loss_impl=loss_impl), batch)
    wanted = computed(training_forward(model, config, forward_impl="upstream"), batch, layout=False)
    print("loss", distance(ours[0], wanted[0]), "grad", max(distance(ours[3][n], wanted[3][n]) for n in ours[3]))
    assert_agree(ours, wanted)
    moved = [bool(gradient.any()) for gradient in ours[3].values()]
    assert not any(moved) if name == "a filler" else any(moved)
    if name in ("mixed lengths", "several clips a row"):
        assert all(moved)
