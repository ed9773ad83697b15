"""The page of a run: its content, the escaping of a run's texts, and how a real browser shows it."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from higgs_ds.report.page import WANTED
from higgs_ds.tools import cli

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"> {{ 7 * 7 }} & \u2028"


def _run(folder, *, lr="1e-3", offset=0.0, steps=300):
    """Makes a run's folder as training and `reproduce` do, with hostile texts and names."""
    folder.mkdir()
    rows = []
    for step in range(1, steps + 1):
        row = {"global_step": step, "train/loss": 5 / step + offset, "train/audio_loss": 4 / step + offset}
        row |= {"rank/loss": [5 / step, None, 6 / step], "guard/failed_checks": 1, "perf/tokens_per_sec": 1000.0}
        if step % 100 == 0:
            row |= {"eval/loss": "NaN" if step == 100 else 3.0 - step / 1000, "eval/wer": 1 - step / 400}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"lr: {lr}\nrun_name: {json.dumps(HOSTILE)}\nepochs: 2\n")
    (folder / "trained_on.json").write_text(json.dumps({"rows": 32, "torch": f"2.11 {HOSTILE}"}))
    failure = {"check": "code_range", "rank": 1, "step": 7, "micro_batch": 0, "rows": [HOSTILE], "found": HOSTILE}
    (folder / "guard_failures.jsonl").write_text(json.dumps(failure) + "\n")
    recitals = []
    for number, share in enumerate((1.0, 0.25)):
        _sound(folder / f"speech/{number}.spoken.wav", 220)
        _sound(folder / f"speech/{number}.original.wav", 330)
        row = {"origin": f"m.jsonl:{number}", "text": f"{number} {HOSTILE}", "share": share}
        recitals.append(row | {"file": f"../speech/{number}.spoken.wav"})
    (folder / "speech/recital.json").write_text(json.dumps(recitals))
    for number, wrong in enumerate((1, 6), 1):  # as `judge` wrote them on another machine, below another folder
        _judged(folder / "judged", "recordings", number, 0, f"/gone/out/judged/clips/recordings/{number:04d}.wav")
        _judged(folder / "judged", HOSTILE, number, wrong, f"/gone/out/judged/clips/greedy/{number:04d}.wav")
    for step, wrong in ((0, 8), (300, 2)):
        samples = folder / f"samples/step-{step:06d}"
        sample = {"global_step": step, "name": "01-x", "text": HOSTILE, "origin": "v.jsonl:1", "file": "01-x.wav"}
        _judged(samples, "samples", 1, wrong, str(samples / "01-x.wav"))
        (samples / "samples.jsonl").write_text(json.dumps(sample | {"ended": step > 0}) + "\n")
    return folder


def _sound(file, hertz):
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * hertz * np.arange(24000) / 24000), 24000)


def _judged(folder, of_set, number, wrong, file):
    """Writes a judged clip of eight words; returns its line."""
    _sound(folder / "clips" / "/".join(file.split("/")[-2:]) if "clips" in file else folder / "01-x.wav", 440)
    line = {"set": of_set, "file": file, "row": f"v.jsonl:{number}", "speaker": "a", "text": f"{number} {HOSTILE}"}
    line |= {"wer": wrong / 8, "cer": 0.5, "units": 8, "characters": 40, "dropped": 0, "inserted": 0}
    line |= {"replaced": wrong, "looped": 0, "similarity": 0.9 - wrong / 10, "length": 1.0, "heard": HOSTILE}
    with (folder / "judged.jsonl").open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def test_the_page_shows_a_run_and_escapes_its_texts(tmp_path):
    run = _run(tmp_path / "out")
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<img src=x" not in page and "49" not in page.split("<nav")[0]
    shown = page[: page.index("plotly.js")]
    samples, judged, recited = (
        shown.split(f">{heading}")[1] for heading in ("Samples</h2>", "out: judged", "out: speech")
    )
    assert recited.index("1 &lt;/script&gt;") < recited.index("0 &lt;/script&gt;"), "the worst clip comes first"
    assert judged.index("WER 0.75") < judged.index("heard: &lt;") < judged.index("WER 0.12")
    assert [cell.split("</td>")[0] for cell in judged.split("WER</th><td>")[1].split("<td>")[:2]] == [
        "0.000 [0.000, 0.000]",
        "0.438 [0.125, 0.750]",
    ]
    assert "against the recordings: WER +0.438 [+0.125, +0.750] worse" in judged
    assert samples.index("step 0, cut off") < samples.index("WER 1.00") < samples.index("WER 0.25, CER 0.50, simil")
    assert shown.count("data:audio/mpeg;base64,") == 4 + 4 + 2
    assert "<td>2.11 &lt;/script&gt;" in shown.split('id="trained-on"')[1]
    charts = [json.loads(part.split("</script>")[0]) for part in shown.split('<script type="application/json">')[1:]]
    lines = {trace["name"]: trace for chart in charts for trace in chart["data"]}
    assert lines["highest"]["y"][:2] == [6.0, 3.0] and lines["lowest"]["y"][:2] == [5.0, 2.5]
    assert "2.7000" in shown and "code_range" in shown


def test_several_runs_share_charts_and_their_differences_come_first(tmp_path):
    one, other = _run(tmp_path / "a"), _run(tmp_path / "b", lr="2e-4", offset=1.0, steps=5)
    page = tmp_path / "both.html"
    assert cli.main(["report", str(one), str(other), "--output_file", str(page)]) == 0
    text = page.read_text()
    table = text[text.index('id="settings"') :]
    assert table.index(">lr<") < table.index(">epochs<") and table.count('class="differs"') == 1
    assert '"b: train"' in text and not (one / "report.html").exists()


def test_a_long_run_has_a_page_below_10_mb(tmp_path):
    """Curves of every metric, and more clips than fit: the worst are included."""
    run, random = _run(tmp_path / "out"), np.random.default_rng(0)
    lines = [{"global_step": step} | dict(zip(WANTED, random.normal(size=50), strict=False)) for step in range(2000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "judged/judged.jsonl").unlink()
    for number in range(1, 17):
        _judged(run / "judged", "served", number, number, f"/judged/clips/served/{number:04d}.wav")
        noise = random.normal(0, 0.2, 30 * 24000)
        soundfile.write(run / f"judged/clips/served/{number:04d}.wav", noise, 24000)
    assert cli.main(["report", str(run)]) == 0
    assert 6.5e6 < (run / "report.html").stat().st_size < 10e6
    judged = (run / "report.html").read_text().split("out: judged")[1].split("out: speech")[0]
    is_played = ["data:audio" in row for row in judged.split("<tr><td>")[1:]]
    assert len(is_played) == 16 and sorted(is_played, reverse=True) == is_played and 1 < sum(is_played) < 16


@pytest.mark.parametrize(
    ("name", "content"), [("metrics.jsonl", None), ("metrics.jsonl", "{]\n"), ("speech/recital.json", "[{}]")]
)
def test_a_damaged_run_is_reported_on_one_line(tmp_path, capsys, name, content):
    run = _run(tmp_path / "out")
    (run / name).unlink() if content is None else (run / name).write_text(content)
    assert cli.main(["report", str(run)]) == 2
    said = capsys.readouterr()
    lines = (said.out + said.err).strip().splitlines()
    assert str(run) in lines[-1] and "Traceback" not in said.err
    assert not (run / "report.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a Chromium")
def test_a_browser_draws_hovers_plays_and_asks_for_nothing(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    run = _run(tmp_path / "out")
    assert cli.main(["report", str(run)]) == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((run / "report.html").as_uri())
        page.wait_for_selector(".plot .main-svg")
        page.hover(".nsewdrag >> nth=0")
        page.wait_for_selector(".hoverlayer .hovertext, .hoverlayer .legend", state="attached")
        hovered = page.text_content(".hoverlayer >> nth=0")
        assert hovered in {f"{step}{4 / step:.6g}" for step in range(1, 301)}, "a step, and the audio loss there"
        page.focus("figure button >> nth=0")
        page.keyboard.press("Enter")
        assert page.get_attribute("figure button >> nth=0", "aria-pressed") == "true"
        page.focus("audio >> nth=0")
        played = "a => a.play().then(() => new Promise(done => a.ontimeupdate = () => done(a.duration)))"
        page.click("h1")  # browsers play nothing before a user's click
        assert page.eval_on_selector("audio >> nth=0", played) == pytest.approx(1.0, abs=0.2)
        assert page.title() == "out" and not errors
        assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)
        browser.close()
