"""`python -m higgs_ds generate` and `recite`: everything that can be refused is, before anything is loaded."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import ConfigError, ExitCode, first_of, reason_of
from ..process import say
from . import flag_types
from .speak_flags import (
    MOST_TOKENS,
    ask_writable,
    check_adapter,
    check_prompts,
    open_speaker,
    prompt_flags,
    prompt_options,
    reference_clip,
    refuse,
    sampling_of,
    sampling_problems,
    say_unused,
    text_problems,
    texts_of,
    voice_flags,
    voice_problems,
)

STOP_RULES = ("boson", "transformers", "vllm")
ENDINGS = ("wav", "flac", "ogg", "mp3")


def add_generate(verbs) -> None:
    """The flags of `generate`."""
    parser = verbs.add_parser("generate", help="speak a text, or a file of them, with upstream's own generate")
    voice_flags(parser)
    prompt_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text")
    what.add_argument("--texts", type=flag_types.path, metavar="FILE", help="one text a line; needs --output_dir")
    parser.add_argument("--output_file", type=flag_types.path, help=f"its ending is its format: {', '.join(ENDINGS)}")
    parser.add_argument("--output_dir", type=flag_types.path, help="for --texts: 0001.wav and so on, by their lines")
    parser.add_argument("--format", choices=ENDINGS, help="of the files of --texts (default: wav)")
    parser.add_argument("--overwrite", action="store_true", help="write over outputs that exist")
    parser.add_argument("--speaker", help="speak with a clip of this speaker of --train_manifest as the reference")
    parser.add_argument("--train_manifest", help="where --speaker is looked for")
    parser.add_argument("--max_row_tokens", type=int, default=8192, help="longest prompt, in tokens (default: 8192)")
    parser.set_defaults(verb=run_generate)


def add_recite(verbs) -> None:
    """The flags of `recite`."""
    parser = verbs.add_parser("recite", help="speak the training rows again; share of the codes given back")
    voice_flags(parser)
    prompt_flags(parser)
    parser.add_argument("--train_manifest", required=True)
    texts_help = "recite the rows alone that speak one of its lines"
    parser.add_argument("--texts", type=flag_types.path, metavar="FILE", help=texts_help)
    parser.add_argument("--output_dir", type=flag_types.path, required=True)
    parser.add_argument(
        "--stop",
        nargs="+",
        choices=STOP_RULES,
        help="whose stop rule ends a clip: codebook 0 (vllm), any codebook (transformers), the lowest that says so "
        "(boson). Default: each in turn; boson alone with a sampler",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an earlier recital in --output_dir")
    parser.add_argument("--at_least", type=float, default=0.0, help="exit 1 if a clip gives back a smaller share")
    parser.set_defaults(verb=run_recite, max_row_tokens=MOST_TOKENS)


def run_generate(args: argparse.Namespace) -> int:
    """Speaks; 1 where the model answers a text without a frame of audio."""
    from ..data.audio import read_audio, write_sound
    from ..data.chatml import speech_messages
    from ..distributed.device import name_accelerator

    problems = [*voice_problems(args), *sampling_problems(args)]
    _take_speaker(args, problems)
    texts = texts_of(args, problems)
    problems += text_problems(args, texts)
    outputs = _outputs(args, texts, problems)
    ref = reference_clip(args, problems)
    refuse(problems)
    more = prompt_options(args, ref)
    prompts = [speech_messages(text, None, **more)[0] for _, text in texts]
    check_adapter(args)
    name_accelerator()  # refused before anything is downloaded or loaded
    check_prompts(args, texts, prompts)
    speaker = open_speaker(args)
    context = [speaker.codec.encode(*read_audio(ref))] if ref else []
    sampling = sampling_of(args)
    say_unused(args, sampling)
    silent = 0
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        answer = speaker.speak(prompt, context, sampling, force_audio=True)
        at = f"[{number}/{len(outputs)}] " if len(outputs) > 1 else ""
        if answer.codes is None or answer.codes.shape[1] == 0:
            silent += 1
            why = "the model ended its answer without a frame of audio"
            if not answer.ended:
                why = (
                    f"cut off at --max_new_tokens {sampling.max_new_tokens}, before the first frame of audio; give more"
                )
            say(f"{at}{output}: {why}; nothing was written", error=True)
            continue
        try:
            write_sound(output, speaker.decode(answer.codes), speaker.codec.sample_rate)
        except OSError as error:  # the disk filled up meanwhile
            raise ConfigError([f"{output} cannot be written: {reason_of(error)}"]) from None
        frames = answer.codes.shape[1]
        cut = "" if answer.ended else f"; cut off at --max_new_tokens {sampling.max_new_tokens}, not ended by itself"
        say(f"{at}{output}: {frames / speaker.codec.frame_rate:.2f} s, {frames} frames{cut}")
    return ExitCode.FAILED if silent else ExitCode.OK


def run_recite(args: argparse.Namespace) -> int:
    """Recites; 1 where a clip gives back a smaller share than `--at_least`, by any of the stop rules."""
    from ..data.faults import grouped
    from ..data.manifest import read_manifest
    from ..distributed.device import name_accelerator
    from .recite import recite, table

    problems = [*voice_problems(args), *sampling_problems(args)]
    if not 0 <= args.at_least <= 1:
        problems.append(f"--at_least: {args.at_least} is not a share (0 to 1)")
    sampled = sampling_of(args).temperature > 0 if not problems else False
    rules = list(dict.fromkeys(args.stop or (("boson",) if sampled else STOP_RULES)))
    if sampled and rules != ["boson"]:
        problems.append("--stop: the rules are compared on the likeliest codes; leave the sampler out, or take boson")
    wanted = [(where, text) for where, text in texts_of(args, problems) if text] if args.texts else None
    problems += text_problems(args, [])
    ref = reference_clip(args, problems)
    ask_writable(args.output_dir, "--output_dir", problems)
    held = sorted(args.output_dir.glob("*.spoken.wav")) + sorted(args.output_dir.glob("recital.json"))
    if held and not args.overwrite:
        problems.append(f"--output_dir: {_and_more(held)} exists and is kept; --overwrite writes over it")
    refuse(problems)
    more = prompt_options(args, ref)
    rows, faults = read_manifest(args.train_manifest, prompt_style=more["prompt_style"])
    if faults:
        raise ConfigError(grouped(faults))
    rows = _to_recite(args, rows, wanted)
    replaced = more if ref or more["scene"] else None
    check_adapter(args)
    name_accelerator()  # refused before anything is downloaded or loaded
    if replaced:
        check_prompts(args, [], [])
    speaker, sampling = open_speaker(args), sampling_of(args)
    say_unused(args, sampling)
    options = {"rules": rules, "sampling": sampling, "prompt": replaced, "max_new_tokens": args.max_new_tokens}
    try:
        recitals = recite(speaker, rows, args.output_dir, **options)
    except OSError as error:  # the disk filled up meanwhile
        problem = f"--output_dir: {args.output_dir} cannot be written to: {reason_of(error)}"
        raise ConfigError([problem]) from None
    say("\n".join(table(recitals, rules)))
    say(f"listen: {args.output_dir}/*.spoken.wav beside *.original.wav")
    worst = min(share for r in recitals for share in (r.share, *(ending.share for ending in r.endings.values())))
    return ExitCode.OK if worst >= args.at_least else ExitCode.FAILED


def _to_recite(args: argparse.Namespace, rows: list, wanted: list[tuple[str, str]] | None) -> list:
    """The rows that are recited; says which lines of `--texts` none of them speaks."""
    from .recite import target_of

    if wanted is not None:
        texts = {text for _, text in wanted}
        rows = [row for row in rows if (row.spoken() or ("",))[0].strip() in texts]
        spoken = {row.spoken()[0].strip() for row in rows}
        unspoken = [
            f"{where}: no row of {args.train_manifest} speaks it" for where, text in wanted if text not in spoken
        ]
        if not rows:
            raise ConfigError(first_of(unspoken))
        if unspoken:
            say("\n".join(first_of(unspoken)))
    if not any(target_of(row) for row in rows):
        raise ConfigError([f"{args.train_manifest}: no row ends in a clip to speak"])
    return rows


def _outputs(args: argparse.Namespace, texts: list[tuple[str, str]], problems: list[str]) -> list[Path]:
    """The file of each text; what hinders that."""
    if args.texts:
        if args.output_file is not None or args.output_dir is None:
            problems.append("--texts: needs --output_dir, and no --output_file")
            return []
        ask_writable(args.output_dir, "--output_dir", problems)
        width = max(4, len(str(len(texts))))
        outputs = [
            args.output_dir / f"{number:0{width}d}.{args.format or 'wav'}" for number in range(1, len(texts) + 1)
        ]
        flag = "--output_dir"
    else:
        if args.output_file is None or args.output_dir is not None:
            problems.append("--text: needs --output_file, and no --output_dir")
            return []
        if args.format is not None:
            problems.append(f"--format: {args.format} is for --texts; the ending of --output_file is its format")
        if args.output_file.suffix.lower().removeprefix(".") not in ENDINGS:
            problems.append(f"--output_file: {str(args.output_file)[:200]} must end in .{', .'.join(ENDINGS)}")
        if not problems:
            ask_writable(args.output_file.parent, "--output_file", problems, make=False)
        outputs, flag = [args.output_file], "--output_file"
    try:
        if folder := next((path for path in outputs if path.is_dir()), None):
            problems.append(f"{flag}: {folder} is a folder")
        elif (there := [path for path in outputs if os.path.lexists(path)]) and not args.overwrite:
            problems.append(f"{flag}: {_and_more(there)} exists and is kept; --overwrite writes over it")
        for path in outputs[:1]:
            path.exists()  # a name too long is found here
    except (OSError, ValueError) as error:
        problems.append(f"{flag}: {str(outputs[0])[:200]} cannot be written: {reason_of(error)}")
    return outputs


def _and_more(files: list[Path]) -> str:
    return f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])


def _take_speaker(args: argparse.Namespace, problems: list[str]) -> None:
    """`--speaker` of `--train_manifest` as `--ref_audio` and `--ref_text`."""
    from .voices import reference_of

    if args.speaker is None and args.train_manifest is None:
        return
    given = args.ref_audio is not None or args.ref_text is not None
    if args.speaker is None or args.train_manifest is None or given:
        problems.append("--speaker, --train_manifest: one needs the other, and they stand in the place of --ref_audio")
        return
    try:
        args.ref_text, ref = reference_of(args.train_manifest, args.speaker)
    except ConfigError as error:
        problems += error.problems
        return
    if ref.path is None or ref.offset_sec or ref.duration_sec:
        problems.append(f"--speaker: the clip of {args.speaker} is no file of its own; give it as --ref_audio")
        return
    args.ref_audio = ref.path
    say(f"the voice of {args.speaker}: {ref.path}")
