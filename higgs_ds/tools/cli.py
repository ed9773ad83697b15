"""The verbs beside training: `python -m higgs_ds tiny | sample-codec | import | describe | prepare | check | …`."""

from __future__ import annotations

import argparse
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from ..data.audio import AudioError
from ..distributed.launch_env import enter_launch
from ..errors import ConfigError, ExitCode, reason_of, words_of
from ..files import check_writable
from ..options.parse import parse_args, path_flag, text_flag
from ..process import say, tell
from .merge import add_export, add_merge
from .speak import add_generate, add_recite


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code (0 done, 1 failed, 2 wrong flags or data)."""
    try:
        if argv[:1] == ["check"]:
            enter_launch()
            return _check(argv[1:])
        if argv[:1] == ["prepare"]:
            from .prepare import main as prepare

            enter_launch()
            return prepare(argv[1:])
        args = build_parser().parse_args(argv)
        return args.verb(args)
    except (ConfigError, AudioError, FileExistsError) as error:
        return tell(error, argv)
    except Exception as error:  # nobody foresaw it: a damaged file that nobody named, a full disk, or a bug
        tell(ConfigError([f"{' '.join(argv[:1])}: {words_of(error)} (--debug shows where)"]), [])
        if "--debug" in argv:
            traceback.print_exception(error)
        return ExitCode.FAILED


def _check(argv: list[str]) -> int:
    """Takes the flags of train_ds.py as they are."""
    from ..distributed.allocator import grow_segments
    from ..distributed.device import name_accelerator
    from ..distributed.ds_config import read_deepspeed_config

    config = parse_args(argv, prog="python -m higgs_ds check")
    ds_raw = read_deepspeed_config(config.run.deepspeed_config)
    grow_segments()
    name_accelerator()
    from ..run import check

    return check(config, ds_raw)


def build_parser() -> argparse.ArgumentParser:
    """Of every verb but `check` and `prepare`, which take the flags of train_ds.py."""
    parser = argparse.ArgumentParser(prog="python -m higgs_ds", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    tiny = verbs.add_parser("tiny", help="write a small random base checkpoint, to try everything with")
    tiny.add_argument("--output_dir", type=path_flag, required=True)
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(verb=_tiny)

    codec = verbs.add_parser("sample-codec", help="fit the sample codec on a manifest's clips")
    codec.add_argument("--train_manifest", type=text_flag, required=True)
    codec.add_argument("--output_dir", type=path_flag, required=True)
    codec.add_argument("--seed", type=int, default=0)
    codec.set_defaults(verb=_sample_codec)

    _import_flags(verbs.add_parser("import", help="make a manifest of what other tools write"))

    describe = verbs.add_parser("describe", help="what a manifest holds, and what training on it will take")
    manifests = "with weights, as train_ds.py takes them"
    describe.add_argument("--train_manifest", type=text_flag, required=True, nargs="+", help=manifests)
    describe.add_argument("--val_manifest", type=text_flag)
    describe.add_argument("--output_dir", type=path_flag, help="where describe.html, describe.png and faults.jsonl go")
    relative_to = "folder that paths are relative to which are not beside the manifest"
    describe.add_argument("--audio_root", type=text_flag, help=relative_to)
    counted_by = "folder of a checkpoint, whose tokenizer counts instead of an estimate"
    describe.add_argument("--base_ckpt", type=text_flag, help=counted_by)
    describe.add_argument("--max_tokens_per_batch", type=int, default=16384, help="as of the run (default: 16384)")
    describe.add_argument("--epochs", type=float, default=1.0)
    describe.set_defaults(verb=_describe)

    verbs.add_parser("prepare", help="encode all clips and count all tokens ahead; takes the flags of train_ds.py")
    verbs.add_parser("check", help="the loss checklist on the first batches; takes the flags of train_ds.py")

    add_generate(verbs)
    add_recite(verbs)
    add_merge(verbs)
    add_export(verbs)
    for name, verb in verbs.choices.items():
        if name not in ("check", "prepare"):  # which have it from the options of a run
            verb.add_argument("--debug", action="store_true", help="show the traceback behind an error line")
    return parser


def _import_flags(parser: argparse.ArgumentParser) -> None:
    from ..data.foreign import FORMATS

    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("path", type=path_flag, metavar="PATH", help="a file or a folder")
    parser.add_argument("--from", dest="source", choices=tuple(FORMATS), help=f"{known} (default: guessed)")
    parser.add_argument("--output", "--output_dir", type=path_flag, required=True, metavar="DIR")
    parser.add_argument("--val_share", type=float, default=0.02, help="share of the rows in val.jsonl (default: 0.02)")
    parser.add_argument(
        "--val_speakers", type=text_flag, nargs="+", help="these speakers, or so many, are val.jsonl instead of a share"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--trim", action="store_true", help="write new clips without the silence at both ends")
    parser.add_argument("--loudness", type=float, nargs="?", const=-23.0, metavar="LUFS", help="write new clips at -23")
    parser.add_argument("--resample", type=int, nargs="?", const=24000, metavar="HZ", help="write new clips at 24000")
    parser.set_defaults(verb=_import)


@contextlib.contextmanager
def _writing_to(output_dir: Path) -> Iterator[None]:
    """Makes the folder, tries whether it can be written to, and has a ConfigError in one line where it cannot."""
    from safetensors import SafetensorError

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_writable(output_dir)
        yield
    except (OSError, SafetensorError) as error:  # a full disk is the one or the other
        reason = reason_of(error)
        raise ConfigError([f"--output_dir: {output_dir} cannot be written to: {reason}"]) from error


def _tiny(args) -> int:
    from ..model.higgs_v2.tiny import write_tiny

    with _writing_to(args.output_dir):
        count = write_tiny(args.output_dir, seed=args.seed)
    say(f"{args.output_dir}: a random base checkpoint of {count:,} parameters")
    return ExitCode.OK


def _import(args) -> int:
    from ..data.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE
    from .importers.ingest import Sound, run_import

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
    from ..data.portions import portions_of
    from .describe import run_describe

    tokenizer = None
    if args.base_ckpt is not None:
        from ..model.base import load_tokenizer, locate_checkpoint

        tokenizer = load_tokenizer(locate_checkpoint(args.base_ckpt, weights=False))
    if args.max_tokens_per_batch < 1 or not 0 < args.epochs < float("inf"):
        raise ConfigError(["--max_tokens_per_batch, --epochs: must be above 0"])
    lines = run_describe(
        portions_of(args.train_manifest),
        args.val_manifest,
        args.output_dir,
        audio_root=args.audio_root,
        tokenizer=tokenizer,
        max_tokens=args.max_tokens_per_batch,
        epochs=args.epochs,
    )
    say("\n".join(lines))
    return ExitCode.OK


def _sample_codec(args) -> int:
    from ..codec.sample import SampleCodec
    from ..data.audio import read_audio
    from ..data.faults import grouped
    from ..data.manifest import AudioRef, read_manifest

    rows, faults = read_manifest(args.train_manifest)
    clips: dict[AudioRef, tuple] = {}
    for row in rows:
        for where, ref in row.audio_refs:
            try:
                clips[ref] = clips[ref] if ref in clips else read_audio(ref)
            except AudioError as error:
                faults.append(row.fault(where, str(error)))
    if faults or not clips:
        raise ConfigError([*grouped(faults), f"{args.train_manifest}: no codec fitted"])
    with _writing_to(args.output_dir):
        SampleCodec.fit(clips.values(), seed=args.seed).save(args.output_dir)
    say(f"{args.output_dir}: the sample codec, fitted on {len(clips)} clips")
    return ExitCode.OK
