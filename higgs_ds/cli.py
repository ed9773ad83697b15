"""The verbs beside training: `python -m higgs_ds tiny | sample-codec | prepare | check | generate | recite | …`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .audio import AudioError
from .config import DEFAULT_BASE, DEFAULT_CODEC, ConfigError
from .merge_cli import add_export, add_merge

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2


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
            print(error, file=sys.stderr)
        return EXIT_CONFIG


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

    verbs.add_parser("prepare", help="encode all clips and count all tokens ahead; takes the flags of train_ds.py")
    verbs.add_parser("check", help="the loss checklist on the first batches; takes the flags of train_ds.py")

    generate = verbs.add_parser("generate", help="speak a text with upstream's own generate")
    _speaker_flags(generate)
    generate.add_argument("--text", required=True)
    generate.add_argument("--output_file", type=Path, required=True)
    generate.add_argument("--scene", help="scene description for the system message")
    generate.add_argument("--ref_audio", type=Path, help="a clip of the voice to speak with; needs --ref_text")
    generate.add_argument("--ref_text", help="what is said in --ref_audio")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--top_k", type=int)
    generate.add_argument("--top_p", type=float, default=0.95)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--max_new_tokens", type=int, default=1024)
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


def _speaker_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base_ckpt", default=DEFAULT_BASE)
    parser.add_argument("--base_revision")
    parser.add_argument("--adapter", help="folder of a PEFT adapter (default: speak with the base alone)")
    parser.add_argument("--other_base", action="store_true", help="the adapter was trained on another base")
    parser.add_argument("--codec", default=DEFAULT_CODEC)
    parser.add_argument("--codec_revision")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="fp32")


def _tiny(args) -> int:
    from .tiny import write_tiny

    count = write_tiny(args.output_dir, seed=args.seed)
    print(f"{args.output_dir}: a random base checkpoint of {count:,} parameters")
    return EXIT_OK


def _sample_codec(args) -> int:
    from .audio import read_audio
    from .manifest import Fault, read_manifest
    from .sample_codec import SampleCodec

    rows, faults = read_manifest(args.train_manifest)
    clips = {}
    for row in rows:
        for where, ref in row.audio_refs:
            try:
                clips.setdefault(ref, read_audio(ref))
            except AudioError as error:
                faults.append(Fault(row.file, row.line, where, str(error)))
    if faults or not clips:
        raise ConfigError([*map(str, sorted(faults)), f"{args.train_manifest}: no codec fitted"])
    codec = SampleCodec.fit(clips.values(), seed=args.seed)
    codec.save(args.output_dir)
    print(f"{args.output_dir}: the sample codec, fitted on {len(clips)} clips")
    return EXIT_OK


def _speaker(args):
    from .codec import load_codec
    from .generate import Speaker

    codec = load_codec(args.codec, args.codec_revision)
    return Speaker(
        args.base_ckpt,
        args.adapter,
        codec,
        base_revision=args.base_revision,
        dtype=args.dtype,
        other_base=args.other_base,
    )


def _generate(args) -> int:
    from .audio import read_audio, write_wav
    from .generate import Sampling
    from .manifest import AudioRef, speech_messages

    if (args.ref_audio is None) != (args.ref_text is None):
        raise ConfigError(["--ref_audio, --ref_text: one needs the other"])
    ref = AudioRef(args.ref_audio, None, None, None) if args.ref_audio else None
    messages, _ = speech_messages(args.text, None, scene=args.scene, ref_text=args.ref_text, ref_audio=ref)
    speaker = _speaker(args)
    context = [speaker.codec.encode(*read_audio(ref))] if ref else []
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    codes = speaker.speak(messages, context, sampling, force_audio=True)
    if codes is None or codes.shape[1] == 0:
        print("the model ended its answer without a frame of audio; nothing was written", file=sys.stderr)
        return EXIT_FAILED
    write_wav(args.output_file, speaker.decode(codes), speaker.codec.sample_rate)
    seconds = codes.shape[1] / speaker.codec.frame_rate
    print(f"{args.output_file}: {seconds:.2f} s, {codes.shape[1]} frames")
    return EXIT_OK


def _recite(args) -> int:
    from .generate import recite
    from .manifest import read_manifest

    rows, faults = read_manifest(args.train_manifest)
    if faults:
        raise ConfigError([str(fault) for fault in faults])
    recitals = recite(_speaker(args), rows, args.output_dir)
    if not recitals:
        raise ConfigError([f"{args.train_manifest}: no row ends in a clip to speak"])
    for r in recitals:
        length = "right length" if r.frames == r.spoken_frames else f"{r.spoken_frames} frames for {r.frames}"
        print(f"{100 * r.share:6.2f} %  {length:<22}  {r.text[:60]}")
    frames = sum(r.frames for r in recitals)
    share = sum(r.share * r.frames for r in recitals) / frames
    right = sum(r.frames == r.spoken_frames for r in recitals)
    worst = min(r.share for r in recitals)
    print(
        f"{100 * share:.2f} % of the codes of {len(recitals)} clips given back (worst clip {100 * worst:.2f} %), "
        f"{right} of {len(recitals)} lengths right"
    )
    print(f"listen: {args.output_dir}/*.spoken.wav beside *.original.wav")
    return EXIT_OK if worst >= args.at_least else EXIT_FAILED
