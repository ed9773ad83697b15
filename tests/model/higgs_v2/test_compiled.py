"""Compiled layers: eager's gradients, no graph break, and nothing compiled twice over layers and micro-batches."""

import copy
import json
import re
import shutil

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from higgs_ds.errors import ConfigError
from higgs_ds.model import compiler, fused_lora
from higgs_ds.model.higgs_v2 import compiled
from higgs_ds.model.higgs_v2.compiled import CompiledDecoderLayer
from higgs_ds.model.higgs_v2.config import read_checkpoint_config
from higgs_ds.model.higgs_v2.forward import training_forward
from higgs_ds.model.higgs_v2.tiny import write_tiny
from tests.model.higgs_v2.test_forward import (
    ALL_BATCHES,
    BATCHES,
    assert_close,
    batch_called,
    batch_of,
    computed,
    lora_on,
)
from tests.support.ranks import assert_all

WITHOUT_AUDIO = ("no audio", "one row without audio")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A first, a last and two layers between; two query heads on one key head."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny(folder, seed=0, hidden_size=128, num_layers=4)
    return folder


@pytest.fixture(scope="module")
def config(base_dir):
    return read_checkpoint_config(base_dir)


@pytest.fixture
def traced(monkeypatch):
    """The graphs that are compiled, which torch itself computes here: kernels are not built."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(CompiledDecoderLayer, "programs", compiled.programs(backend))
    return graphs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_programs_give_eagers_gradients_whatever_the_micro_batch(
    dropout, base_dir, config, tokenizer, traced, monkeypatch
):
    """All layers, the last too, checkpointed or not; torch raises at a graph break.

    torch 2.11 traces a Function that gives back what it changed in place without its gradient, and says nothing.
    """
    model = lora_on(base_dir, config, dropout=dropout).train()
    modules = [training_forward(copy.deepcopy(model), config, checkpoint_every=n, compiled=True) for n in (0, 2)]
    eager = training_forward(model, config)
    monkeypatch.setattr(fused_lora, "drops_by_bits", lambda device_type: False)  # draws as where a compiler traces
    programs = 0
    # All shapes with dropout; without it, which is another program, a few are enough.
    for name in [*WITHOUT_AUDIO, *(ALL_BATCHES if dropout else ("mixed lengths", "a filler"))]:
        batch = batch_called(name, tokenizer, config)
        wanted = computed(eager, batch, seed=3)
        for module in modules:
            assert_close(computed(module, batch, seed=3), wanted)
        programs = programs or 2 * (name not in WITHOUT_AUDIO)
        assert len(traced) == programs, name
    batch = batch_called("mixed lengths", tokenizer, config)
    first, second = (computed(modules[0], batch, seed=seed)[0] for seed in (3, 4))
    assert torch.equal(first, second) is (dropout == 0)


def test_validation_computes_as_without_them(base_dir, config, tokenizer, traced):
    model = lora_on(base_dir, config, dropout=0.3).eval()
    batch = batch_of(BATCHES["mixed lengths"], tokenizer, config)
    with torch.no_grad():
        wanted = training_forward(model, config)(batch.model_inputs(), 1.0, torch.ones(8))
        found = training_forward(model, config, compiled=True)(batch.model_inputs(), 1.0, torch.ones(8))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert not traced


def losses(folder) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k.startswith("train/")} for row in rows]


def test_a_run_compiles_before_its_first_step_and_goes_on_to_the_bit(forks, flags_of, tmp_path):
    """With kernels as they are built for a user; dropout on, which these draw in their own way."""
    common = {"deepspeed_config": "ds_configs/zero1.json", "dtype": "fp32", "max_steps": 4, "save_every": 2}
    common |= {"lora_dropout": 0.1}
    assert_all(forks.run(flags_of(tmp_path / "eager", **common), 1))
    flags = [*flags_of(tmp_path / "compiled", **common), "--compile"]
    results = forks.run(flags, 1, timeout=500)
    assert_all(results)
    assert re.search(r"\ncompiled the decoder layers: \d+ s", results[0].output.split("valid tokens")[0])
    ours, eager = losses(tmp_path / "compiled"), losses(tmp_path / "eager")
    # LoRA starts at zero, so that the first loss knows nothing of dropout; the others have drawn another.
    assert ours[0]["train/loss"] == pytest.approx(eager[0]["train/loss"], rel=1e-6)
    assert ours[-1]["train/loss"] == pytest.approx(eager[-1]["train/loss"], rel=0.02)
    shutil.rmtree(tmp_path / "compiled/checkpoints/step-000004")
    assert_all(forks.run([*flags, "--resume", "auto"], 1, timeout=500))
    assert losses(tmp_path / "compiled") == ours


def test_a_machine_without_a_compiler_is_told(monkeypatch, tmp_path):
    compiler.check_compiler("cpu")
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=f"--compile: .*{tmp_path}/Python.h is not here .*; or leave it out"):
        compiler.check_compiler("cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    for device, names in (("cpu", "no g\\+\\+"), ("cuda", "no gcc and no clang")):
        with pytest.raises(ConfigError, match=f"--compile: .*there is {names} here"):
            compiler.check_compiler(device)
    monkeypatch.setenv("CXX", "/opt/clang++")
    with pytest.raises(ConfigError, match="there is no /opt/clang"):
        compiler.check_compiler("cpu")
