"""The model at its real size, on tensors that have sizes and a device but no data."""

import pytest
import torch

from benchmarks.gpu import config_of
from benchmarks.memory import KEPT_BAR, batch_of, kept_bytes, lora_model, meta_has_no_autocast
from benchmarks.roofline import Roofline
from benchmarks.syncs import dispatched
from higgs_ds.forward import training_forward


def test_5_8_billion_parameters_forward_and_backward_ask_the_host_for_nothing():
    """Nothing asks a tensor for its values (there are none), and no operation mixes devices."""
    config, tokenizer = config_of(True)
    batch = batch_of(config, tokenizer, 2048)
    lora = lora_model(config)
    base = [p for p in lora.parameters() if not p.requires_grad]
    assert round(sum(p.numel() for p in base) / 1e9, 3) == 5.771
    for every in (0, 1):
        module = training_forward(lora, config, checkpoint_every=every)
        module.zero_grad()

        inputs = batch.model_inputs("meta")

        def run(module=module, inputs=inputs):
            loss, stats, report = module(inputs, 0.1, torch.full((8,), 0.1, device="meta"))
            assert loss.shape == () and stats.device.type == "meta" and not report.problems
            loss.backward()

        with meta_has_no_autocast():
            found = dispatched(run)
        assert sum(found.values()) == 0, found
        trained = [p for p in module.parameters() if p.requires_grad]
        assert len(trained) == 2 * 28 * 10 and all(p.grad.device.type == "meta" for p in trained)


def test_what_the_forward_keeps_stays_within_its_bounds():
    """MB a token with flash attention; with upstream's norms and gates, and PEFT's dropout, it was 4.74."""
    config, tokenizer = config_of(True)
    batch = batch_of(config, tokenizer, 2048)
    kept, weights = kept_bytes(config, batch, 0)
    assert 11.5e9 < weights < 11.7e9
    assert 2.4e6 < kept / batch.num_tokens <= KEPT_BAR * 1e6
    kept, _ = kept_bytes(config, batch, 1)
    assert kept / batch.num_tokens < 0.25e6


def test_the_arithmetic_of_operations():
    """As long as its products or its bytes, whichever takes longer; views take no time."""
    with Roofline(flops=1e6, bytes_per_sec=1e6) as roof:
        rows = torch.empty(100, 200, device="meta")
        rows @ rows.t()
        rows[:, :16] @ rows[:16, :50]  # thin, as LoRA's are
        rows.mul_(torch.empty(100, 1, device="meta").expand(100, 200))  # a factor is read once
    assert {kind: seconds for kind, seconds in roof.seconds.items() if seconds} == pytest.approx(
        {
            "products of frozen weights": 2 * 100 * 200 * 100 / 1e6,
            "products of LoRA": 2 * 100 * 16 * 50 / 1e6,
            "factors, masks, rotary": (2 * 100 * 200 + 100) * 4 / 1e6,
        }
    )
    assert sum(roof.calls.values()) == 3
