"""Options that `--init_adapter` fills in, and those that it does not let pass."""

from __future__ import annotations

import pytest

from higgs_ds.errors import ConfigError
from higgs_ds.model.families import HIGGS_V2
from higgs_ds.model.higgs_v2.modules import DEFAULT_LORA_TARGETS
from higgs_ds.model.init_adapter import settle_lora
from higgs_ds.options.parse import parse_args
from tests.model.files.test_adapter_file import write_adapter

NEEDED = ["--train_manifest", "train.json", "--output_dir", "out", "--other_base"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("adapter")
    return write_adapter(folder, tiny_config, targets=DEFAULT_LORA_TARGETS)


def options_of(folder, *flags):
    return parse_args([*NEEDED, "--init_adapter", str(folder), *flags])


def test_what_was_not_given_is_the_adapters(adapter, tiny_config):
    config, weights = settle_lora(options_of(adapter), HIGGS_V2, tiny_config)
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_rslora) == (4, 8.0, False)
    assert config.lora.lora_target_modules == list(DEFAULT_LORA_TARGETS) and len(weights) == 2 * 20


@pytest.mark.parametrize("targets", ["all", "attention text_mlp audio_mlp", "up_proj q_proj k_proj v_proj o_proj mlp"])
def test_targets_are_compared_by_the_layers_that_they_name(targets, adapter, tiny_config):
    config = options_of(adapter, "--lora_target_modules", *targets.split(), "--lora_r", "4", "--lora_alpha", "8")
    if "mlp" in targets.split():
        with pytest.raises(ConfigError, match="--lora_target_modules is up_proj q_proj .* the adapter has q_proj k_"):
            settle_lora(config, HIGGS_V2, tiny_config)
    else:
        config, weights = settle_lora(config, HIGGS_V2, tiny_config)
        assert weights is not None and config.lora.lora_target_modules == targets.split()


def test_the_default_given_in_words_is_given(adapter, tiny_config):
    with pytest.raises(ConfigError) as caught:
        settle_lora(options_of(adapter, "--lora_alpha", "32", "--lora_r", "16"), HIGGS_V2, tiny_config)
    assert caught.value.problems == [
        "--init_adapter: --lora_r is 16, the adapter has 4; leave the flag out",
        "--init_adapter: --lora_alpha is 32, the adapter has 8; leave the flag out",
    ]


def test_a_head_of_the_adapter_and_the_fused_loss_do_not_go_together(tmp_path, tiny_config):
    heads = write_adapter(tmp_path / "heads", tiny_config, targets=("q_proj", "audio_lm_head"))
    with pytest.raises(ConfigError, match="LoRA on audio_lm_head would get no gradient from the fused loss"):
        settle_lora(options_of(heads), HIGGS_V2, tiny_config)
    config = options_of(heads, "--loss_impl", "reference")
    assert len(settle_lora(config, HIGGS_V2, tiny_config)[1]) == 2 * 3


def test_a_run_that_is_gone_on_with_keeps_what_it_had(tmp_path, tiny_config):
    config = options_of(tmp_path / "gone", "--lora_r", "8")
    config, weights = settle_lora(config, HIGGS_V2, tiny_config, {"lora_r": 4, "lora_alpha": 9.0, "lora_dropout": 0.5})
    assert weights is None
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_dropout) == (8, 9.0, 0.05)
