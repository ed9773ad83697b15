"""`describe` on the shipped speech and on hostile, empty or mixed manifests."""

import base64
import io
import json
import re

import numpy as np
import pytest
import soundfile

from higgs_ds.batching.token_counts import LengthIndex
from higgs_ds.data.transcripts import first_lines
from higgs_ds.model.families import open_base
from higgs_ds.model.higgs_v2.spec import HiggsV2Spec
from higgs_ds.tools.cli import main
from higgs_ds.tools.describe import describe, oddest
from tests.conftest import SPEECH


def described(capsys, *flags):
    assert main(["describe", *map(str, flags)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_figures_of_the_shipped_speech(capsys, tmp_path):
    rows = [json.loads(line) for line in SPEECH.read_text().splitlines()]
    hours = sum(row["duration"] for row in rows) / 3600
    said = described(capsys, "--train_manifest", SPEECH, "--epochs", "60", "--max_tokens_per_batch", "1024")
    assert f"{SPEECH}: 32 rows, {hours:.4g} hours of speech, clips of " in said
    assert "script: Latin 100 %" in said and re.search(r"speakers: \d: '\w+' 0\.0\d+ h", said)
    found = re.search(r"an epoch: about ([\d,]+) tokens, (\d+) micro-batches of up to 1,024 tokens", said)
    tokens = int(found[1].replace(",", ""))
    frames = sum(row["duration"] * 25 for row in rows)
    assert frames < tokens < frames + 32 * 80 and tokens / 1024 <= int(found[2]) <= tokens / 1024 + 2
    assert 60 * tokens / 32_000 < 90
    assert "60 epochs on one H100: about 1 minute at 32,000 tokens a second (benchmarks/roofline.py" in said


def test_manifests_are_described_one_by_one_and_mixed_by_weight(capsys, tmp_path):
    rows = [json.loads(line) | {"audio": f"{SPEECH.parent}/{json.loads(line)['audio']}"} for line in open(SPEECH)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    flags = ["--train_manifest", SPEECH, f"{tmp_path / 'b.jsonl'}=0.5", "--val_manifest", tmp_path / "b.jsonl"]
    said = described(capsys, *flags)
    assert f"{SPEECH}: 32 rows, " in said and said.count("b.jsonl: 10 rows, ") == 2
    assert "manifest manifest: all 32 rows an epoch, 86.5 % of it\n" in said
    assert "manifest b: 5 of 10 rows an epoch, 13.5 % of it\nan epoch: about " in said
    assert said.count("an epoch: about ") == 2 and said.count("on one H100") == 1
    assert said.count("is also trained on, in ") == 20  # in both manifests
    said = described(capsys, "--train_manifest", SPEECH, "--max_tokens_per_batch", "9")
    assert "an epoch: none, all 32 rows are longer than 9 tokens\n" in said
    assert main(["describe", "--train_manifest", f"{SPEECH}=0"]) == 2
    assert "the weight '0' must be a number above 0" in capsys.readouterr().err


def test_token_counts_equal_those_of_training(tiny_dir, codec_dir, tokenizer, tiny_config, tmp_path):
    from higgs_ds.batching.collate import Collator
    from higgs_ds.codec.load import load_codec
    from higgs_ds.data.code_cache import CodeCache

    found = describe(str(SPEECH), base=open_base(str(tiny_dir), weights=False))
    cache = CodeCache(tmp_path, load_codec(str(codec_dir)))
    cache.ensure([ref for row in found.rows[:4] for _, ref in row.audio_refs])
    index = LengthIndex(cache, tokenizer, Collator(HiggsV2Spec.from_config(tiny_config)))
    assert [index.tokens(row) for row in found.rows[:4]] == pytest.approx(found.tokens[:4], abs=1)
    assert len(first_lines(found.speech)) == 2


def test_the_page_plays_the_oddest_clips_and_escapes_texts(capsys, tmp_path):
    rows = [json.loads(line) for line in SPEECH.read_text().splitlines()]
    for row in rows:
        row["audio"] = str(SPEECH.parent / row["audio"])
    rows[5]["text"] = "<script>alert(1)</script> & " * 20
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = described(capsys, "--train_manifest", tmp_path / "m.jsonl", "--output_dir", tmp_path / "out")
    assert "2 warnings:\n" in said and "with markup" in said and "m.jsonl:6: text: " in said
    left = map(json.loads, (tmp_path / "out" / "faults.jsonl").read_text().splitlines())
    assert [fault["line"] for fault in left] == [6, 6]
    page = (tmp_path / "out" / "describe.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert oddest(describe(str(tmp_path / "m.jsonl")))[0] == 5
    sounds = re.findall(r'src="data:audio/wav;base64,([^"]+)"', page)
    assert len(sounds) == 10
    waveform, sample_rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0])))
    whole, _ = soundfile.read(rows[5]["audio"])
    assert sample_rate == 16000 and np.abs(waveform - whole).max() < 1e-4
    assert (tmp_path / "out" / "describe.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_faults_are_reported_and_the_rest_is_described(capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(16000) / 9), 16000)
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    talk = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "So."}]
    rows = [{"audio": "a.wav", "text": "語"}, {"audio": "noise.wav", "text": "x"}, {"messages": talk}, {"audio": 1}]
    rows.append({"messages": [{"role": "user", "content": {"type": "audio", "audio_url": "gone.wav"}}, talk[1]]})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = described(capsys, "--train_manifest", tmp_path / "m.jsonl")
    assert "m.jsonl: 2 rows, 0.0002778 hours of speech" in said and "script: Han and kana 100 %" in said
    assert "4 faults:" in said and "m.jsonl:5: messages[0].content.audio_url: " in said
    assert "m.jsonl:2: audio: cannot be decoded: Format not recognised" in said
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[3]))
    assert main(["describe", "--train_manifest", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl: no usable row" in capsys.readouterr().err
    (tmp_path / "talk.jsonl").write_text(json.dumps(rows[2]))
    assert "1 row, none with a target clip and text" in described(capsys, "--train_manifest", tmp_path / "talk.jsonl")
