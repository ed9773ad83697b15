"""The verbs beside training: `python -m higgs_ds tiny | sample-codec | import | describe | prepare | check | …`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .config import DEFAULT_BASE, DEFAULT_CODEC
from .corpus.audio import AudioError
from .errors import ConfigError, ExitCode
from .merge_cli import add_export, add_merge
from .process import say


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code (0 done, 1 failed, 2 wrong flags or data)."""
    if argv[:1] == ["check"]:
        # `check` takes the flags of train_ds.py as they are; it stands beside this package.
        from train_ds import main as train

        return train(argv[1:], check_only=True)
    try:
        if argv[:1] == ["prepare"]:
            from .prepare import main as prepare

            return prepare(argv[1:])
        args = _parser().parse_args(argv)
        return args.verb(args)
    except (ConfigError, AudioError, FileExistsError) as error:
        if os.environ.get("RANK", "0") == "0":
            say(str(error), error=True)
        return ExitCode.CONFIG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m higgs_ds", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    tiny = verbs.add_parser("tiny", help="write a small random base checkpoint, to try everything with")
    tiny.add_argument("--output_dir", type=Path, required=True)
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(verb=_tiny)

    codec = verbs.add_parser("sample-codec", help="fit the sample codec on a manifest's clips")
    codec.add_argument("--train_manifest", required=True)
    codec.add_argument("--output_dir", type=Path, required=True)
    codec.add_argument("--seed", type=int, default=0)
    codec.set_defaults(verb=_sample_codec)

    _import_flags(verbs.add_parser("import", help="make a manifest of what other tools write"))

    describe = verbs.add_parser("describe", help="what a manifest holds, and what training on it will take")
    describe.add_argument("--train_manifest", required=True)
    describe.add_argument("--val_manifest")
    describe.add_argument("--output_dir", type=Path, help="where describe.html, describe.png and faults.jsonl go")
    describe.add_argument("--audio_root", help="folder that paths are relative to which are not beside the manifest")
    describe.add_argument("--base_ckpt", help="folder of a checkpoint, whose tokenizer counts instead of an estimate")
    describe.add_argument("--max_tokens_per_batch", type=int, default=8192)
    describe.add_argument("--epochs", type=float, default=1.0)
    describe.set_defaults(verb=_describe)

    verbs.add_parser("prepare", help="encode all clips and count all tokens ahead; takes the flags of train_ds.py")
    verbs.add_parser("check", help="the loss checklist on the first batches; takes the flags of train_ds.py")

    generate = verbs.add_parser("generate", help="speak a text with upstream's own generate")
    _speaker_flags(generate)
    generate.add_argument("--text", required=True)
    generate.add_argument("--output_file", type=Path, required=True)
    generate.add_argument("--scene", help="scene description for the system message")
    generate.add_argument("--ref_audio", type=Path, help="a clip of the voice to speak with; needs --ref_text")
    generate.add_argument("--ref_text", help="what is said in --ref_audio")
    generate.add_argument("--speaker", help="speak with a clip of this speaker of --train_manifest as the reference")
    generate.add_argument("--train_manifest", help="where --speaker is looked for")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--top_k", type=int)
    generate.add_argument("--top_p", type=float, default=0.95)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--max_new_tokens", type=int, default=1024)
    generate.add_argument("--max_row_tokens", type=int, default=8192, help="longest prompt, in tokens (default: 8192)")
    generate.set_defaults(verb=_generate)

    recite = verbs.add_parser("recite", help="speak the training rows again; share of the codes given back")
    _speaker_flags(recite)
    recite.add_argument("--train_manifest", required=True)
    recite.add_argument("--output_dir", type=Path, required=True)
    recite.add_argument("--at_least", type=float, default=0.0, help="exit 1 if a clip gives back a smaller share")
    recite.set_defaults(verb=_recite)

    add_merge(verbs)
    add_export(verbs)
    return parser


def _import_flags(parser: argparse.ArgumentParser) -> None:
    from .corpus.foreign import FORMATS

    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("path", type=Path, metavar="PATH", help="a file or a folder")
    parser.add_argument("--from", dest="source", choices=tuple(FORMATS), help=f"{known} (default: guessed)")
    parser.add_argument("--output", "--output_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--val_share", type=float, default=0.02, help="share of the rows in val.jsonl (default: 0.02)")
    parser.add_argument(
        "--val_speakers", nargs="+", help="these speakers, or so many, are val.jsonl instead of a share"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--trim", action="store_true", help="write new clips without the silence at both ends")
    parser.add_argument("--loudness", type=float, nargs="?", const=-23.0, metavar="LUFS", help="write new clips at -23")
    parser.add_argument("--resample", type=int, nargs="?", const=24000, metavar="HZ", help="write new clips at 24000")
    parser.set_defaults(verb=_import)


def _speaker_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_ckpt", default=DEFAULT_BASE)
    parser.add_argument("--base_revision")
    parser.add_argument("--adapter", help="folder of a PEFT adapter (default: speak with the base alone)")
    parser.add_argument("--other_base", action="store_true", help="the adapter was trained on another base")
    parser.add_argument("--codec", default=DEFAULT_CODEC)
    parser.add_argument("--codec_revision")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: bf16 on a GPU, fp32 on the CPU")


def _tiny(args) -> int:
    from .model.tiny import write_tiny

    count = write_tiny(args.output_dir, seed=args.seed)
    say(f"{args.output_dir}: a random base checkpoint of {count:,} parameters")
    return ExitCode.OK


def _import(args) -> int:
    from .corpus.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE
    from .corpus.ingest import Sound, run_import

    problems = []
    if not 0 <= args.val_share < 1:
        problems.append(f"--val_share: {args.val_share} must be 0 or more and below 1")
    if args.resample is not None and not MIN_SAMPLE_RATE <= args.resample <= MAX_SAMPLE_RATE:
        problems.append(f"--resample: {args.resample} must be {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz")
    if args.loudness is not None and not -70 <= args.loudness <= 0:
        problems.append(f"--loudness: {args.loudness} must be -70 to 0 LUFS")
    if problems:
        raise ConfigError(problems)
    lines = run_import(
        args.path,
        args.output,
        kind=args.source,
        val_share=args.val_share,
        val_speakers=args.val_speakers,
        seed=args.seed,
        sound=Sound(args.trim, args.loudness, args.resample),
    )
    say("\n".join(lines))
    return ExitCode.OK


def _describe(args) -> int:
    from .corpus.describe import run_describe

    tokenizer = None
    if args.base_ckpt is not None:
        from .model.base import load_tokenizer, locate_checkpoint

        tokenizer = load_tokenizer(locate_checkpoint(args.base_ckpt))
    if args.max_tokens_per_batch < 1 or not 0 < args.epochs < float("inf"):
        raise ConfigError(["--max_tokens_per_batch, --epochs: must be above 0"])
    lines = run_describe(
        [manifest for manifest in (args.train_manifest, args.val_manifest) if manifest],
        args.output_dir,
        audio_root=args.audio_root,
        tokenizer=tokenizer,
        max_tokens=args.max_tokens_per_batch,
        epochs=args.epochs,
    )
    say("\n".join(lines))
    return ExitCode.OK


def _sample_codec(args) -> int:
    from .codec.sample import SampleCodec
    from .corpus.audio import read_audio
    from .corpus.faults import Fault, grouped
    from .corpus.manifest import read_manifest

    rows, faults = read_manifest(args.train_manifest)
    clips = {}
    for row in rows:
        for where, ref in row.audio_refs:
            try:
                clips.setdefault(ref, read_audio(ref))
            except AudioError as error:
                faults.append(Fault(row.file, row.line, where, str(error)))
    if faults or not clips:
        raise ConfigError([*grouped(faults), f"{args.train_manifest}: no codec fitted"])
    codec = SampleCodec.fit(clips.values(), seed=args.seed)
    codec.save(args.output_dir)
    say(f"{args.output_dir}: the sample codec, fitted on {len(clips)} clips")
    return ExitCode.OK


def _speaker(args):
    from .distributed.device import name_accelerator

    name_accelerator()  # refused before anything is downloaded or loaded
    from .codec.load import load_codec
    from .model.base import open_base
    from .model.speaker import Speaker

    base = open_base(args.base_ckpt, args.base_revision)
    if base.notes:
        say("\n".join(base.notes))
    codec = load_codec(args.codec, args.codec_revision)
    return Speaker(base, args.adapter, codec, dtype=args.dtype, other_base=args.other_base)


def _generate(args) -> int:
    from .corpus.audio import read_audio, write_wav
    from .corpus.manifest import AudioRef, speech_messages
    from .corpus.voices import reference_of
    from .model.speaker import Sampling

    if (args.ref_audio is None) != (args.ref_text is None):
        raise ConfigError(["--ref_audio, --ref_text: one needs the other"])
    ref = AudioRef(args.ref_audio, None, None, None) if args.ref_audio else None
    if (args.speaker is None) != (args.train_manifest is None) or (args.speaker is not None and ref is not None):
        raise ConfigError(
            ["--speaker, --train_manifest: one needs the other, and they stand in the place of --ref_audio"]
        )
    if args.speaker is not None:
        args.ref_text, ref = reference_of(args.train_manifest, args.speaker)
        say(f"the voice of {args.speaker}: {ref.path or 'a clip within the manifest'}")
    args.scene = args.scene if args.scene and args.scene.strip() else None
    asked = {name: text.strip() for name in ("text", "scene", "ref_text") if (text := getattr(args, name)) is not None}
    messages, _ = speech_messages(asked.pop("text"), None, ref_audio=ref, **asked)
    _check_prompt(args, messages)
    speaker = _speaker(args)
    context = [speaker.codec.encode(*read_audio(ref))] if ref else []
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    codes = speaker.speak(messages, context, sampling, force_audio=True)
    if codes is None or codes.shape[1] == 0:
        say("the model ended its answer without a frame of audio; nothing was written", error=True)
        return ExitCode.FAILED
    write_wav(args.output_file, speaker.decode(codes), speaker.codec.sample_rate)
    seconds = codes.shape[1] / speaker.codec.frame_rate
    say(f"{args.output_file}: {seconds:.2f} s, {codes.shape[1]} frames")
    return ExitCode.OK


def _check_prompt(args, messages) -> None:
    """Asks of what is to be spoken what a row of a manifest is asked.

    Raises:
        ConfigError: with the flag whose text is empty, holds control tokens, or is too long.
    """
    from .batching.collate import tokenize
    from .corpus.controls import control_tokens, find_control
    from .model.base import load_tokenizer, locate_checkpoint

    tokenizer = load_tokenizer(locate_checkpoint(args.base_ckpt, args.base_revision))
    controls = control_tokens(tokenizer)
    problems = []
    for name in ("text", "scene", "ref_text"):
        text = getattr(args, name)
        problem = None if text is None else "is empty" if not text.strip() else find_control(text, controls)
        if problem:
            problems.append(f"--{name}: {problem}")
    if not problems and (count := len(tokenize(messages, None, tokenizer)[0])) > args.max_row_tokens:
        problems.append(f"--text: the prompt takes {count} tokens, over --max_row_tokens {args.max_row_tokens}")
    if problems:
        raise ConfigError(problems)


def _recite(args) -> int:
    from .corpus.faults import grouped
    from .corpus.manifest import read_manifest
    from .recite import recite

    rows, faults = read_manifest(args.train_manifest)
    if faults:
        raise ConfigError(grouped(faults))
    recitals = recite(_speaker(args), rows, args.output_dir)
    if not recitals:
        raise ConfigError([f"{args.train_manifest}: no row ends in a clip to speak"])
    for r in recitals:
        length = "right length" if r.frames == r.spoken_frames else f"{r.spoken_frames} frames for {r.frames}"
        say(f"{100 * r.share:6.2f} %  {length:<22}  {r.text[:60]}")
    frames = sum(r.frames for r in recitals)
    share = sum(r.share * r.frames for r in recitals) / frames
    right = sum(r.frames == r.spoken_frames for r in recitals)
    worst = min(r.share for r in recitals)
    say(
        f"{100 * share:.2f} % of the codes of {len(recitals)} clips given back (worst clip {100 * worst:.2f} %), "
        f"{right} of {len(recitals)} lengths right"
    )
    say(f"listen: {args.output_dir}/*.spoken.wav beside *.original.wav")
    return ExitCode.OK if worst >= args.at_least else ExitCode.FAILED
