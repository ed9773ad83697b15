"""`python -m higgs_ds generate` and `recite`: everything that can be refused is, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path

from .config import DEFAULT_BASE, DEFAULT_CODEC
from .corpus.chatml import PROMPT_STYLES
from .errors import ConfigError, ExitCode
from .process import say

SAMPLERS = ("greedy", "boson", "served")
STOP_RULES = ("boson", "transformers", "vllm")
ENDINGS = ("wav", "flac", "ogg", "mp3")
MOST_TOKENS = 1 << 20
LONGEST_TEXTS = 1 << 24  # bytes of --texts


def add_generate(verbs) -> None:
    """The flags of `generate`."""
    parser = verbs.add_parser("generate", help="speak a text, or a file of them, with upstream's own generate")
    _voice_flags(parser)
    _prompt_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text")
    what.add_argument("--texts", type=Path, metavar="FILE", help="one text a line; needs --output_dir")
    parser.add_argument("--output_file", type=Path, help=f"its ending is its format: {', '.join(ENDINGS)}")
    parser.add_argument("--output_dir", type=Path, help="for --texts: 0001.wav and so on, by their lines")
    parser.add_argument("--format", choices=ENDINGS, default="wav", help="of the files of --texts (default: wav)")
    parser.add_argument("--overwrite", action="store_true", help="write over outputs that exist")
    parser.add_argument("--speaker", help="speak with a clip of this speaker of --train_manifest as the reference")
    parser.add_argument("--train_manifest", help="where --speaker is looked for")
    parser.add_argument("--max_row_tokens", type=int, default=8192, help="longest prompt, in tokens (default: 8192)")
    parser.set_defaults(verb=run_generate)


def add_recite(verbs) -> None:
    """The flags of `recite`."""
    parser = verbs.add_parser("recite", help="speak the training rows again; share of the codes given back")
    _voice_flags(parser)
    _prompt_flags(parser)
    parser.add_argument("--train_manifest", required=True)
    parser.add_argument("--texts", type=Path, metavar="FILE", help="recite the rows alone that speak one of its lines")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--stop",
        nargs="+",
        choices=STOP_RULES,
        help="whose stop rule ends a clip: codebook 0 (vllm), any codebook (transformers), the highest that says so "
        "(boson). Default: each in turn; boson alone with a sampler",
    )
    parser.add_argument("--at_least", type=float, default=0.0, help="exit 1 if a clip gives back a smaller share")
    parser.set_defaults(verb=run_recite, max_row_tokens=MOST_TOKENS)


def _voice_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_ckpt", help=f"default: {DEFAULT_BASE}")
    parser.add_argument("--base_revision")
    parser.add_argument("--adapter", help="folder of a PEFT adapter (default: speak with the base alone)")
    parser.add_argument("--merged", metavar="FOLDER", help="a merged folder of either layout, in place of the two")
    parser.add_argument("--other_base", action="store_true", help="the adapter was trained on another base")
    parser.add_argument("--codec", default=DEFAULT_CODEC)
    parser.add_argument("--codec_revision")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")


def _prompt_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt_style", choices=PROMPT_STYLES, help="default: what the voice was trained on")
    parser.add_argument("--scene", help="scene description for the system message")
    parser.add_argument("--ref_audio", type=Path, help="a clip of the voice to speak with; needs --ref_text")
    parser.add_argument("--ref_text", help="what is said in --ref_audio")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="greedy (default); boson: its engine's defaults; served: vllm-omni's"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token; the sampler's where left out")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max_new_tokens", type=int, help="default: 1024; twice a clip's own frames for recite")


def run_generate(args: argparse.Namespace) -> int:
    """Speaks; 1 where the model answers a text without a frame of audio."""
    from .corpus.audio import read_audio, write_sound
    from .corpus.chatml import speech_messages
    from .distributed.device import name_accelerator

    problems = [*_voice_problems(args), *_sampling_problems(args)]
    _take_speaker(args, problems)
    texts = _texts(args, problems)
    outputs = _outputs(args, texts, problems)
    ref = _reference(args, problems)
    _refuse(problems)
    more = _prompt(args, ref)
    prompts = [speech_messages(text, None, **more)[0] for _, text in texts]
    name_accelerator()  # refused before anything is downloaded or loaded
    _check_prompts(args, texts, prompts)
    speaker = _speaker(args)
    context = [speaker.codec.encode(*read_audio(ref))] if ref else []
    sampling = _sampling(args)
    silent = 0
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), 1):
        answer = speaker.speak(prompt, context, sampling, force_audio=True)
        at = f"[{number}/{len(outputs)}] " if len(outputs) > 1 else ""
        if answer.codes is None or answer.codes.shape[1] == 0:
            silent += 1
            say(f"{at}{output}: the model ended its answer without a frame of audio; nothing was written", error=True)
            continue
        try:
            write_sound(output, speaker.decode(answer.codes), speaker.codec.sample_rate)
        except OSError as error:  # the disk filled up meanwhile
            raise ConfigError([f"{output} cannot be written: {error.strerror or error}"]) from None
        frames = answer.codes.shape[1]
        cut = "" if answer.ended else f"; cut off at --max_new_tokens {sampling.max_new_tokens}, not ended by itself"
        say(f"{at}{output}: {frames / speaker.codec.frame_rate:.2f} s, {frames} frames{cut}")
    return ExitCode.FAILED if silent else ExitCode.OK


def run_recite(args: argparse.Namespace) -> int:
    """Recites; 1 where a clip gives back a smaller share than `--at_least`, by any of the stop rules."""
    from .corpus.faults import grouped
    from .corpus.manifest import read_manifest
    from .distributed.device import name_accelerator
    from .recite import recite, table

    problems = [*_voice_problems(args), *_sampling_problems(args)]
    if not 0 <= args.at_least <= 1:
        problems.append(f"--at_least: {args.at_least} is not a share (0 to 1)")
    sampled = _sampling(args).temperature > 0 if not problems else False
    rules = list(dict.fromkeys(args.stop or (("boson",) if sampled else STOP_RULES)))
    if sampled and rules != ["boson"]:
        problems.append("--stop: the rules are compared on the likeliest codes; leave the sampler out, or take boson")
    wanted = {text for _, text in _texts(args, problems)} if args.texts else None
    ref = _reference(args, problems)
    _writable(args.output_dir, "--output_dir", problems)
    _refuse(problems)
    more = _prompt(args, ref)
    rows, faults = read_manifest(args.train_manifest, prompt_style=more["prompt_style"])
    if faults:
        raise ConfigError(grouped(faults))
    rows = [row for row in rows if wanted is None or (row.spoken() or ("",))[0].strip() in wanted]
    replaced = more if ref or more["scene"] else None
    name_accelerator()  # refused before anything is downloaded or loaded
    if replaced:
        _check_prompts(args, [], [])
    recitals = recite(
        *(_speaker(args), rows, args.output_dir), rules=rules, sampling=_sampling(args), prompt=replaced,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    if not recitals:
        raise ConfigError([f"{args.train_manifest}: no row ends in a clip to speak"])
    say("\n".join(table(recitals, rules)))
    say(f"listen: {args.output_dir}/*.spoken.wav beside *.original.wav")
    worst = min(share for r in recitals for share in (r.share, *(ending.share for ending in r.endings.values())))
    return ExitCode.OK if worst >= args.at_least else ExitCode.FAILED


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _voice_problems(args: argparse.Namespace) -> list[str]:
    """Fills the base; what does not go together."""
    given = [f"--{name}" for name in ("base_ckpt", "base_revision", "adapter", "other_base") if getattr(args, name)]
    if args.merged is None:
        args.base_ckpt = args.base_ckpt or DEFAULT_BASE
        return []
    if given:
        return [f"--merged: is base and adapter in one; leave {', '.join(given)} out"]
    try:
        if not os.path.isdir(args.merged) or "\0" in args.merged:
            return [f"--merged: {args.merged[:200]} is not a folder; `merge` makes one"]
    except ValueError:  # a NUL byte
        return ["--merged: holds a NUL byte"]
    return []


def _sampling(args: argparse.Namespace):
    from .model.speaker import SAMPLERS as SETTINGS

    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(SETTINGS[args.sampler or "greedy"], **given)


def _sampling_problems(args: argparse.Namespace) -> list[str]:
    rules = {
        "temperature": (lambda v: math.isfinite(v) and 0 <= v <= 100, "must be 0 to 100"),
        "top_k": (lambda v: 1 <= v <= MOST_TOKENS, f"must be 1 to {MOST_TOKENS}"),
        "top_p": (lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
        "seed": (lambda v: 0 <= v < 1 << 63, "must be 0 to 2^63 - 1"),
        "max_new_tokens": (lambda v: 1 <= v <= MOST_TOKENS, f"must be 1 to {MOST_TOKENS}"),
        "max_row_tokens": (lambda v: v >= 1, "must be 1 or more"),
    }
    values = {name: getattr(args, name) for name in rules}
    problems = [
        f"--{name}: {str(values[name])[:40]} {must}"
        for name, (right, must) in rules.items()
        if values[name] is not None and not right(values[name])
    ]
    if (
        args.temperature is not None
        and args.sampler is not None
        and (args.temperature == 0) != (args.sampler == "greedy")
    ):
        problems.append(f"--temperature: {args.temperature:g} and --sampler {args.sampler} exclude each other")
    return problems


def _texts(args: argparse.Namespace, problems: list[str]) -> list[tuple[str, str]]:
    """(where it stands, text) of what is to be spoken."""
    if not args.texts:
        return [("--text", args.text.strip())]
    try:
        if args.texts.stat().st_size > LONGEST_TEXTS:
            problems.append(f"--texts: {args.texts} is over {LONGEST_TEXTS >> 20} MB; split it")
            return []
        lines = args.texts.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        problems.append(f"--texts: {args.texts} is not UTF-8; save it as UTF-8")
        return []
    except (OSError, ValueError) as error:
        problems.append(f"--texts: {str(args.texts)[:200]} cannot be read: {getattr(error, 'strerror', None) or error}")
        return []
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        problems.append(f"--texts: {args.texts} holds no text; put one on each line")
    return [(f"--texts: {args.texts}:{number}", line.strip()) for number, line in enumerate(lines, 1)]


def _outputs(args: argparse.Namespace, texts: list[tuple[str, str]], problems: list[str]) -> list[Path]:
    """Where each text goes; what hinders that."""
    if args.texts:
        if args.output_file is not None or args.output_dir is None:
            problems.append("--texts: needs --output_dir, and no --output_file")
            return []
        _writable(args.output_dir, "--output_dir", problems)
        width = max(4, len(str(len(texts))))
        outputs = [args.output_dir / f"{number:0{width}d}.{args.format}" for number in range(1, len(texts) + 1)]
        flag = "--output_dir"
    else:
        if args.output_file is None or args.output_dir is not None:
            problems.append("--text: needs --output_file, and no --output_dir")
            return []
        if args.output_file.suffix.lower().removeprefix(".") not in ENDINGS:
            problems.append(f"--output_file: {str(args.output_file)[:200]} must end in .{', .'.join(ENDINGS)}")
        if not problems:
            _writable(args.output_file.parent, "--output_file", problems, make=False)
        outputs, flag = [args.output_file], "--output_file"
    try:
        if folder := next((path for path in outputs if path.is_dir()), None):
            problems.append(f"{flag}: {folder} is a folder")
        elif (there := [path for path in outputs if os.path.lexists(path)]) and not args.overwrite:
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            problems.append(f"{flag}: {there[0]}{more} exists and is kept; --overwrite writes over it")
        for path in outputs[:1]:
            path.with_name(f".{path.name}.{os.getpid()}.tmp").exists()  # a name too long is found here
    except (OSError, ValueError) as error:
        problems.append(
            f"{flag}: {str(outputs[0])[:200]} cannot be written: {getattr(error, 'strerror', None) or error}"
        )
    return outputs


def _writable(folder: Path, flag: str, problems: list[str], *, make: bool = True) -> None:
    """Whether files can be written there; with `make`, a folder that is yet to be made is asked of the one above."""
    try:
        while make and not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            reason = "is not a folder" if folder.exists() else "is not there; make it first"
            problems.append(f"{flag}: {folder} {reason}")
            return
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        problems.append(
            f"{flag}: {str(folder)[:200]} cannot be written to: {getattr(error, 'strerror', None) or error}"
        )


def _reference(args: argparse.Namespace, problems: list[str]):
    """The clip to speak like, read once here so that it is refused before anything is loaded."""
    from .corpus.audio import AudioError, read_audio
    from .corpus.chatml import AudioRef

    if (args.ref_audio is None) != (args.ref_text is None):
        problems.append("--ref_audio, --ref_text: one needs the other")
        return None
    if args.ref_audio is None:
        return None
    ref = AudioRef(args.ref_audio)
    try:
        read_audio(ref)
    except AudioError as error:
        problems.append(f"--ref_audio: {str(args.ref_audio)[:200]} {error}")
    except (OSError, ValueError) as error:
        problems.append(f"--ref_audio: {str(args.ref_audio)[:200]} cannot be read: {error}")
    return ref


def _take_speaker(args: argparse.Namespace, problems: list[str]) -> None:
    """`--speaker` of `--train_manifest` as `--ref_audio` and `--ref_text`."""
    from .corpus.voices import reference_of

    if args.speaker is None and args.train_manifest is None:
        return
    if args.speaker is None or args.train_manifest is None or args.ref_audio or args.ref_text:
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


def _prompt(args: argparse.Namespace, ref) -> dict:
    """For `speech_messages`; the prompt style is the voice's own."""
    from .voice_record import read_record, settled_style

    flag = "--merged" if args.merged else "--adapter"
    folder = args.merged or args.adapter
    style, note = settled_style(args.prompt_style, folder and Path(folder), flag)
    if note:
        say(note)
    elif ref and folder and not args.prompt_style and read_record(Path(folder), flag) is None:
        say(f"{folder} does not say what prompts it was trained on; taken: {style} (--prompt_style)")
    more = {"scene": args.scene if args.scene and args.scene.strip() else None, "prompt_style": style}
    return more | ({"ref_text": args.ref_text, "ref_audio": ref} if ref else {})


def _check_prompts(args: argparse.Namespace, texts: list[tuple[str, str]], prompts: list) -> None:
    """Asks of what is to be spoken what a row of a manifest is asked.

    Raises:
        ConfigError: with the flag or the line whose text is empty, holds control tokens, or is too long.
    """
    from .batching.collate import tokenize
    from .corpus.controls import control_tokens, find_control
    from .model.base_checkpoint import load_tokenizer, locate_checkpoint

    tokenizer = load_tokenizer(locate_checkpoint(args.merged or args.base_ckpt, args.base_revision))
    controls = control_tokens(tokenizer)
    asked = [*texts, *((f"--{name}", text) for name in ("scene", "ref_text") if (text := getattr(args, name)))]
    problems = []
    for where, text in asked:
        problem = "is empty" if not text.strip() else find_control(text, controls)
        problem = problem or (None if _is_text(text) else "holds half a surrogate pair, which is not a character")
        if problem:
            problems.append(f"{where}: {problem}")
    for (where, _), prompt in zip(texts if not problems else [], prompts if not problems else [], strict=True):
        if (count := len(tokenize(prompt, None, tokenizer)[0])) > args.max_row_tokens:
            problems.append(f"{where}: the prompt takes {count} tokens, over --max_row_tokens {args.max_row_tokens}")
    _refuse(problems)


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return True


def _speaker(args: argparse.Namespace):
    from .codec.load import load_codec
    from .model.base_checkpoint import open_base
    from .model.speaker import Speaker

    try:
        base = open_base(args.merged or args.base_ckpt, args.base_revision)
    except ConfigError as error:
        if not args.merged:
            raise
        raise ConfigError([line.replace("--base_ckpt", "--merged") for line in error.problems]) from None
    if base.notes:
        say("\n".join(base.notes))
    if args.max_new_tokens and args.max_new_tokens > base.facts.max_positions:
        most = base.facts.max_positions
        raise ConfigError([f"--max_new_tokens: {args.max_new_tokens} is over the model's {most} positions"])
    codec = load_codec(args.codec, args.codec_revision)
    return Speaker(base, args.adapter, codec, dtype=args.dtype, other_base=args.other_base)
