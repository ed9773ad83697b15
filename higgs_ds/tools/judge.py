"""`python -m higgs_ds judge`: a voice, or a folder of clips, judged beside the recordings and the codec's copies."""

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
    """The flags of `judge`."""
    parser = verbs.add_parser("judge", help="measure words, voice, sound and ends of a voice or of a folder of clips")
    add, number = parser.add_argument, flag_types.number
    add("--manifest", type=flag_types.path, metavar="FILE", help="held-out rows: texts, speakers and recordings")
    add("--audio_root", type=flag_types.name, metavar="DIR", help="folder for clips, before the manifest's own")
    add("--texts", type=flag_types.path, metavar="FILE", help="speak these texts, one a line, instead of the rows'")
    add("--speaker", type=flag_types.name, help="judge this speaker's rows, or --texts as in this speaker's voice")
    add("--count", type=number(int, 1), metavar="N", help="judge N texts, evenly spread (default: all)")
    clips_help = "judge these clips instead of a model's: named as the recordings, or by row or line: 0001.wav"
    add("--clips", type=flag_types.path, metavar="DIR", help=clips_help)
    for name in ("words", "voice"):
        default, about = OPTIONS[name].default, str(OPTIONS[name].field.description)
        text = f"{about[0].lower()}{about[1:-1]}, or none (default: {default})"
        add(f"--{name}", type=flag_types.name, default=default, metavar="NAME", help=text)
    add("--sound", choices=("dnsmos", "none"), default="dnsmos", help="judge of the sound (default: dnsmos)")
    flags.voice_flags(parser)
    reference_help = (
        "clip to clone: the row's own, none, another one of the speaker's, or --ref_audio; several are judged one by "
        "one (default: clip where --ref_audio is given, else row)"
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
    """Speaks, judges, and says the figures; returns 1 if one of the judges failed on every clip."""
    from ..judges.summary import CODEC
    from .judge_texts import asked_of, clips_in

    style = _check_flags(args)
    asked = asked_of(args, style)
    if args.clips is not None:
        clips = clips_in(args.clips, asked)
        if lacking := len(asked.sentences) - len(clips):
            say(f"--clips: {lacking} of {len(asked.sentences)} texts have no clip; they are left out")
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
    """Removes the clips of an earlier call: numbered files in the folders that `judge` names, and nothing else."""
    from ..judges.summary import CODEC, RECORDINGS

    spoken = map("-".join, product(flags.SAMPLERS, STOP_RULES, REFERENCES))
    for own in (folder / name for name in (CODEC, RECORDINGS, *spoken)):
        if own.is_dir() and not (keep and keep.resolve() == own.resolve()):
            for file in own.glob("[0-9][0-9][0-9][0-9]*.wav"):
                file.unlink()
            if not any(own.iterdir()):
                own.rmdir()


def _check_flags(args: argparse.Namespace) -> str:
    """Flags that exclude each other, and outputs that exist; fills in defaults. Returns the style of the prompts."""
    problems = []
    if args.manifest is None and args.texts is None:
        problems.append("--manifest, --texts: give one, for the texts to judge")
    results = [args.output_dir / "judged.jsonl", args.output_dir / CLIPS]
    there = [path for path in results if os.path.lexists(path)]
    if there and not args.overwrite:
        problems.append(f"--output_dir: {there[0]} exists and is kept; --overwrite overwrites it")
    if args.clips is not None:
        speaks = ("base_ckpt", "adapter", "merged", "reference", "ref_audio")
        if given := [f"--{name}" for name in speaks if getattr(args, name)]:
            problems.append(f"--clips: are judged as they are; leave {', '.join(given)} out")
        flags.refuse(problems)
        return PROMPT_STYLES[0]
    flags.refuse(problems)
    flags.check_flags(args)
    args.reference = list(dict.fromkeys(args.reference or ["clip" if args.ref_audio else "row"]))
    args.sampler, args.stop = list(dict.fromkeys(args.sampler)), list(dict.fromkeys(args.stop or ()))
    if "greedy" not in args.sampler and args.stop not in ([], ["boson"], ["sglang"]):
        problems.append("--stop: stop rules are compared with greedy decoding; leave it out, or add --sampler greedy")
    if ("clip" in args.reference) != (args.ref_audio is not None):
        problems.append("--reference clip, --ref_audio: one needs the other")
    flags.refuse(problems)
    ref = flags.reference_clip(args)
    flags.check_adapter(args)
    return flags.prompt_options(args, ref)["prompt_style"]


def _device(args: argparse.Namespace, asked: Asked, style: str) -> str:
    """The device to judge on, with the prompts checked; clips alone are judged on the CPU where there is no GPU."""
    from ..distributed.device import name_accelerator

    if args.clips is not None:
        import torch

        return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    from .judge_speech import prompt_of

    device = str(name_accelerator())  # refused before anything is downloaded or loaded
    texts = [(sentence.origin, sentence.text) for sentence in asked.sentences]
    for reference in args.reference:
        prompts = [prompt_of(sentence, reference, asked, args, style) for sentence in asked.sentences]
        flags.check_prompts(args, texts, prompts)
    return device


def _panel(args: argparse.Namespace, asked: Asked, device: str) -> Panel:
    """The judges, with the voices and the pace of the recordings learnt. Raises ConfigError."""
    from ..judges.panel import NONE, open_panel

    if args.voice != NONE and not asked.corpus:
        say("--voice: needs --manifest, for the speaker's recordings; similarity and lengths are left out")
        args.voice = NONE
    panel = open_panel(args.words, args.voice, args.sound, device)
    recordings = (_read(sentence, sentence.recording, is_recording=True) for sentence in asked.corpus)
    left_out = [line for clip in recordings if clip is not None and (line := panel.enrol(clip))]
    if left_out:
        say("\n".join(first_of(left_out)))
    return panel


def _read(sentence: Sentence, ref: AudioRef | None, **about) -> Clip | None:
    """A clip, empty where it has no file; None, and a line, for one that cannot be read."""
    from ..judges.clips import read_clip

    try:
        return read_clip(sentence, ref, **about)
    except ConfigError as error:
        say(f"{error}; left out")
        return None


def _copies(asked: Asked, codec: Codec, codebooks: int | None, folder: Path) -> list[Made]:
    """The recordings' codes decoded: no model that speaks in these codes can sound better."""
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
    """(set, file, clip) of everything to be judged, the recordings first, which are written beside the others."""
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
    """Judges one clip after the other, each with its line in judged.jsonl, and says the figures."""
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
                say(f"{file}: {judge}: {words}; left out")
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            sets.setdefault(name, []).append((clip.sentence.unit, line))
    count = sum(map(len, sets.values()))
    if not count:
        raise ConfigError(["nothing was judged: no clip can be read"])
    say("\n".join(summary(sets)))
    say(f"{args.output_dir / 'judged.jsonl'}: {count} clips; figures with their 95 % intervals over texts and speakers")
    silent = [judge for judge, number in failures.items() if number == count]
    return ExitCode.FAILED if silent else ExitCode.OK
