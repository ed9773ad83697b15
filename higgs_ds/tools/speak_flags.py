"""Flags and checks that `generate` and `reproduce` share, and the loading of the model that speaks."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.chatml import PROMPT_STYLES
from ..data.texts import composed, is_visible
from ..errors import ConfigError, reading
from ..options.sections import DEFAULT_BASE, DEFAULT_CODEC
from ..process import say
from . import flag_types

if TYPE_CHECKING:
    from ..model.speech import Sampling, Speaker

SAMPLERS = ("greedy", "boson", "served")
MOST_TOKENS = 1 << 20


def voice_flags(parser: argparse.ArgumentParser) -> None:
    """Base, adapter or merged folder, codec and dtype."""
    flag_types.base_flags(parser, f"folder or hub id (default: {DEFAULT_BASE})")
    parser.add_argument("--adapter", type=flag_types.name, metavar="DIR", help="LoRA adapter (default: none)")
    merged_help = "merged checkpoint in either layout, instead of --base_ckpt and --adapter"
    parser.add_argument("--merged", type=flag_types.name, metavar="DIR", help=merged_help)
    codec_help = f"folder or hub id (default: {DEFAULT_CODEC})"
    parser.add_argument("--codec", type=flag_types.name, default=DEFAULT_CODEC, help=codec_help)
    parser.add_argument("--codec_revision", help="revision of the codec on the hub")
    dtype_help = "data type to compute in (default: bf16 on a GPU, fp32 on the CPU)"
    parser.add_argument("--dtype", choices=flag_types.DTYPES, help=dtype_help)


def prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Prompt, reference and sampler."""
    style_help = "how prompts are built (default: as the voice was trained)"
    parser.add_argument("--prompt_style", choices=PROMPT_STYLES, help=style_help)
    parser.add_argument("--scene", help="scene description for the system message")
    ref_help = "clip of the voice to clone; needs --ref_text"
    parser.add_argument("--ref_audio", type=flag_types.path, metavar="FILE", help=ref_help)
    parser.add_argument("--ref_text", help="transcript of --ref_audio")
    sampler_help = (
        "greedy decoding (default), or the sampling defaults of boson_multimodal (boson) or vllm-omni (served)"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help=sampler_help)
    number, temperature_help = flag_types.number, "0 is greedy decoding (default: the sampler's)"
    parser.add_argument("--temperature", type=number(float, 0, 100), help=temperature_help)
    parser.add_argument("--top_k", type=number(int, 1, MOST_TOKENS), help="default: the sampler's")
    parser.add_argument("--top_p", type=number(float, 1e-6, 1), help="default: the sampler's")
    parser.add_argument("--seed", type=number(int, 0, (1 << 63) - 1), help="random seed of the sampler")
    tokens_help = "longest answer, in tokens (default: 1024; in reproduce, twice the frames of the clip)"
    parser.add_argument("--max_new_tokens", type=number(int, 1, MOST_TOKENS), help=tokens_help)


def refuse(problems: list[str]) -> None:
    """Raises ConfigError if there are any."""
    if problems:
        raise ConfigError(problems)


def check_flags(args: argparse.Namespace) -> None:
    """Fills in the base. Raises ConfigError for flags that exclude each other."""
    given = [f"--{name}" for name in ("base_ckpt", "base_revision", "adapter", "other_base") if getattr(args, name)]
    if args.merged is None:
        args.base_ckpt = args.base_ckpt or DEFAULT_BASE
    elif given:
        raise ConfigError([f"--merged: is base and adapter in one; leave {', '.join(given)} out"])
    elif not os.path.isdir(args.merged):
        raise ConfigError([f"--merged: {args.merged} is not a folder; `merge` makes one"])
    is_greedy = args.sampler == "greedy"
    if args.temperature is not None and args.sampler and (args.temperature == 0) != is_greedy:
        raise ConfigError([f"--temperature: {args.temperature:g} and --sampler {args.sampler} exclude each other"])


def keep_existing(flag: str, files: list[Path], args: argparse.Namespace) -> None:
    """Raises ConfigError if files would be overwritten without `--overwrite`."""
    there = [file for file in files if os.path.lexists(file)]
    if there and not args.overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ConfigError([f"{flag}: {there[0]}{more} exists and is kept; --overwrite overwrites it"])


def check_adapter(args: argparse.Namespace) -> None:
    """Reads the adapter's config before the base is looked for, and fills in the base's revision.

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


def sampling_of(args: argparse.Namespace, speaker: Speaker) -> Sampling:
    """The sampler's settings, overridden by the flags."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(speaker.samplers[args.sampler or "greedy"], **given)


def say_unused(args: argparse.Namespace, sampling: Sampling) -> None:
    """Says which flags have no effect on greedy decoding."""
    unused = [f"--{name}" for name in ("top_k", "top_p", "seed") if getattr(args, name) is not None]
    if unused and not sampling.temperature:
        say(f"{', '.join(unused)}: no effect on greedy decoding (--sampler, --temperature)")


def empty_texts(texts: list[tuple[str, str]]) -> list[str]:
    """Texts that cannot be spoken, each with its flag or line."""
    return [
        f"{where}: holds no letter and no digit" if text else f"{where}: is empty"
        for where, text in texts
        if not is_visible(text)
    ]


def texts_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(flag or line, text) of everything to be spoken."""
    if not args.texts:
        return _as_trained([("--text", args.text.strip())])
    with reading(f"--texts: {args.texts}"):
        lines = args.texts.read_text(encoding="utf-8-sig").rstrip().split("\n")
    if lines == [""]:
        raise ConfigError([f"--texts: {args.texts} holds no text; put one on each line"])
    return _as_trained([(f"--texts: {args.texts}:{number}", line.strip()) for number, line in enumerate(lines, 1)])


def _as_trained(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The texts composed as those of a manifest are, which is said once."""
    found = [(where, composed(text).strip()) for where, text in texts]
    if changed := [where for (where, text), (_, given) in zip(found, texts, strict=True) if text != given]:
        say(f"{changed[0]}: read with composed letters (NFC) and blanks for line breaks, as in training")
    return found


def reference_clip(args: argparse.Namespace):
    """The clip of the voice to clone, read once so that a damaged one is refused before anything is loaded."""
    from ..data.audio import read_audio
    from ..data.chatml import AudioRef

    if (args.ref_audio is None) != (args.ref_text is None):
        raise ConfigError(["--ref_audio, --ref_text: one needs the other"])
    if args.ref_audio is None:
        return None
    refuse(empty_texts([("--ref_text", args.ref_text.strip())]))
    ref = AudioRef(args.ref_audio)
    with reading(f"--ref_audio: {args.ref_audio}"):
        read_audio(ref)
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
        say(f"{folder} does not record its prompt style; {style} is used (--prompt_style)")
    more = {"scene": args.scene if args.scene and args.scene.strip() else None, "prompt_style": style}
    return more | ({"ref_text": args.ref_text, "ref_audio": ref} if ref else {})


def check_prompts(args: argparse.Namespace, texts: list[tuple[str, str]], prompts: list) -> None:
    """Checks texts as the rows of a manifest are checked.

    Raises:
        ConfigError: the flag or line of a text that holds control tokens, or is too long with its reference clip.
    """
    from ..data.audio import duration_sec
    from ..data.controls import control_tokens, find_control
    from ..model.base import locate_checkpoint
    from ..model.families import family_at
    from .describe import frames_of

    name, flag = base_of(args)
    folder = locate_checkpoint(name, args.base_revision, flag, weights=False)
    family = family_at(folder, flag)  # a folder without a config.json has no tokenizer either, which says less
    tokenizer = family.load_tokenizer(folder, flag)
    controls = control_tokens(tokenizer)
    asked = [*texts, *((f"--{name}", text) for name in ("scene", "ref_text") if (text := getattr(args, name)))]
    refuse([f"{where}: {problem}" for where, text in asked if (problem := find_control(text, controls))])
    # A clip's frames stand in the place of its one token.
    clips = [piece for turn in (prompts[0] if prompts else ()) for piece in turn.content if not isinstance(piece, str)]
    frames = sum(frames_of(duration_sec(clip)) - 1 for clip in clips)
    counts = [len(family.tokenize(prompt, None, tokenizer)[0]) + frames for prompt in prompts]
    refuse(
        [
            f"{where}: the prompt takes {count} tokens, over --max_row_tokens {args.max_row_tokens}"
            for (where, _), count in zip(texts, counts, strict=True)
            if count > args.max_row_tokens
        ]
    )


def open_speaker(args: argparse.Namespace) -> Speaker:
    """Base, adapter and codec, loaded. Raises ConfigError."""
    from ..codec.load import load_codec
    from ..model.families import family_of, open_base

    name, flag = base_of(args)
    base = open_base(name, args.base_revision, flag)
    if base.notes:
        say("\n".join(base.notes))
    most = base.spec.max_positions
    if args.max_new_tokens and args.max_new_tokens > most:
        raise ConfigError([f"--max_new_tokens: {args.max_new_tokens} is over the model's {most} positions"])
    codec = load_codec(args.codec, args.codec_revision)
    return family_of(base).speaker(base, args.adapter, codec, dtype=args.dtype, other_base=args.other_base)
