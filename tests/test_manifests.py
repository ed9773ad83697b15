"""Runs on several manifests: drawn anew each epoch, the same on two ranks as on one, and to the bit after a resume."""

import json
from types import SimpleNamespace

import pytest

from higgs_ds.checkpoint import Progress, changed_settings
from higgs_ds.options.parse import parse_args
from tests.conftest import SPEECH
from tests.support.ranks import assert_all


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """(voice, general): 8 and 12 rows of the shipped speech, in files of the same name."""
    rows = [json.loads(line) for line in SPEECH.read_text().splitlines()]
    found = []
    for name, part in (("voice", rows[:8]), ("general", rows[8:20])):
        file = tmp_path_factory.mktemp("data") / name / "train.jsonl"
        file.parent.mkdir()
        absolute = [row | {"audio": str(SPEECH.parent / row["audio"])} for row in part]
        file.write_text("".join(json.dumps(row) + "\n" for row in absolute))
        found.append(str(file))
    return found


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_two_manifests_on_two_ranks_and_on_one_or_after_a_resume(by, manifests, forks, flags_of, tmp_path):
    voice, general = manifests
    fixed = {"lora_dropout": 0, "lr_scheduler": "constant", "dtype": "fp32", "save_every": 3}
    fixed |= {"codes_cache": tmp_path / "codes", "train_manifest": [voice, f"{general}=0.5"]}
    if by == "tokens":
        fixed |= {"batch_size": None, "max_tokens_per_batch": 700}

    def run(name, ranks, **more):
        results = forks.run(flags_of(tmp_path / name, **fixed, **more), ranks)
        assert_all(results)
        return results[0].output

    def metrics(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "train/loss" in line]

    output = run("whole", 2, max_steps=8)
    assert "manifest voice/train: all 8 rows an epoch, 57.1 % of it" in output
    assert "manifest general/train: 6 of 12 rows an epoch, 42.9 % of it" in output and "run: 14 rows = " in output
    whole = metrics("whole")
    for line in whole:
        assert line["data/share/voice/train"] + line["data/share/general/train"] == pytest.approx(1)
    card = (tmp_path / "whole/adapter/README.md").read_text()
    assert "| manifest general/train | 6 of 12 rows an epoch, 42.9 % of it |" in card and "| rows | 20 |" in card

    if by == "tokens":
        run("one", 1, max_steps=8, grad_accum=2)
        one = metrics("one")
        assert [line["train/loss"] for line in one] == pytest.approx([line["train/loss"] for line in whole], rel=2e-4)
        names = ("data/share/voice/train", "train/epoch")
        assert [[line[name] for name in names] for line in one] == [[line[name] for name in names] for line in whole]
        return

    run("parts", 2, max_steps=3)  # within an epoch
    output = run("parts", 2, max_steps=8, resume="auto")
    assert "resuming after step 3" in output
    assert [line for line in output.splitlines() if "with another setting" in line] == [
        line for line in output.splitlines() if "--max_steps is 8, the checkpoint has 3" in line
    ]
    same = ("adapter/adapter_model.safetensors", "checkpoints/step-000008/optimizer.safetensors")
    for file in same:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    state = json.loads((tmp_path / "parts/checkpoints/step-000008/state.json").read_text())
    assert state["manifest_rows"] == [8, 12] and state["config"]["train_manifest"] == [voice, f"{general}=0.5"]


def test_manifests_and_their_rows_are_known_to_a_resume():
    def settings(*words):
        return parse_args(["--train_manifest", *words, "--output_dir", "o"]).as_dict()

    def resumed(config, **more):
        fixed = {"step": 3, "epoch": 0.5, "dropped_steps": 0, "rows_per_step": 4, "num_rows": 20, "world_size": 2}
        return SimpleNamespace(progress=Progress(**fixed, config=config, **more))

    saved, now = resumed(settings("a", "b=.5"), manifest_rows=[8, 12]), settings("a", "b=0.50")
    assert changed_settings(saved, now, 20, [8, 12]) == []
    (line,) = changed_settings(saved, now, 20, [9, 11])
    assert "the manifests have [9, 11] usable rows, the checkpoint's had [8, 12]" in line
    (line,) = changed_settings(saved, settings("a", "b=0.25"), 20, [8, 12])
    assert "--train_manifest is ['a', 'b=0.25'], the checkpoint has ['a', 'b=0.5']" in line
