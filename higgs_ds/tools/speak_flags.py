"""The common part of `generate` and `recite`: flags, what is refused before anything is loaded, and who speaks."""

from __future__ import annotations

import argparse
import dataclasses
import os
import unicodedata
from pathlib import Path

from ..data.chatml import PROMPT_STYLES
from ..errors import ConfigError, reason_of
from ..files import check_writable
from ..options.sections import DEFAULT_BASE, DEFAULT_CODEC
from ..process import say
from . import flag_types

SAMPLERS = ("greedy", "boson", "served")
MOST_TOKENS = 1 << 20
LONGEST_TEXTS = 1 << 24  # bytes of --texts


def voice_flags(parser: argparse.ArgumentParser) -> None:
    """Base, adapter or merged folder, codec and dtype."""
    parser.add_argument("--base_ckpt", type=flag_types.name, help=f"default: {DEFAULT_BASE}")
    parser.add_argument("--base_revision")
    parser.add_argument("--adapter", type=flag_types.name, help="folder of a PEFT adapter (default: the base alone)")
    merged_help = "a merged folder of either layout, in place of the two"
    parser.add_argument("--merged", type=flag_types.name, metavar="FOLDER", help=merged_help)
    parser.add_argument("--other_base", action="store_true", help="the adapter was trained on another base")
    parser.add_argument("--codec", type=flag_types.name, default=DEFAULT_CODEC)
    parser.add_argument("--codec_revision")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")


def prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Prompt, reference and sampler."""
    parser.add_argument("--prompt_style", choices=PROMPT_STYLES, help="default: what the voice was trained on")
    parser.add_argument("--scene", help="scene description for the system message")
    parser.add_argument("--ref_audio", type=flag_types.path, help="a clip of the voice to speak with; needs --ref_text")
    parser.add_argument("--ref_text", help="what is said in --ref_audio")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, help="greedy (default); boson: its engine's defaults; served: vllm-omni's"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token; the sampler's where left out")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max_new_tokens", type=int, help="default: 1024; twice a clip's own frames for recite")


def refuse(problems: list[str]) -> None:
    """Raises ConfigError if there are any."""
    if problems:
        raise ConfigError(problems)


def voice_problems(args: argparse.Namespace) -> list[str]:
    """Fills the base; what does not go together."""
    given = [f"--{name}" for name in ("base_ckpt", "base_revision", "adapter", "other_base") if getattr(args, name)]
    if args.merged is None:
        args.base_ckpt = DEFAULT_BASE if args.base_ckpt is None else args.base_ckpt
        return []
    if given:
        return [f"--merged: is base and adapter in one; leave {', '.join(given)} out"]
    try:
        if not os.path.isdir(args.merged) or "\0" in args.merged:
            return [f"--merged: {args.merged[:200]} is not a folder; `merge` makes one"]
    except ValueError:  # a NUL byte
        return ["--merged: holds a NUL byte"]
    return []


def check_adapter(args: argparse.Namespace) -> None:
    """Asks the adapter's config what it is and was trained on, before that is looked for; fills the base's revision.

    Raises:
        ConfigError: it is not plain LoRA, or was trained on another base.
    """
    if args.adapter is None:
        return
    from ..model.files.adapter_file import check_base, read_adapter_config, revision_for
    from ..model.voice_record import base_note

    lora = read_adapter_config(Path(args.adapter))
    args.base_revision = revision_for(lora, args.base_ckpt, args.base_revision)
    if not args.other_base:
        check_base(lora, args.base_ckpt, args.base_revision)
    if note := base_note(Path(args.adapter), "--adapter"):
        say(note)


def base_of(args: argparse.Namespace) -> tuple[str, str]:
    """The checkpoint that speaks, and the flag that names it."""
    return (args.base_ckpt, "--base_ckpt") if args.merged is None else (args.merged, "--merged")


def sampling_of(args: argparse.Namespace):
    """The sampler's settings, with what the flags say instead."""
    from ..model.higgs_v2.speaker import SAMPLERS as SETTINGS

    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(SETTINGS[args.sampler or "greedy"], **given)


def sampling_problems(args: argparse.Namespace) -> list[str]:
    """Numbers out of their range, and what excludes each other."""
    rules = {
        "temperature": (lambda v: v == 0 or 0.001 <= v <= 100, "must be 0, or 0.001 to 100"),
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


def say_unused(args: argparse.Namespace, sampling) -> None:
    """A line on flags of a sampler where the likeliest token is taken."""
    unused = [f"--{name}" for name in ("top_k", "top_p", "seed") if getattr(args, name) is not None]
    if unused and not sampling.temperature:
        say(f"{', '.join(unused)}: without effect, the likeliest token is taken (--sampler, --temperature)")


def says_something(text: str) -> bool:
    """True if a text holds more than blanks, control characters and such as have no width (U+200B, U+FEFF)."""
    return not all(unicodedata.category(char) in ("Cc", "Cf", "Zs", "Zl", "Zp") for char in text)


def text_problems(args: argparse.Namespace, texts: list[tuple[str, str]]) -> list[str]:
    """Faults of the texts that show without a tokenizer, each with its flag or line."""
    asked = [*texts, *([("--scene", args.scene)] if args.scene else [])]
    asked += [("--ref_text", args.ref_text)] if args.ref_text is not None else []
    problems = []
    for where, text in asked:
        if not says_something(text):
            problems.append(f"{where}: is empty")
        elif "\0" in text:
            problems.append(f"{where}: holds a NUL character; take it out")
        elif not _is_text(text):
            problems.append(f"{where}: holds half a surrogate pair, which is not a character")
    return problems


def texts_of(args: argparse.Namespace, problems: list[str]) -> list[tuple[str, str]]:
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
        problems.append(f"--texts: {str(args.texts)[:200]} cannot be read: {reason_of(error)}")
        return []
    while lines and not says_something(lines[-1]):
        lines.pop()
    if not lines:
        problems.append(f"--texts: {args.texts} holds no text; put one on each line")
    return [(f"--texts: {args.texts}:{number}", line.strip()) for number, line in enumerate(lines, 1)]


def ask_writable(folder: Path, flag: str, problems: list[str], *, make: bool = True) -> None:
    """True if files can be written there; with `make`, a folder that is yet to be made is asked of the one above."""
    try:
        while make and not folder.exists() and folder != folder.parent:
            if folder.is_symlink():
                problems.append(f"{flag}: {folder} is a link to what is not there; name another folder")
                return
            folder = folder.parent
        if not folder.is_dir():
            reason = "is not a folder" if folder.exists() else "is not there; make it first"
            problems.append(f"{flag}: {folder} {reason}")
            return
        check_writable(folder)
    except (OSError, ValueError) as error:
        problems.append(f"{flag}: {str(folder)[:200]} cannot be written to: {reason_of(error)}")


def reference_clip(args: argparse.Namespace, problems: list[str]):
    """The clip to speak like, read once here so that it is refused before anything is loaded."""
    from ..data.audio import AudioError, read_audio
    from ..data.chatml import AudioRef

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


def prompt_options(args: argparse.Namespace, ref) -> dict:
    """For `speech_messages`; the prompt style is the voice's own."""
    from ..model.voice_record import read_record, settled_style

    flag = "--merged" if args.merged else "--adapter"
    folder = args.merged or args.adapter
    style, note = settled_style(args.prompt_style, folder and Path(folder), flag)
    if note:
        say(note)
    elif ref and folder and not args.prompt_style and read_record(Path(folder), flag) is None:
        say(f"{folder} does not say what prompts it was trained on; taken: {style} (--prompt_style)")
    more = {"scene": args.scene if args.scene and args.scene.strip() else None, "prompt_style": style}
    return more | ({"ref_text": args.ref_text, "ref_audio": ref} if ref else {})


def check_prompts(args: argparse.Namespace, texts: list[tuple[str, str]], prompts: list) -> None:
    """Asks of what is to be spoken what a row of a manifest is asked, after `text_problems`.

    Raises:
        ConfigError: with the flag or the line whose text holds control tokens, or is too long together with the
            reference clip.
    """
    from ..data.audio import duration_sec
    from ..data.controls import control_tokens, find_control
    from ..model.base import load_tokenizer, locate_checkpoint
    from ..model.family import HIGGS_V2, family_of
    from ..model.files.layouts import layout_of
    from .describe import frames_of

    name, flag = base_of(args)
    folder = locate_checkpoint(name, args.base_revision, flag, weights=False)
    layout_of(folder, flag)  # a folder without a config.json has no tokenizer either, which says less
    tokenizer = load_tokenizer(folder, flag)
    controls = control_tokens(tokenizer)
    asked = [*texts, *((f"--{name}", text) for name in ("scene", "ref_text") if (text := getattr(args, name)))]
    problems = []
    for where, text in asked:
        if problem := find_control(text, controls):
            problems.append(f"{where}: {problem}")
    # A clip's frames stand in the place of its one token.
    clips = [piece for turn in (prompts[0] if prompts else ()) for piece in turn.content if not isinstance(piece, str)]
    frames = sum(frames_of(duration_sec(clip)) - 1 for clip in clips)
    for (where, _), prompt in zip(texts if not problems else [], prompts if not problems else [], strict=True):
        if (count := len(family_of(HIGGS_V2).tokenize(prompt, None, tokenizer)[0]) + frames) > args.max_row_tokens:
            problems.append(f"{where}: the prompt takes {count} tokens, over --max_row_tokens {args.max_row_tokens}")
    refuse(problems)


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False
    return True


def open_speaker(args: argparse.Namespace):
    """Base, adapter and codec, loaded. Raises ConfigError."""
    from ..codec.load import load_codec
    from ..model.family import HIGGS_V2, family_of

    name, flag = base_of(args)
    family = family_of(HIGGS_V2)
    base = family.open_base(name, args.base_revision, flag)
    if base.notes:
        say("\n".join(base.notes))
    if args.max_new_tokens and args.max_new_tokens > base.facts.max_positions:
        most = base.facts.max_positions
        raise ConfigError([f"--max_new_tokens: {args.max_new_tokens} is over the model's {most} positions"])
    codec = load_codec(args.codec, args.codec_revision)
    return family.speaker(base, args.adapter, codec, dtype=args.dtype, other_base=args.other_base)
