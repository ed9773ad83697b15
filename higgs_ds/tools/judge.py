"""`python -m higgs_ds judge`: judges a voice or a folder of clips, with recordings and codec copies for comparison."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.chatml import PROMPT_STYLES
from ..errors import ConfigError, ExitCode, first_of
from ..files import writing
from ..options.sections import OPTIONS
from ..process import say
from . import flag_types
from . import speak_flags as flags
from .outputs import writable_folder

if TYPE_CHECKING:
    import numpy as np

    from ..codec.base import Codec
    from ..data.chatml import AudioRef
    from ..judges.clips import Clip, Sentence
    from ..judges.panel import Panel
    from ..judges.summary import Line
    from .judge_texts import Asked, Made

REFERENCES = ("row", "none", "speaker", "clip")
STOP_RULES = ("boson", "transformers", "vllm", "sglang")
CLIPS = "clips"


def add_judge(verbs) -> None:
    """Adds the verb `judge`."""
    parser = verbs.add_parser("judge", help="measure words, voice, sound and endings of a voice or a folder of clips")
    add, number = parser.add_argument, flag_types.number
    add("--manifest", type=flag_types.path, metavar="FILE", help="held-out rows: texts, speakers and recordings")
    add(
        "--audio_root",
        type=flag_types.name,
        metavar="DIR",
        help="folder to search for clips first, then the manifest's",
    )
    add("--texts", type=flag_types.path, metavar="FILE", help="speak these texts, one per line, instead of the rows'")
    add("--speaker", type=flag_types.name, help="judge this speaker's rows, or compare --texts with this speaker")
    add("--count", type=number(int, 1), metavar="N", help="judge N texts, evenly spaced (default: all)")
    clips_help = "judge these clips instead of a model's; named like the recordings, or by row or line number: 0001.wav"
    add("--clips", type=flag_types.path, metavar="DIR", help=clips_help)
    for name in ("words", "voice"):
        default, about = OPTIONS[name].default, str(OPTIONS[name].field.description)
        text = f"{about[0].lower()}{about[1:-1]}, or none (default: {default})"
        add(f"--{name}", type=flag_types.name, default=default, metavar="NAME", help=text)
    add("--sound", choices=("dnsmos", "none"), default="dnsmos", help="judge of the sound (default: dnsmos)")
    flags.voice_flags(parser)
    reference_help = (
        "clip to clone: the row's own, none, another clip of the speaker, or --ref_audio; several values are judged "
        "separately (default: clip if --ref_audio is given, else row)"
    )
    add("--reference", nargs="+", choices=REFERENCES, help=reference_help)
    add("--sampler", nargs="+", choices=flags.SAMPLERS, default=["greedy"], help="as in generate (default: greedy)")
    add("--stop", nargs="+", choices=STOP_RULES, help="stop rules, for greedy (default: boson; Higgs TTS 3: sglang)")
    tokens_help = "longest answer, in tokens (default: 1024)"
    add("--max_new_tokens", type=number(int, 1, flags.MOST_TOKENS), help=tokens_help)
    add("--output_dir", type=flag_types.path, required=True, metavar="DIR", help="for judged.jsonl and spoken clips")
    add("--overwrite", action="store_true", help="overwrite earlier results in --output_dir")
    unused = {"temperature": None, "scene": None, "max_row_tokens": flags.MOST_TOKENS}
    parser.set_defaults(verb=run_judge, **unused)


def run_judge(args: argparse.Namespace) -> int:
    """Speaks and judges clips, prints the figures; returns 1 if a judge failed on every clip."""
    from ..judges.summary import CODEC
    from .judge_texts import asked_of, clips_in

    style = _check_flags(args)
    asked = asked_of(args, style)
    if args.clips is not None:
        clips = clips_in(args.clips, asked)
        if missing := len(asked.sentences) - len(clips):
            say(f"--clips: {missing} of {len(asked.sentences)} texts have no clip and are skipped")
        asked.sentences = [made.sentence for made in clips]
    asked = asked.drawn(args.count)
    device = _device(args, asked, style)
    writable_folder(args.output_dir)
    panel = _panel(args, asked, device)
    folder, codebooks = args.output_dir / CLIPS, None
    with writing(f"--output_dir: {args.output_dir}"):
        _remove_earlier(folder, keep=args.clips)
    if args.clips is not None:
        from ..codec.load import load_codec

        codec = load_codec(args.codec, args.codec_revision, device) if args.codec else None
        drawn = {sentence.origin for sentence in asked.sentences}
        sets = {CLIPS: [made for made in clips if made.sentence.origin in drawn]}
    else:
        from .judge_speech import speak_all

        speaker = flags.open_speaker(args)
        codec, codebooks = speaker.codec, speaker.spec.num_codebooks
        with writing(f"--output_dir: {args.output_dir}"):
            sets = speak_all(speaker, asked, args, style, folder)
    with writing(f"--output_dir: {args.output_dir}"):
        if codec is not None:
            sets = {CODEC: _copies(asked, codec, codebooks, folder / CODEC), **sets}
        return _judge(args, _clips(asked, sets, folder), panel)


def _remove_earlier(folder: Path, keep: Path | None) -> None:
    """Removes an earlier call's clips: only numbered files, in folders with names that `judge` uses."""
    from ..judges.summary import CODEC, RECORDINGS

    spoken = map("-".join, product(flags.SAMPLERS, STOP_RULES, REFERENCES))
    for own in (folder / name for name in (CODEC, RECORDINGS, *spoken)):
        if own.is_dir() and not (keep and keep.resolve() == own.resolve()):
            for file in own.glob("[0-9][0-9][0-9][0-9]*.wav"):
                file.unlink()
            if not any(own.iterdir()):
                own.rmdir()


def _check_flags(args: argparse.Namespace) -> str:
    """Checks for conflicting flags and existing outputs, fills in defaults; returns the prompt style."""
    problems = []
    if args.manifest is None and args.texts is None:
        problems.append("--manifest, --texts: give one of them")
    results = [args.output_dir / "judged.jsonl", args.output_dir / CLIPS]
    there = [path for path in results if os.path.lexists(path)]
    if there and not args.overwrite:
        problems.append(f"--output_dir: {there[0]} exists; add --overwrite to overwrite it")
    if args.clips is not None:
        speaks = ("base_ckpt", "adapter", "merged", "reference", "ref_audio")
        if given := [f"--{name}" for name in speaks if getattr(args, name)]:
            problems.append(f"--clips: no model speaks; omit {', '.join(given)}")
        flags.refuse(problems)
        return PROMPT_STYLES[0]
    flags.refuse(problems)
    flags.check_flags(args)
    args.reference = list(dict.fromkeys(args.reference or ["clip" if args.ref_audio else "row"]))
    args.sampler, args.stop = list(dict.fromkeys(args.sampler)), list(dict.fromkeys(args.stop or ()))
    if "greedy" not in args.sampler and args.stop not in ([], ["boson"], ["sglang"]):
        problems.append("--stop: stop rules apply to greedy decoding only; omit it or add --sampler greedy")
    if ("clip" in args.reference) != (args.ref_audio is not None):
        problems.append("--reference clip, --ref_audio: one requires the other")
    flags.refuse(problems)
    ref = flags.reference_clip(args)
    flags.check_adapter(args)
    return flags.prompt_options(args, ref)["prompt_style"]


def _device(args: argparse.Namespace, asked: Asked, style: str) -> str:
    """Checks the prompts and returns the device to judge on; only --clips can be judged without a usable GPU."""
    from ..distributed.device import name_accelerator

    if args.clips is not None:
        import torch

        return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    from .judge_speech import prompt_of

    device = str(name_accelerator())  # fails before anything is downloaded or loaded
    texts = [(sentence.origin, sentence.text) for sentence in asked.sentences]
    for reference in args.reference:
        prompts = [prompt_of(sentence, reference, asked, args, style) for sentence in asked.sentences]
        flags.check_prompts(args, texts, prompts)
    return device


def _panel(args: argparse.Namespace, asked: Asked, device: str) -> Panel:
    """Loads the judges and enrols the recordings. Raises ConfigError."""
    from ..judges.panel import NONE, open_panel

    if args.voice != NONE and not asked.corpus:
        say("--voice: similarity and lengths are not measured; they need --manifest, for the speaker's recordings")
        args.voice = NONE
    panel = open_panel(args.words, args.voice, args.sound, device)
    recordings = (_read(sentence, sentence.recording, is_recording=True) for sentence in asked.corpus)
    problems = [line for clip in recordings if clip is not None and (line := panel.enrol(clip))]
    if problems:
        say("\n".join(first_of(problems)))
    return panel


def _read(sentence: Sentence, ref: AudioRef | None, **about) -> Clip | None:
    """Reads a clip, empty if `ref` is None; prints a message and returns None if it cannot be read."""
    from ..judges.clips import read_clip

    try:
        return read_clip(sentence, ref, **about)
    except ConfigError as error:
        say(f"{error}; skipped")
        return None


def _copies(asked: Asked, codec: Codec, codebooks: int | None, folder: Path) -> list[Made]:
    """Encodes and decodes the recordings: an upper bound on the quality of any model with this codec."""
    from .judge_texts import Made

    copies = []
    for number, sentence in enumerate(asked.sentences, 1):
        clip = _read(sentence, sentence.recording) if sentence.recording else None
        if clip is not None:
            codes = codec.encode(clip.waveform, clip.sample_rate)[:codebooks]
            copies.append(Made(sentence, _written(folder, number, codec.decode(codes), codec.sample_rate)))
    return copies


def _written(folder: Path, number: int, waveform: np.ndarray, rate: int) -> Path:
    from ..data.audio import write_wav

    folder.mkdir(parents=True, exist_ok=True)
    write_wav(folder / f"{number:04d}.wav", waveform, rate)
    return folder / f"{number:04d}.wav"


def _clips(asked: Asked, sets: dict[str, list[Made]], folder: Path) -> Iterator[tuple[str, str, Clip]]:
    """Yields (set, file, clip) of all clips to judge, first the recordings, of which it writes copies."""
    from ..data.chatml import AudioRef
    from ..judges.summary import RECORDINGS

    for number, sentence in enumerate(asked.sentences, 1):
        clip = _read(sentence, sentence.recording, is_recording=True) if sentence.recording else None
        if clip is not None:
            yield RECORDINGS, str(_written(folder / RECORDINGS, number, clip.waveform, clip.sample_rate)), clip
    for name, of_set in sets.items():
        for made in of_set:
            clip = _read(made.sentence, AudioRef(made.file) if made.file else None, ended=made.ended)
            if clip is not None:
                yield name, str(made.file or ""), clip


def _judge(args: argparse.Namespace, clips: Iterator[tuple[str, str, Clip]], panel: Panel) -> int:
    """Judges the clips one by one, appends each line to judged.jsonl, and prints the figures."""
    from ..judges.summary import summary

    sets: dict[str, list[tuple[tuple, Line]]] = {}
    failures: Counter[str] = Counter()
    with (args.output_dir / "judged.jsonl").open("w", encoding="utf-8") as out:
        for name, file, clip in clips:
            if name not in sets:
                say(f"judging: {name}")
            line, failed = panel.line(name, file, clip)
            for judge, words in failed.items():
                failures[judge] += 1
                say(f"{file}: {judge}: {words}; skipped")
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            sets.setdefault(name, []).append((clip.sentence.unit, line))
    count = sum(map(len, sets.values()))
    if not count:
        raise ConfigError(["nothing was judged: no clip can be read"])
    say("\n".join(summary(sets)))
    say(f"{args.output_dir / 'judged.jsonl'}: {count} clips; figures with 95 % intervals over texts and speakers")
    return ExitCode.FAILED if count in failures.values() else ExitCode.OK
