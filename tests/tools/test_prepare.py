"""`prepare` in real processes: a single one and several ranks, killed and restarted."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from higgs_ds.codec.load import load_codec
from higgs_ds.data.audio import read_audio
from higgs_ds.data.code_cache import INDEX, CodeCache
from higgs_ds.data.manifest import read_manifest
from higgs_ds.tools import cli
from tests.conftest import ROOT, SPEECH
from tests.support.ranks import assert_all, run_ranks


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A manifest of 60 clips of noise, half a second to two seconds each."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, rng.integers(8000, 32000)), 16000)
        rows.append(json.dumps({"audio": f"{i}.wav", "text": f"Clip number {i}."}))
    (folder / "manifest.jsonl").write_text("\n".join(rows))
    return folder / "manifest.jsonl"


@pytest.fixture
def command(tiny_dir, codec_dir, tmp_path):
    def words(manifest, *more):
        fixed = ["--base_ckpt", tiny_dir, "--codec", codec_dir, "--codes_cache", tmp_path / "cache"]
        return ["-m", "higgs_ds", "prepare", "--train_manifest", manifest, *fixed, *more]

    return lambda *args: [str(word) for word in words(*args)]


@pytest.fixture
def here(capsys):
    """Runs a verb in this process, which saves the time of imports."""

    def call(words):
        code = cli.main(words[2:])
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, captured.out, captured.err)

    return call


def said(text: str) -> dict:
    found = re.search(
        r"([\d,]+) rows, ([\d,]+) different clips of .* ([\d,]+) tokens; ([\d,]+) clips encoded now", text
    )
    assert found, text
    return dict(
        zip(("rows", "clips", "tokens", "encoded"), (int(n.replace(",", "")) for n in found.groups()), strict=True)
    )


SLOW_CODEC = """
import sys, time
from higgs_ds.tools import cli
from higgs_ds.codec import sample as sample_codec
encode = sample_codec.SampleCodec.encode
sample_codec.SampleCodec.encode = lambda *a: time.sleep(0.05) or encode(*a)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_ranks_continue_the_work_of_a_killed_process(clips, command, here, codec_dir, tmp_path):
    words = command(clips, "--val_manifest", SPEECH)
    slow = [sys.executable, "-c", SLOW_CODEC, *words[2:]]
    process = subprocess.Popen(slow, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while encoded_in(tmp_path) < 10:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = encoded_in(tmp_path)
    assert 10 <= there < 60

    results = run_ranks([*words, "--local_rank=0"], 2, timeout=120)
    assert_all(results)
    counts = said(results[0].output)
    assert counts["clips"] == counts["rows"] == 92 and counts["encoded"] in (92 - there, 92 - there + 1)
    assert "rows: 100%" in results[0].output and "clips encoded now" not in results[1].output
    assert len(list(tmp_path.glob("cache/*/*.index"))) >= 3  # of the killed process and of both ranks
    codec = load_codec(str(codec_dir))
    cache = CodeCache(tmp_path / "cache", codec)
    refs = [ref for row in read_manifest(clips)[0][:20] for _, ref in row.audio_refs]
    assert all(np.array_equal(cache.get(ref), codec.encode(*read_audio(ref))) for ref in refs)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*")}
    assert len(before) > 3 and said(here(words).stdout) == counts | {"encoded": 0}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*")} == before


def encoded_in(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("cache/*/*.index")) // INDEX.itemsize


def test_faults_are_reported_by_line_and_the_rest_is_prepared(clips, command, here):
    folder = clips.parent
    rows = clips.read_text().splitlines()[:4]
    (folder / "broken.wav").write_bytes(b"no audio")
    rows.insert(1, json.dumps({"audio": "broken.wav", "text": "x"}))
    rows.append(json.dumps({"audio": "0.wav", "text": "long " * 200}))
    manifest = folder / "faulty.jsonl"
    manifest.write_text("\n".join(rows))
    limit = ("--max_tokens_per_batch", "400")
    result = here(command(manifest, *limit))
    assert result.returncode == 2 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert any(line.startswith(f"{manifest}:2: audio: cannot be decoded") for line in lines)
    assert any(re.search(r":6: row: takes 1\d\d\d tokens, over --max_tokens_per_batch 400", line) for line in lines)
    assert lines[-1] == "2 bad rows; the other rows are prepared (--skip_bad_rows skips these)"
    result = here(command(manifest, *limit, "--skip_bad_rows"))
    assert result.returncode == 0 and said(result.stdout)["rows"] == 4 and said(result.stdout)["encoded"] == 0


def test_an_output_is_required_and_flags_are_checked(clips, here):
    for words, problem in (
        ([], "--train_manifest: is required"),
        (["--train_manifest", str(clips)], "--codes_cache: is required, or --output_dir"),
        (["--train_manifest", str(clips), "--codec_cache", "x"], "(did you mean '--codes_cache'?)"),
    ):
        result = here(["-m", "higgs_ds", "prepare", *words])
        assert result.returncode == 2 and problem in result.stderr


def test_an_unwritable_folder_is_reported_once(clips, command, here, tmp_path):
    (tmp_path / "cache").write_text("a file")
    result = here(command(clips))
    assert result.returncode == 2 and "--codes_cache:" in result.stderr and "Traceback" not in result.stderr
