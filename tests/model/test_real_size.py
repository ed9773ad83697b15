"""The model at its real size: its files as zeros that take no disk, its forward on tensors that have no data."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import config_of
from benchmarks.memory import KEPT_BAR, batch_of, kept_bytes, lora_model, meta_has_no_autocast, planned
from benchmarks.roofline import Roofline
from benchmarks.syncs import dispatched
from higgs_ds.distributed.ds_config import LayerSizes, read_deepspeed_config, resolve
from higgs_ds.model.higgs_v2.checkpoint import open_base
from higgs_ds.model.higgs_v2.forward import training_forward
from higgs_ds.model.higgs_v2.layers import check_supported
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.model.higgs_v2.tiny import write_zeros
from higgs_ds.model.higgs_v2.upstream import HiggsAudioForTraining
from higgs_ds.model.lora import attach_lora
from higgs_ds.model.memory import Load
from higgs_ds.options.parse import parse_args
from higgs_ds.options.sections import PROJECT_ROOT


def test_the_real_files_pass_every_door(tmp_path):
    """Names, shapes, bytes and config are Boson's, the files sparse; all that is asked before loading, and LoRA."""
    assert write_zeros(tmp_path) == 5_771_283_456
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3 and sum(file.stat().st_size for file in files) > 11_542_566_912
    assert sum(file.stat().st_blocks * 512 for file in files) < 1e6
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 397 and index["metadata"]["total_size"] == 11_542_566_912

    base = open_base(str(tmp_path))
    assert base.config.audio_adapter_type == "dual_ffn_fast_forward" and not base.notes
    assert base.tokenizer.convert_tokens_to_ids("<|AUDIO_OUT|>") == base.config.audio_out_token_idx == 128016
    check_supported(base.config)
    options = parse_args(["--train_manifest", "x", "--output_dir", "x", "--base_ckpt", str(tmp_path)])
    for file in sorted(Path(PROJECT_ROOT, "ds_configs").glob("*.json")):
        resolve(
            read_deepspeed_config(str(file)),
            options,
            world_size=1 if file.stem == "zero0" else 8,  # on more, bf16 gradients would be summed in bf16
            on_cpu=False,
            layer=LayerSizes.from_spec(HiggsV2Spec.from_config(base.config)),
        )
    with torch.device("meta"):
        model = HiggsAudioForTraining._from_config(base.config, torch_dtype=torch.bfloat16)
    model.requires_grad_(False)
    targets = options.lora.lora_target_modules
    lora = attach_lora(model, rank=16, alpha=32.0, dropout=0.05, target_modules=targets, seed=0, base_name="zeros")
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert len(trained) == 560 and sum(p.numel() for p in trained) == 39_452_672


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
    in_4_bits, quantized = kept_bytes(config, batch, 0, quantized=True)
    assert in_4_bits == kept and 4.4e9 < quantized < 4.6e9  # its layers' dense weights are made again
    kept, _ = kept_bytes(config, batch, 1)
    assert kept / batch.num_tokens < 0.25e6


@pytest.mark.parametrize("every", [0, 1, 2, 4])
def test_what_is_planned_is_what_the_model_keeps(every):
    """To a hundredth, also where layers are computed again; weights are exact, but for rotary tables."""
    config, tokenizer = config_of(True)
    batch = batch_of(config, tokenizer, 2048)
    kept, weights = kept_bytes(config, batch, every)
    plan = planned(config, every)
    assert sum(plan.kept(Load.of(batch.index))) == pytest.approx(kept, rel=0.01)
    assert weights - 2 * (plan.weights.base + plan.weights.lora) < 4096 and plan.weights.lora == 39_452_672


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
