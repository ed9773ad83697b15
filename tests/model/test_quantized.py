"""A base of 4 bits: its numbers are bitsandbytes', forward and gradients those of the dense weights, and runs go on."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from bitsandbytes import functional
from boson_multimodal.model.higgs_audio import HiggsAudioModel
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from higgs_ds.checkpoint import changed_settings, read_checkpoint
from higgs_ds.model.files.adapter_names import PREFIX
from higgs_ds.model.higgs_v2.checkpoint import load_base
from higgs_ds.model.higgs_v2.compiled import CompiledDecoderLayer, programs
from higgs_ds.model.higgs_v2.forward import training_forward
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
from higgs_ds.model.lora import attach_lora
from higgs_ds.model.quantized import QuantizedLinear
from higgs_ds.tools.cli import main
from tests.conftest import ROOT
from tests.model.higgs_v2.test_forward import assert_close, batch_of, computed
from tests.support.ranks import assert_all
from tests.support.workers.common import with_lora_b
from tests.test_checkpoint import losses

CPU = torch.device("cpu")
NOTE = "was trained on a base with frozen layers in nf4; taken here: the base as its files have it"


def test_the_weight_is_bitsandbytes_own_and_no_cast_of_the_model_rounds_it():
    """1,100 rows are quantized in two pieces; they are no multiple of a block, which its kernel for CPUs gets wrong."""
    drawn = torch.randn(1100, 96, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear(drawn, None, torch.float32, CPU)
    packed, state = functional.quantize_4bit(drawn.flatten(), blocksize=64, quant_type="nf4")
    wanted = functional.dequantize_4bit(packed, state).view(1100, 96)
    assert torch.equal(layer.weight, wanted)
    assert float((wanted - drawn).norm() / drawn.norm()) == pytest.approx(0.092, abs=0.004)
    assert 8 * sum(buffer.nbytes for buffer in layer.buffers()) / drawn.numel() == 4.5
    assert not layer.state_dict() and not list(layer.parameters())
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(copy.deepcopy(layer).to(dtype).weight, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_computes_as_the_dense_one_and_keeps_nothing_for_the_backward(dtype):
    torch.manual_seed(0)
    bias = nn.Parameter(torch.randn(40, dtype=dtype), requires_grad=False)
    layer = QuantizedLinear(torch.randn(40, 96), bias, dtype, CPU)
    ours = torch.randn(2, 5, 96, dtype=dtype).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        out = layer(ours)
    wanted = nn.functional.linear(theirs, layer.weight, bias)
    out.sum().backward()
    wanted.sum().backward()
    assert not kept and torch.equal(out, wanted) and torch.equal(ours.grad, theirs.grad)


def lora_on(base):
    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": list(DEFAULT_LORA_TARGETS), "seed": 1}
    return with_lora_b(attach_lora(base, **options, base_name="tiny"))


def test_a_quantized_base_trains_as_the_dense_base_of_the_same_values(tiny_dir, tiny_config, tokenizer, monkeypatch):
    """All projections of the decoder and nothing else; by our forward, by upstream's, and where a compiler traces."""
    base, dense = load_base(tiny_dir, tiny_config, "fp32", quantize_on=CPU), load_base(tiny_dir, tiny_config, "fp32")
    quantized = {name: module for name, module in base.named_modules() if type(module) is QuantizedLinear}
    linears = {name for name, module in dense.layers.named_modules(prefix="layers") if isinstance(module, nn.Linear)}
    assert quantized.keys() == linears and len(linears) == 2 * 10
    stays = {name: value for name, value in dense.state_dict().items() if name.removesuffix(".weight") not in linears}
    assert base.state_dict().keys() == stays.keys()
    assert all(torch.equal(base.state_dict()[name], value) for name, value in stays.items())
    for name, layer in quantized.items():
        weight = dense.get_submodule(name).weight
        assert 0.05 < float((layer.weight - weight).norm() / weight.norm()) < 0.12
        weight.data = layer.weight.clone()
    batch = batch_of(["dialog", "speech", "text"], tokenizer, tiny_config)
    models = lora_on(base), lora_on(dense)
    upstream = {"forward_impl": "upstream", "loss_impl": "reference"}
    monkeypatch.setattr(CompiledDecoderLayer, "programs", programs("aot_eager"))
    for options in ({}, {"checkpoint_every": 1}, upstream, {"compiled": True}):
        modules = [training_forward(copy.deepcopy(model), tiny_config, **options) for model in models]
        found, wanted = (computed(module, batch, index=options != upstream) for module in modules)
        assert_close(found, wanted)
        assert len(found[3]) == 40 and all(gradient.any() for gradient in found[3].values())


IMPORTS = """
import sys, types, torch
from pathlib import Path
from higgs_ds.model.higgs_v2.checkpoint import load_base
from higgs_ds.model.higgs_v2.config import read_checkpoint_config
from higgs_ds.model.lora import attach_lora
folder, hub = Path(sys.argv[1]), types.ModuleType("kernels")
hub.get_kernel = lambda *_, **__: print("fetched")
sys.modules["kernels"] = hub
options = dict(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], seed=1, base_name="tiny")
for quantize_on in (None, torch.device("cpu")):
    attach_lora(load_base(folder, read_checkpoint_config(folder), "fp32", quantize_on=quantize_on), **options)
    print("bitsandbytes" in sys.modules, sys.modules["kernels"] is hub)
"""


def test_bitsandbytes_is_imported_where_it_is_asked_for_and_fetches_nothing(tiny_dir):
    """PEFT imports it for any LoRA, and it has a kernel fetched from the hub on a CPU that knows bf16."""
    command = [sys.executable, "-c", IMPORTS, str(tiny_dir)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["False True", "True True"] and "kernels-community" not in ran.stderr


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (2, "bf16")])
def test_a_run_goes_on_to_the_bit_and_its_adapter_says_what_it_was_trained_on(
    stage, dtype, forks, flags_of, tiny_dir, tiny_config, tmp_path, capsys
):
    run, adapter = tmp_path / "run", tmp_path / "run/adapter"
    common = {"deepspeed_config": f"ds_configs/zero{stage}.json", "dtype": dtype, "max_steps": 4, "save_every": 2}
    flags = [*flags_of(run, **common), "--base_dtype", "nf4"]
    results = forks.run(flags, 2)
    assert_all(results)
    before, wanted = losses(run), load_file(adapter / "adapter_model.safetensors")
    trained = sum(value.numel() for value in wanted.values())
    whole = trained + sum(parameter.numel() for parameter in load_base(tiny_dir, tiny_config, dtype).parameters())
    counted = f"{trained:,} of {whole:,} parameters train"
    assert f"ZeRO-{stage}, {dtype} (frozen layers nf4) on cpu; {counted}" in results[0].output
    shutil.rmtree(run / "checkpoints/step-000004")
    results = forks.run([*flags, "--resume", "auto"], 2)
    assert_all(results)
    assert "resuming after step 2" in results[0].output and "WARNING: --resume" not in results[0].output
    weights = load_file(adapter / "adapter_model.safetensors")
    assert losses(run) == before and all(torch.equal(weights[key], wanted[key]) for key in wanted)

    assert "base_dtype: nf4" in (run / "config.yaml").read_text()
    for folder in (adapter, run / "checkpoints/step-000004/adapter"):
        assert '"base in training": "frozen layers in nf4"' in (folder / "higgs_ds.json").read_text()
    line = "| base in training | frozen layers in nf4 |"
    assert line in (adapter / "README.md").read_text()
    if stage == 2:
        where = f"--base_ckpt {tiny_dir} --adapter {adapter} --output_dir {tmp_path / 'voice'}"
        assert main(["merge", "--layout", "boson", *where.split()]) == 0
        assert f"{adapter} {NOTE}" in capsys.readouterr().out and line in (tmp_path / "voice/README.md").read_text()
        base = HiggsAudioModel.from_pretrained(tiny_dir, torch_dtype=torch.bfloat16)
        was = base.layers[0].self_attn.q_proj.weight.detach().float()
        pefts = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
        merged = load_file(tmp_path / "voice/model.safetensors")
        name = "layers.0.self_attn.q_proj"
        scaled = wanted[f"{PREFIX}{name}.lora_B.weight"].float() @ wanted[f"{PREFIX}{name}.lora_A.weight"].float() * 4
        for found in (pefts, merged):
            assert torch.allclose(found[f"{name}.weight"].float(), was + scaled, rtol=0.02, atol=0.01)
        resumed = read_checkpoint(run / "checkpoints/step-000004")
        dense = resumed.progress.config | {"base_dtype": None}
        (said,) = changed_settings(resumed, dense, resumed.progress.num_rows)
        assert "--base_dtype is None, the checkpoint has nf4" in said
