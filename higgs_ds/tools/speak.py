"""`python -m higgs_ds generate`: synthesises texts, after checking flags, texts and outputs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data.audio import read_audio, write_sound
from ..data.chatml import speech_messages
from ..data.faults import grouped
from ..data.manifest import read_manifest
from ..errors import ConfigError, ExitCode, nearest
from ..files import writing
from ..process import say
from . import flag_types
from . import speak_flags as flags

ENDINGS = ("wav", "flac", "ogg", "mp3")


def add_generate(verbs: Any) -> None:
    """Adds the verb `generate`."""
    parser = verbs.add_parser("generate", help="synthesise speech for one text, or for a file of texts")
    flags.voice_flags(parser)
    flags.sampler_flags(parser)
    add, what = flag_types.adder(parser), flag_types.adder(parser.add_mutually_exclusive_group(required=True))
    what("--text", "text to speak")
    what("--texts FILE", "one text per line; requires --output_dir", flag_types.path)
    file_help = f"for --text; the suffix sets the format: {', '.join(ENDINGS)}"
    add("--output_file FILE", file_help, flag_types.path)
    dir_help = "for --texts; files are numbered by line: 0001.wav, 0002.wav, ..."
    add("--output_dir DIR", dir_help, flag_types.path)
    add("--format", "audio format for --texts (default: wav)", ENDINGS)
    add("--overwrite", "overwrite existing output files", bool)
    add("--speaker", "clone this speaker of --train_manifest, from one of the speaker's clips")
    add("--train_manifest FILE", "manifest with the clips of --speaker")
    add("--max_row_tokens", "longest prompt, in tokens (default: 8192)", flag_types.number(int, 1), default=8192)
    parser.set_defaults(verb=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Synthesises the texts; returns 1 if an answer has no frame of audio."""
    flags.check_flags(args)
    _take_speaker(args)
    texts = flags.texts_of(args)
    flags.refuse(flags.empty_texts(texts))
    outputs = _outputs(args, len(texts))
    ref = flags.reference_clip(args)
    more = flags.prompt_options(args, ref)
    prompts = [speech_messages(text, None, **more)[0] for _, text in texts]
    speaker, sampling = flags.open_checked(args, texts, prompts)
    context = [speaker.codec.encode(*read_audio(ref))] if ref else []
    silent = 0
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        answer = speaker.speak(prompt, context, sampling, force_audio=True)
        at = f"[{number}/{len(outputs)}] " if len(outputs) > 1 else ""
        if answer.codes is None or answer.codes.shape[1] == 0:
            silent += 1
            why = "the model ended its answer without a frame of audio"
            if not answer.ended:
                why = f"cut off at --max_new_tokens {sampling.max_new_tokens} before the first frame of audio; raise it"
            say(f"{at}{output}: {why}; nothing was written", error=True)
            continue
        with writing(str(output)):
            write_sound(output, speaker.decode(answer.codes), speaker.codec.sample_rate)
        frames = answer.codes.shape[1]
        cut = "" if answer.ended else f"; cut off at --max_new_tokens {sampling.max_new_tokens}, not ended by the model"
        say(f"{at}{output}: {frames / speaker.codec.frame_rate:.2f} s, {frames} frames{cut}")
    return ExitCode.FAILED if silent else ExitCode.OK


def _outputs(args: argparse.Namespace, count: int) -> list[Path]:
    """Returns the output file of each text."""
    if args.texts:
        if args.output_dir is None or args.output_file is not None:
            raise ConfigError(["--texts: requires --output_dir; --output_file is for --text"])
        width = max(4, len(str(count)))
        ending = args.format or "wav"
        outputs = [args.output_dir / f"{number:0{width}d}.{ending}" for number in range(1, count + 1)]
        flags.keep_existing("--output_dir", outputs, args)
        return outputs
    if args.output_file is None or args.output_dir is not None:
        raise ConfigError(["--text: requires --output_file; --output_dir is for --texts"])
    if args.format is not None:
        raise ConfigError([f"--format: {args.format} is for --texts; the suffix of --output_file sets its format"])
    if args.output_file.suffix.lower().removeprefix(".") not in ENDINGS:
        raise ConfigError([f"--output_file: {args.output_file} must end in .{', .'.join(ENDINGS)}"])
    flags.keep_existing("--output_file", [args.output_file], args)
    return [args.output_file]


def _take_speaker(args: argparse.Namespace) -> None:
    """Sets `--ref_audio` and `--ref_text` from the speaker's row with the text of median length. Raises ConfigError.

    A single word says little about a voice, and long clips are slow. The choice is deterministic.
    """
    name, manifest = args.speaker, args.train_manifest
    if name is None and manifest is None:
        return
    if name is None or manifest is None or args.ref_audio is not None or args.ref_text is not None:
        both = "--speaker, --train_manifest: one requires the other; they replace --ref_audio and --ref_text"
        raise ConfigError([both])
    rows, faults = read_manifest(manifest)
    speech = [row for row in rows if row.is_speech]
    said = [(*target, row) for row in speech if row.speaker == name and (target := row.target())]
    if not said:
        names = sorted({row.speaker for row in speech if row.speaker is not None})
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        hint = nearest(name, names) or (f"; it has {', '.join(names[:10])}{more}" if names else "; it has none")
        raise ConfigError([*grouped(faults), f"--speaker: {manifest} has no usable row of {name!r}{hint}"])
    args.ref_text, clip, row = sorted(said, key=lambda found: len(found[0]))[len(said) // 2]
    ref = row.audio_refs[clip][1]
    if ref.path is None or ref.offset_sec or ref.duration_sec:
        part = f"--speaker: the clip of {name} is part of a longer file; give a separate file as --ref_audio"
        raise ConfigError([part])
    args.ref_audio = ref.path
    say(f"reference clip of {name}: {ref.path}")
