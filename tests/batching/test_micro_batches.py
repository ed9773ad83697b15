"""What a run's micro-batches hold where nobody said so, on a GPU and on a CPU."""

import shutil

import pytest
import yaml

from higgs_ds.batching.micro_batches import LAUNCH_BOUND_TOKENS, TOKENS_ON_GPU, launch_bound_note, settle_micro_batches
from higgs_ds.options.parse import parse_args
from tests.support.ranks import assert_all, changed


def settled(argv, device_type, resumed=None):
    """The config as `train_ds.py` settles it on such a device."""
    config = parse_args(["--train_manifest", "m", "--output_dir", "o", *argv])
    batch_size, max_tokens = settle_micro_batches(
        config.optim.batch_size, config.optim.max_tokens_per_batch, device_type=device_type, resumed=resumed
    )
    return config.settled(batch_size=batch_size, max_tokens_per_batch=max_tokens)


def cut(config) -> tuple:
    return config.optim.batch_size, config.optim.max_tokens_per_batch


def test_the_default_is_tokens_on_a_gpu_and_single_rows_on_a_cpu(tmp_path):
    assert cut(settled([], "cuda")) == (1, 16_384) and cut(settled([], "cpu")) == (1, None)
    assert cut(settled(["--max_tokens_per_batch", "700"], "cuda")) == (1, 700)
    for given in (["--batch_size", "1"], ["--per_device_train_batch_size", "1"], ["--config", tmp_path / "c.yaml"]):
        (tmp_path / "c.yaml").write_text("batch_size: 1\n")
        assert cut(settled(list(map(str, given)), "cuda")) == (1, None)
    assert cut(settled(["--batch_size", "3"], "cuda")) == cut(settled(["--batch_size", "3"], "cpu")) == (3, None)


@pytest.mark.parametrize("first", ["cuda", "cpu"])
@pytest.mark.parametrize("again", ["cuda", "cpu"])
@pytest.mark.parametrize("argv", [[], ["--batch_size", "2"], ["--max_tokens_per_batch", "700"]])
def test_the_resolved_config_is_the_same_run_on_any_device(argv, first, again, tmp_path):
    config = settled(argv, first)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    assert settled(["--config", str(file)], again) == config


def test_a_resumed_run_keeps_what_it_had():
    by_rows, by_tokens = settled([], "cpu").as_dict(), settled([], "cuda").as_dict()
    assert cut(settled([], "cuda", by_rows)) == (1, None)  # also one that an earlier version made on a GPU
    assert cut(settled([], "cpu", by_tokens)) == (1, 16_384)
    assert cut(settled(["--max_tokens_per_batch", "9000"], "cuda", by_tokens)) == (1, 9000)
    assert cut(settled(["--batch_size", "4"], "cuda", by_tokens)) == (4, None)  # which `keep_global_batch` refuses


def test_a_real_run_by_tokens_goes_on_by_tokens_without_being_told(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", max_tokens_per_batch=700, max_steps=1, save_every=1)
    place = flags.index("--batch_size")
    del flags[place : place + 2]
    assert_all(forks.run(flags, 1))
    place = flags.index("--max_tokens_per_batch")
    del flags[place : place + 2]
    (result,) = forks.run(changed(flags, "--max_steps", "2", "--resume", "auto"), 1)
    assert_all([result])
    assert "up to 700 tokens" in result.output
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["max_tokens_per_batch"] == 700
    shutil.rmtree(tmp_path / "run")


def note(mean, **changes):
    settings = {"device_type": "cuda", "batch_size": 1, "max_tokens": None, "grad_accum": 1}
    return launch_bound_note(mean, **settings | changes)


def test_a_launch_bound_run_says_which_flag_to_change():
    assert "micro-batches hold 534 tokens on average" in note(534.4, batch_size=2)
    assert "--max_tokens_per_batch 16384 instead of --batch_size 2" in note(534.4, batch_size=2)
    assert "a larger --max_tokens_per_batch than 4096" in note(3900, max_tokens=4096)
    assert "a smaller --grad_accum than 8" in note(3900, max_tokens=TOKENS_ON_GPU, grad_accum=8)
    assert "fewer GPUs" in note(3900, max_tokens=TOKENS_ON_GPU)
    assert note(LAUNCH_BOUND_TOKENS, batch_size=2) is None
    assert note(534, device_type="cpu") is None and note(None) is None
