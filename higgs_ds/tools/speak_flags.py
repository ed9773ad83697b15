"""Shared flags and checks of the verbs that speak, and loading of the model."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.audio import duration_sec, read_audio
from ..data.chatml import PROMPT_STYLES, AudioRef
from ..data.controls import control_tokens, find_control, without_tags
from ..data.text_findings import oddities
from ..data.texts import composed, is_visible
from ..errors import ConfigError, reading
from ..files import check_writable, writing
from ..options.sections import DEFAULT_BASE, DEFAULT_CODEC
from ..process import say
from . import flag_types
from .describe import frames_of
from .outputs import writable_folder

if TYPE_CHECKING:
    from ..model.files.adapter_file import AdapterConfig
    from ..model.speech import Sampling, Speaker

SAMPLERS = ("greedy", "boson", "served")
MOST_TOKENS = 1 << 20


def voice_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags for base, adapter or merged folder, codec, dtype and reference clip."""
    flag_types.base_flags(parser, f"folder or hub id (default: {DEFAULT_BASE})")
    add = flag_types.adder(parser)
    add("--adapter DIR", "LoRA adapter (default: none)", flag_types.name)
    add("--merged DIR", "merged checkpoint in either layout, instead of --base_ckpt and --adapter", flag_types.name)
    add("--codec", f"folder or hub id (default: the one in the checkpoint, else {DEFAULT_CODEC})", flag_types.name)
    add("--codec_revision", "revision of the codec on the hub")
    add("--dtype", "data type to compute in (default: bf16 on a GPU, fp32 on the CPU)", flag_types.DTYPES)
    add("--prompt_style", "how prompts are built (default: as in the voice's training)", PROMPT_STYLES)
    add("--ref_audio FILE", "clip of the voice to clone; requires --ref_text", flag_types.path)
    add("--ref_text", "transcript of --ref_audio")
    add("--seed", "random seed of the sampler", flag_types.number(int, 0, (1 << 63) - 1))


def sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Adds flags for the scene and one sampler."""
    add, number = flag_types.adder(parser), flag_types.number
    add("--scene", "scene description for the system message")
    sampler_help = (
        "greedy decoding (default), or the sampling defaults of boson_multimodal (boson) or vllm-omni (served)"
    )
    add("--sampler", sampler_help, SAMPLERS)
    add("--temperature", "0 is greedy decoding (default: the sampler's)", number(float, 0, 100))
    add("--top_k", "default: the sampler's", number(int, 1, MOST_TOKENS))
    add("--top_p", "default: the sampler's", number(float, 1e-6, 1))
    tokens_help = "longest answer, in tokens (default: 1024; in reproduce, twice the frames of the clip)"
    add("--max_new_tokens", tokens_help, number(int, 1, MOST_TOKENS))


def refuse(problems: list[str]) -> None:
    """Raises ConfigError if there are any."""
    if problems:
        raise ConfigError(problems)


def check_flags(args: argparse.Namespace) -> None:
    """Fills in the default base. Raises ConfigError for conflicting flags."""
    given = [f"--{name}" for name in ("base_ckpt", "base_revision", "adapter", "other_base") if getattr(args, name)]
    if args.merged is None:
        args.base_ckpt = args.base_ckpt or DEFAULT_BASE
    elif given:
        raise ConfigError([f"--merged: contains base and adapter; omit {', '.join(given)}"])
    elif not os.path.isdir(args.merged):
        raise ConfigError([f"--merged: {args.merged} is not a folder; create one with `merge`"])
    is_greedy = args.sampler == "greedy"
    if args.temperature is not None and args.sampler and (args.temperature == 0) != is_greedy:
        raise ConfigError([f"--temperature: {args.temperature:g} and --sampler {args.sampler} exclude each other"])


def keep_existing(flag: str, files: list[Path], args: argparse.Namespace) -> None:
    """Raises ConfigError if files would be overwritten without `--overwrite`."""
    there = [file for file in files if os.path.lexists(file)]
    if there and not args.overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ConfigError([f"{flag}: {there[0]}{more} exists; add --overwrite to overwrite"])


def check_adapter(args: argparse.Namespace) -> AdapterConfig | None:
    """Reads the adapter's config, before the base is located; fills in the base's revision.

    Raises:
        ConfigError: the adapter is not plain LoRA, or was trained on another base.
    """
    if args.adapter is None:
        return None
    from ..model.files.adapter_file import check_base, read_adapter_config, revision_for
    from ..model.voice_record import base_note

    lora = read_adapter_config(Path(args.adapter))
    args.base_revision = revision_for(lora, args.base_ckpt, args.base_revision)
    if not args.other_base:
        check_base(lora, args.base_ckpt, args.base_revision)
    if note := base_note(Path(args.adapter), "--adapter"):
        say(note)
    return lora


def base_of(args: argparse.Namespace) -> tuple[str, str]:
    """Returns the checkpoint's name and its flag."""
    return (args.base_ckpt, "--base_ckpt") if args.merged is None else (args.merged, "--merged")


def empty_texts(texts: list[tuple[str, str]]) -> list[str]:
    """Reports texts that cannot be spoken, each with its flag or line."""
    return [
        f"{where}: contains no letter or digit" if text else f"{where}: is empty"
        for where, text in texts
        if not is_visible(text)
    ]


def texts_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns (flag or line, text) of all texts to speak."""
    if not args.texts:
        return _as_trained([("--text", args.text.strip())])
    with reading(f"--texts: {args.texts}"):
        lines = args.texts.read_text(encoding="utf-8-sig").rstrip().split("\n")
    if lines == [""]:
        raise ConfigError([f"--texts: {args.texts} contains no text; write one text per line"])
    return _as_trained([(f"--texts: {args.texts}:{number}", line.strip()) for number, line in enumerate(lines, 1)])


def _as_trained(texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Normalises texts like those of a manifest; prints a note if any text changes."""
    found = [(where, composed(text).strip()) for where, text in texts]
    if changed := [where for (where, text), (_, given) in zip(found, texts, strict=True) if text != given]:
        say(f"{changed[0]}: normalised as in training (NFC, spaces for line breaks)")
    return found


def reference_clip(args: argparse.Namespace) -> AudioRef | None:
    """Checks the clip of the voice to clone by reading it, so that a damaged clip fails before anything is loaded."""
    if (args.ref_audio is None) != (args.ref_text is None):
        raise ConfigError(["--ref_audio, --ref_text: one requires the other"])
    if args.ref_audio is None:
        return None
    refuse(empty_texts([("--ref_text", args.ref_text.strip())]))
    ref = AudioRef(args.ref_audio)
    with reading(f"--ref_audio: {args.ref_audio}"):
        read_audio(ref)
    return ref


def prompt_options(args: argparse.Namespace, ref: AudioRef | None) -> dict:
    """Returns the options of `speech_messages`; the default prompt style is that of the voice's training."""
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
        ConfigError: a text contains control tokens, or is too long with its reference clip; names its flag or line.
    """
    from ..model.base import locate_checkpoint
    from ..model.families import family_at

    name, flag = base_of(args)
    folder = locate_checkpoint(name, args.base_revision, flag, weights=False)
    family = family_at(folder, flag)  # first, since its error for a folder without config.json is clearer
    tokenizer = family.load_tokenizer(folder, flag)
    controls = control_tokens(tokenizer)
    asked = [*texts, *((f"--{name}", text) for name in ("scene", "ref_text") if (text := getattr(args, name)))]
    refuse([f"{where}: {problem}" for where, text in asked if (problem := find_control(text, controls))])
    for where, text in asked:
        for kind, example in oddities(without_tags(text, controls)):
            say(f"WARNING: {where}: {kind}, e.g. {example!r}, will be read aloud", error=True)
    # A clip's frames replace its single token.
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


def open_checked(args: argparse.Namespace, texts: list[tuple[str, str]], prompts: list) -> tuple[Speaker, Sampling]:
    """Checks everything that can be checked in advance, then loads base, adapter and codec, and settles the sampling.

    Raises:
        ConfigError: a flag, text, adapter or folder is unusable.
    """
    from ..distributed.device import name_accelerator

    check_adapter(args)
    name_accelerator()  # fails before anything is downloaded or loaded
    check_prompts(args, texts, prompts)
    if args.output_dir is not None:
        writable_folder(args.output_dir)
    else:
        with writing(f"--output_file: {args.output_file}"):
            check_writable(args.output_file.parent)
    speaker = open_speaker(args)
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed", "max_new_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    sampling = dataclasses.replace(speaker.samplers[args.sampler or "greedy"], **given)
    unused = [f"--{name}" for name in ("top_k", "top_p", "seed") if name in given]
    if unused and not sampling.temperature:
        say(f"{', '.join(unused)}: no effect on greedy decoding (--sampler, --temperature)")
    return speaker, sampling


def open_speaker(args: argparse.Namespace) -> Speaker:
    """Loads base, adapter and codec. Raises ConfigError."""
    from ..codec.load import load_codec
    from ..model.families import family_of, open_base

    name, flag = base_of(args)
    base = open_base(name, args.base_revision, flag)
    if base.notes:
        say("\n".join(base.notes))
    most = base.spec.max_positions
    if args.max_new_tokens and args.max_new_tokens > most:
        raise ConfigError([f"--max_new_tokens: {args.max_new_tokens} exceeds the model's {most} positions"])
    is_given = args.codec or args.codec_revision
    codec = load_codec(*((args.codec or DEFAULT_CODEC, args.codec_revision) if is_given else base.codec))
    return family_of(base).speaker(base, args.adapter, codec, dtype=args.dtype, other_base=args.other_base)


def rules_of(args: argparse.Namespace, speaker: Speaker, default: Sequence[str]) -> list[str]:
    """Returns the selected stop rules. Raises ConfigError for a rule that the model does not have."""
    rules = list(dict.fromkeys(args.stop or default))
    if unknown := [rule for rule in rules if rule not in speaker.stop_rules]:
        raise ConfigError([f"--stop: this model has no rule {unknown[0]}, expected {', '.join(speaker.stop_rules)}"])
    return rules
