"""Samples of the voice in training: the training is untouched, no rank hangs, and a voice that fails is left out."""

import json

import pytest
import soundfile

from higgs_ds.report.samples import prompts_from_file
from tests.conftest import ROOT
from tests.support.ranks import assert_all

VAL = ROOT / "examples/speech/val.jsonl"
TEXTS = "Hello there.\n\n  The number is not answering.  \n"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_samples_is_the_run_without_to_the_bit(stage, forks, flags_of, tmp_path):
    """Dropout on, two ranks; at stage 2 one rank's voice fails at every clip."""
    texts = tmp_path / "texts.txt"
    texts.write_text(TEXTS)
    common = {"max_steps": 3, "eval_every": 2, "val_manifest": VAL, "lora_dropout": 0.1, "epochs": None}
    common |= {"deepspeed_config": f"ds_configs/zero{stage}.json"}
    samples = {"sample_every": 2, "sample_count": 2, "sample_texts": texts}
    patches = {1: ["voice_fails"]} if stage == 2 else None
    spoken = forks.start(flags_of(tmp_path / "spoken", **common, **samples), 2, patches=patches)
    silent = forks.start(flags_of(tmp_path / "silent", **common), 2)
    assert_all(forks.wait([*spoken, *silent], 400))
    adapters = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("spoken", "silent")]
    assert adapters[0] == adapters[1]

    folder = tmp_path / "spoken/samples"
    assert {path.name for path in folder.iterdir()} == {"recordings", *(f"step-00000{step}" for step in (0, 2, 3))}
    assert len(list((folder / "recordings").glob("*.wav"))) == 2
    for step in (0, 2, 3):
        rows = [json.loads(line) for line in (folder / f"step-00000{step}/samples.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows][2:] == ["Hello there.", "The number is not answering."]
        assert [row["origin"] for row in rows][2:] == [f"{texts}:1", f"{texts}:3"]
        failed = [row["name"] for row in rows if row["problem"]]
        assert failed == ([rows[1]["name"], rows[3]["name"]] if stage == 2 else [])
        for row in rows:
            assert row["global_step"] == step and (row["file"] is not None) == (row["problem"] is None), row
            if row["file"]:
                sound = soundfile.info(folder / f"step-00000{step}" / row["file"])
                assert sound.duration == pytest.approx(row["seconds"], abs=0.05)
    page = (tmp_path / "spoken/report.html").read_text()
    assert 'id="samples"' in page and "Hello there." in page


def test_a_rank_killed_while_it_speaks_ends_the_others(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", max_steps=3, val_manifest=VAL, sample_count=2, epochs=None)
    results = forks.run(flags, 2, patches={1: ["killed_speaking"]})
    assert results[0].returncode == 1 and "rank 1" in results[0].output and "speaking samples" in results[0].output


def test_texts_are_lines_and_an_empty_file_is_refused(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text(TEXTS)
    assert [prompt.name for prompt in prompts_from_file(texts, "served")] == ["text-01", "text-03"]
    texts.write_text("\n \n")
    with pytest.raises(Exception, match="--sample_texts: .*holds no text"):
        prompts_from_file(texts, "served")


def test_a_stop_between_clips_leaves_out_the_rest_and_saves(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", max_steps=3, val_manifest=VAL, sample_every=1, sample_count=4, epochs=None)
    (result,) = forks.run(flags, 1, patches={0: ["stopped_speaking"]})
    assert result.returncode == 75, result.output
    (folder,) = (tmp_path / "run/samples").glob("step-000001")
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "run/stopped.json").read_text())["saved_step"] == 2
