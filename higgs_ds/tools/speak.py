"""`python -m higgs_ds generate`: flags, texts and outputs are checked before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError, ExitCode
from ..files import check_writable, writing
from ..process import say
from . import flag_types
from . import speak_flags as flags
from .outputs import writable_folder

ENDINGS = ("wav", "flac", "ogg", "mp3")


def add_generate(verbs) -> None:
    """The flags of `generate`."""
    parser = verbs.add_parser("generate", help="synthesise speech for one text, or for a file of texts")
    flags.voice_flags(parser)
    flags.prompt_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="text to speak")
    what.add_argument("--texts", type=flag_types.path, metavar="FILE", help="one text a line; needs --output_dir")
    file_help = f"for --text; the suffix sets the format: {', '.join(ENDINGS)}"
    parser.add_argument("--output_file", type=flag_types.path, metavar="FILE", help=file_help)
    dir_help = "for --texts; files are numbered by line: 0001.wav, 0002.wav, ..."
    parser.add_argument("--output_dir", type=flag_types.path, metavar="DIR", help=dir_help)
    parser.add_argument("--format", choices=ENDINGS, help="audio format for --texts (default: wav)")
    parser.add_argument("--overwrite", action="store_true", help="overwrite existing output files")
    parser.add_argument("--speaker", help="clone this speaker of --train_manifest, from one of the speaker's clips")
    parser.add_argument("--train_manifest", metavar="FILE", help="manifest with the clips of --speaker")
    most = flag_types.number(int, 1)
    parser.add_argument("--max_row_tokens", type=most, default=8192, help="longest prompt, in tokens (default: 8192)")
    parser.set_defaults(verb=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Synthesises the texts; returns 1 if an answer has no frame of audio."""
    from ..data.audio import read_audio, write_sound
    from ..data.chatml import speech_messages
    from ..distributed.device import name_accelerator

    flags.check_flags(args)
    _take_speaker(args)
    texts = flags.texts_of(args)
    flags.refuse(flags.empty_texts(texts))
    outputs = _outputs(args, len(texts))
    ref = flags.reference_clip(args)
    more = flags.prompt_options(args, ref)
    prompts = [speech_messages(text, None, **more)[0] for _, text in texts]
    flags.check_adapter(args)
    name_accelerator()  # refused before anything is downloaded or loaded
    flags.check_prompts(args, texts, prompts)
    if args.texts:
        writable_folder(args.output_dir)
    else:
        with writing(f"--output_file: {args.output_file}"):
            check_writable(args.output_file.parent)
    speaker = flags.open_speaker(args)
    context = [speaker.codec.encode(*read_audio(ref))] if ref else []
    sampling = flags.sampling_of(args, speaker)
    flags.say_unused(args, sampling)
    silent = 0
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        answer = speaker.speak(prompt, context, sampling, force_audio=True)
        at = f"[{number}/{len(outputs)}] " if len(outputs) > 1 else ""
        if answer.codes is None or answer.codes.shape[1] == 0:
            silent += 1
            why = "the model ended its answer without a frame of audio"
            if not answer.ended:
                why = f"--max_new_tokens {sampling.max_new_tokens} ended it before the first frame of audio; allow more"
            say(f"{at}{output}: {why}; nothing was written", error=True)
            continue
        with writing(str(output)):
            write_sound(output, speaker.decode(answer.codes), speaker.codec.sample_rate)
        frames = answer.codes.shape[1]
        cut = "" if answer.ended else f"; cut off at --max_new_tokens {sampling.max_new_tokens}, not ended by the model"
        say(f"{at}{output}: {frames / speaker.codec.frame_rate:.2f} s, {frames} frames{cut}")
    return ExitCode.FAILED if silent else ExitCode.OK


def _outputs(args: argparse.Namespace, count: int) -> list[Path]:
    """The file of each text."""
    if args.texts:
        if args.output_dir is None or args.output_file is not None:
            raise ConfigError(["--texts: needs --output_dir, and no --output_file, which is for --text"])
        width = max(4, len(str(count)))
        ending = args.format or "wav"
        outputs = [args.output_dir / f"{number:0{width}d}.{ending}" for number in range(1, count + 1)]
        flags.keep_existing("--output_dir", outputs, args)
        return outputs
    if args.output_file is None or args.output_dir is not None:
        raise ConfigError(["--text: needs --output_file, and no --output_dir, which is for --texts"])
    if args.format is not None:
        raise ConfigError([f"--format: {args.format} is for --texts; the suffix of --output_file sets its format"])
    if args.output_file.suffix.lower().removeprefix(".") not in ENDINGS:
        raise ConfigError([f"--output_file: {args.output_file} must end in .{', .'.join(ENDINGS)}"])
    flags.keep_existing("--output_file", [args.output_file], args)
    return [args.output_file]


def _take_speaker(args: argparse.Namespace) -> None:
    """`--speaker` of `--train_manifest` as `--ref_audio` and `--ref_text`."""
    from .voices import reference_of

    if args.speaker is None and args.train_manifest is None:
        return
    given = args.ref_audio is not None or args.ref_text is not None
    if args.speaker is None or args.train_manifest is None or given:
        both = "--speaker, --train_manifest: one needs the other, and they replace --ref_audio and --ref_text"
        raise ConfigError([both])
    args.ref_text, ref = reference_of(args.train_manifest, args.speaker)
    if ref.path is None or ref.offset_sec or ref.duration_sec:
        part = f"--speaker: the clip of {args.speaker} is part of a longer file; give a file of its own as --ref_audio"
        raise ConfigError([part])
    args.ref_audio = ref.path
    say(f"reference clip of {args.speaker}: {ref.path}")
