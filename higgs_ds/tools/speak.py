"""`python -m higgs_ds generate` and `recite`: flags, texts and outputs are checked before a model is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import ConfigError, ExitCode, first_of
from ..files import check_writable, writing
from ..process import say
from . import flag_types
from . import speak_flags as flags
from .outputs import writable_folder

STOP_RULES = ("boson", "transformers", "vllm")
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


def add_recite(verbs) -> None:
    """The flags of `recite`."""
    about = "synthesise the training rows again and report the share of their codes that is reproduced"
    parser = verbs.add_parser("recite", help=about)
    flags.voice_flags(parser)
    flags.prompt_flags(parser)
    parser.add_argument("--train_manifest", required=True, metavar="FILE", help="the training rows")
    texts_help = "recite only the rows with these texts, one a line"
    parser.add_argument("--texts", type=flag_types.path, metavar="FILE", help=texts_help)
    dir_help = "folder for original and synthesised clips"
    parser.add_argument("--output_dir", type=flag_types.path, required=True, metavar="DIR", help=dir_help)
    stop_help = (
        "stop rules: a clip ends at the end token of codebook 0 (vllm), of any codebook (transformers), or of the "
        "lowest codebook with one (boson). Default: all three in turn; with a sampler, boson"
    )
    parser.add_argument("--stop", nargs="+", choices=STOP_RULES, help=stop_help)
    parser.add_argument("--overwrite", action="store_true", help="overwrite earlier results in --output_dir")
    least_help = "exit with 1 if a clip reproduces a smaller share of its codes"
    parser.add_argument(
        "--at_least", type=flag_types.number(float, 0, 1), default=0.0, metavar="SHARE", help=least_help
    )
    parser.set_defaults(verb=run_recite, max_row_tokens=flags.MOST_TOKENS)


def run_generate(args: argparse.Namespace) -> int:
    """Synthesises the texts; returns 1 if an answer has no frame of audio."""
    from ..data.audio import read_audio, write_sound
    from ..data.chatml import speech_messages
    from ..distributed.device import name_accelerator

    problems = flags.flag_problems(args)
    _take_speaker(args, problems)
    texts = flags.texts_of(args)
    problems += flags.text_problems(args, texts)
    outputs = _outputs(args, len(texts), problems)
    ref = flags.reference_clip(args, problems)
    flags.refuse(problems)
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


def run_recite(args: argparse.Namespace) -> int:
    """Synthesises the training rows; returns 1 if a clip reproduces less than `--at_least` under any stop rule."""
    from ..data.faults import grouped
    from ..data.manifest import read_manifest
    from ..distributed.device import name_accelerator
    from .recite import recite, table

    problems = flags.flag_problems(args)
    sampled = not problems and bool(args.temperature or (args.sampler or "greedy") != "greedy")
    rules = list(dict.fromkeys(args.stop or ()))
    if sampled and rules not in ([], ["boson"]):
        problems.append("--stop: stop rules are compared with greedy decoding; leave the sampler out, or take boson")
    wanted = [(where, text) for where, text in flags.texts_of(args) if text] if args.texts else None
    problems += flags.text_problems(args, [])
    ref = flags.reference_clip(args, problems)
    earlier = [*sorted(args.output_dir.glob("*.spoken.wav")), args.output_dir / "recital.json"]
    _keep_existing("--output_dir", earlier, args, problems)
    flags.refuse(problems)
    more = flags.prompt_options(args, ref)
    rows, faults = read_manifest(args.train_manifest, prompt_style=more["prompt_style"])
    if faults:
        raise ConfigError(grouped(faults))
    rows = _to_recite(args, rows, wanted)
    replaced = more if ref or more["scene"] else None
    flags.check_adapter(args)
    name_accelerator()  # refused before anything is downloaded or loaded
    if replaced:
        flags.check_prompts(args, [], [])
    writable_folder(args.output_dir)
    speaker = flags.open_speaker(args)
    sampling = flags.sampling_of(args, speaker)
    rules = rules or list(speaker.stop_rules[:1] if sampled else speaker.stop_rules)
    if strange := [rule for rule in rules if rule not in speaker.stop_rules]:
        raise ConfigError([f"--stop: {strange[0]} is no rule of this model, expected {', '.join(speaker.stop_rules)}"])
    flags.say_unused(args, sampling)
    options = {"rules": rules, "sampling": sampling, "prompt": replaced, "max_new_tokens": args.max_new_tokens}
    with writing(f"--output_dir: {args.output_dir}"):
        recitals = recite(speaker, rows, args.output_dir, **options)
    say("\n".join(table(recitals, rules)))
    say(f"listen: {args.output_dir}/*.spoken.wav beside *.original.wav")
    worst = min(share for r in recitals for share in (r.share, *(ending.share for ending in r.endings.values())))
    return ExitCode.OK if worst >= args.at_least else ExitCode.FAILED


def _to_recite(args: argparse.Namespace, rows: list, wanted: list[tuple[str, str]] | None) -> list:
    """The rows to recite; says which lines of `--texts` are in none of them."""
    from .recite import target_of

    if wanted is not None:
        texts = {text for _, text in wanted}
        rows = [row for row in rows if (row.target() or ("",))[0].strip() in texts]
        spoken = {row.target()[0].strip() for row in rows}
        missing = f"no row of {args.train_manifest} has this text"
        unspoken = [f"{where}: {missing}" for where, text in wanted if text not in spoken]
        if not rows:
            raise ConfigError(first_of(unspoken))
        if unspoken:
            say("\n".join(first_of(unspoken)))
    if not any(target_of(row) for row in rows):
        raise ConfigError([f"{args.train_manifest}: no row ends with a clip to recite"])
    return rows


def _outputs(args: argparse.Namespace, count: int, problems: list[str]) -> list[Path]:
    """The file of each text."""
    flag, other = ("--texts", "--text") if args.texts else ("--text", "--texts")
    needed, folder = ("--output_dir", args.output_dir) if args.texts else ("--output_file", args.output_file)
    if folder is None or (args.output_dir is not None and args.output_file is not None):
        given = "--output_file" if args.texts else "--output_dir"
        problems.append(f"{flag}: needs {needed}, and no {given}, which is for {other}")
        return []
    if args.texts:
        width = max(4, len(str(count)))
        outputs = [folder / f"{number:0{width}d}.{args.format or 'wav'}" for number in range(1, count + 1)]
    else:
        outputs = [args.output_file]
        if args.format is not None:
            problems.append(f"--format: {args.format} is for --texts; the suffix of --output_file sets its format")
        if args.output_file.suffix.lower().removeprefix(".") not in ENDINGS:
            problems.append(f"--output_file: {args.output_file} must end in .{', .'.join(ENDINGS)}")
    _keep_existing(needed, outputs, args, problems)
    return outputs


def _keep_existing(flag: str, files: list[Path], args: argparse.Namespace, problems: list[str]) -> None:
    """Nothing is overwritten without `--overwrite`."""
    there = [file for file in files if os.path.lexists(file)]
    if there and not args.overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        problems.append(f"{flag}: {there[0]}{more} exists and is kept; --overwrite overwrites it")


def _take_speaker(args: argparse.Namespace, problems: list[str]) -> None:
    """`--speaker` of `--train_manifest` as `--ref_audio` and `--ref_text`."""
    from .voices import reference_of

    if args.speaker is None and args.train_manifest is None:
        return
    given = args.ref_audio is not None or args.ref_text is not None
    if args.speaker is None or args.train_manifest is None or given:
        problems.append("--speaker, --train_manifest: one needs the other, and they replace --ref_audio and --ref_text")
        return
    try:
        args.ref_text, ref = reference_of(args.train_manifest, args.speaker)
    except ConfigError as error:
        problems += error.problems
        return
    if ref.path is None or ref.offset_sec or ref.duration_sec:
        problems.append(
            f"--speaker: the clip of {args.speaker} is part of a longer file; give a file of its own as --ref_audio"
        )
        return
    args.ref_audio = ref.path
    say(f"reference clip of {args.speaker}: {ref.path}")
