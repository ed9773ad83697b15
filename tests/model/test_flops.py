"""What a token costs, held against counted operations; what share of a card's peak that is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import CASES, config_of, needs
from benchmarks.memory import batch_of, operations
from higgs_ds.model.flops import (
    PEAK_FLOPS,
    Utilisation,
    flop_per_token,
    mean_row_tokens,
    peak_flops,
    touched_parameters,
    utilisation,
)
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.options.parse import parse_args


@pytest.fixture(scope="module")
def real():
    """Boson's config and a tokenizer of its size."""
    return config_of(True)


@pytest.fixture(scope="module")
def spec(real):
    return HiggsV2Spec.from_config(real[0])


def cost(spec, *, every=0, row_tokens=0.0, rank=16):
    return flop_per_token(
        spec, lora_rank=rank, lora_targets=list(DEFAULT_LORA_TARGETS), checkpoint_every=every, row_tokens=row_tokens
    )


def test_a_token_touches_2_819_billion_parameters(spec):
    assert touched_parameters(spec) == 28 * 100_663_296 and round(touched_parameters(spec) / 1e9, 3) == 2.819
    # Without LoRA's own products: 4 N, and 6 N where everything is done again.
    assert cost(spec, rank=0) == 4 * touched_parameters(spec)
    assert cost(spec, rank=0, every=1) == 6 * touched_parameters(spec)
    assert cost(spec, rank=0, every=2) == 5 * touched_parameters(spec)


@pytest.mark.parametrize("every", [0, 2])
def test_it_is_what_the_real_model_was_counted_to_do(every, real, spec):
    """Products without attention's, heads on labelled rows included: below a hundredth of the rest."""
    config, tokenizer = real
    batch = batch_of(config, tokenizer, 2048)
    counted = operations(config, batch, every) / batch.num_tokens
    assert cost(spec, every=every) == pytest.approx(counted, rel=0.01)


def test_attention_grows_with_the_row(spec):
    """Two products of 24 heads of 128 over half a row, forward once and backward twice."""
    assert cost(spec, row_tokens=1000) - cost(spec) == pytest.approx(28 * 3 * 4 * 24 * 128 * 500)
    assert mean_row_tokens(np.array([1, 3], np.int32)) == 2.5
    big = np.full(3, 2**20, np.int32)  # whose squares no int32 holds
    assert mean_row_tokens(big) == 2**20


def test_peaks_go_by_the_full_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12 and peak_flops("NVIDIA H100 NVL", "bf16") == 835e12
    assert peak_flops("NVIDIA H200", "bf16") == 989e12 and peak_flops("NVIDIA B200", "fp16") == 2250e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == peak_flops("A100-SXM4-80GB", "bf16") == 312e12
    for card, dtype in (
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bf16"),
        ("NVIDIA H100", "bf16"),
        ("NVIDIA H100 80GB HBM3", "fp32"),
    ):
        assert peak_flops(card, dtype) is None
    assert all(1e14 < peak < 3e15 for peak in PEAK_FLOPS.values())


def test_the_share_of_the_peak(spec, monkeypatch):
    # DESIGN-like arithmetic: one H100 at its peak does 87.7k tokens a second of 11.3 GFLOP.
    assert Utilisation(4 * 2.819e9, 989e12).mfu(87_700) == pytest.approx(1.0, abs=1e-3)
    flags = parse_args(["--train_manifest", "m", "--output_dir", "o"])
    tokens = np.full(9, 200)
    on = {"lora_targets": list(DEFAULT_LORA_TARGETS), "tokens": tokens, "device": torch.device("cpu"), "world_size": 8}
    assert utilisation(flags, spec, **on) is None
    monkeypatch.setattr("higgs_ds.model.flops.card_name", lambda device: "NVIDIA H200")
    of_eight = utilisation(flags, spec, **on)
    assert of_eight.peak_flops == 8 * 989e12 and of_eight.flop_per_token == cost(spec, row_tokens=200.0)
    assert utilisation(flags, spec, **{**on, "tokens": None}) is None


def test_the_benchmark_says_first_what_it_needs():
    def said(gigabytes, world_size):
        card = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=gigabytes * 1e9)
        return needs(list(CASES), 8192, world_size, card).splitlines()

    lines = said(40, 1)
    assert "driver 580" in lines[0] and "disk: nothing" in lines[1] and "time: " in lines[2]
    by_case = dict(line.strip().split(": ", 1) for line in lines[4:])
    assert by_case.keys() == CASES.keys()
    assert by_case["zero2"] == "36 GB for 8,192 tokens"
    assert by_case["zero2, twice the tokens"].startswith("59 GB for 16,384 tokens, which this card does not have")
    assert "28 GB" in dict(line.strip().split(": ", 1) for line in said(40, 8)[4:])["zero3"]
    assert "no GPU" in needs(["zero2"], 512, 2, None)
