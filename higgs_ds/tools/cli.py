"""The command line of the verbs other than training: `python -m higgs_ds VERB`."""

from __future__ import annotations

import argparse
import traceback

from ..data.audio import AudioError
from ..distributed.launch_env import enter_launch
from ..errors import ConfigError, ExitCode, reading, words_of
from ..files import writing
from ..options.parse import parse_args
from ..process import say, tell
from . import flag_types
from .judge import add_judge
from .merge import add_export, add_merge
from .outputs import writable_folder
from .report import add_report
from .reproduce import add_reproduce
from .speak import add_generate


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code (0 done, 1 failed, 2 wrong flags or data)."""
    try:
        if argv[:1] == ["recite"]:
            say("recite is now called reproduce", error=True)
            argv = ["reproduce", *argv[1:]]
        if argv[:1] == ["check"]:
            enter_launch()
            return _check(argv[1:])
        if argv[:1] == ["prepare"]:
            from .prepare import main as prepare

            enter_launch()
            return prepare(argv[1:])
        args = build_parser().parse_args(argv)
        given = [word.split("=")[0] for word in argv if word.startswith("--")]
        if twice := {name: None for name in given if given.count(name) > 1}:  # of which argparse keeps the last
            raise ConfigError([f"{name}: given twice; leave one out" for name in twice])
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
    """Of every verb; `check` and `prepare` are only listed here, they take the flags of train_ds.py."""
    about = "Prepare data, check a run, and use a trained voice."
    parser = argparse.ArgumentParser(prog="python -m higgs_ds", description=about, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    tiny = verbs.add_parser("tiny", help="write a small, randomly initialised base checkpoint for trying things out")
    family_help = "model family: v2 is Higgs Audio v2 (default), v3 Higgs TTS 3"
    tiny.add_argument("--family", choices=("v2", "v3"), default="v2", help=family_help)
    tiny.set_defaults(verb=_tiny)
    codec = verbs.add_parser("sample-codec", help="fit the sample codec to the clips of a manifest")
    codec.add_argument("--train_manifest", type=flag_types.name, required=True, metavar="FILE", help="names the clips")
    codec.set_defaults(verb=_sample_codec)
    for verb in (tiny, codec):
        verb.add_argument("--output_dir", type=flag_types.path, required=True, metavar="DIR", help="folder to write to")
        verb.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    _import_flags(verbs.add_parser("import", help="convert another tool's data set into a manifest"))
    _describe_flags(verbs.add_parser("describe", help="summarise a manifest and estimate the training time"))
    verbs.add_parser("prepare", help="encode all clips and count all tokens in advance; takes the flags of train_ds.py")
    verbs.add_parser("check", help="run the loss checks on the first batches; takes the flags of train_ds.py")
    add_generate(verbs)
    add_reproduce(verbs)
    add_judge(verbs)
    add_merge(verbs)
    add_export(verbs)
    add_report(verbs)
    for name, verb in verbs.choices.items():
        if name not in ("check", "prepare"):  # which have it from the options of a run
            verb.add_argument("--debug", action="store_true", help="print the traceback behind an error message")
    return parser


def _import_flags(parser: argparse.ArgumentParser) -> None:
    from ..data.audio import MAX_SAMPLE_RATE, MIN_SAMPLE_RATE
    from ..data.foreign import FORMATS

    add, number = parser.add_argument, flag_types.number
    path_help = "file or folder to import; with --from datasets also a name on the hub"
    add("path", type=flag_types.path, metavar="PATH", help=path_help)
    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    more = (
        "lhotse:RECIPE prepares a corpus by lhotse's own recipe, as lhotse:libritts; datasets:CONFIG names one of many"
    )
    source_help = f"format (default: detected). {known}. {more}"
    add("--from", dest="source", type=_format, metavar="FORMAT", help=source_help)
    output_help = "folder for train.jsonl and val.jsonl"
    add("--output", "--output_dir", type=flag_types.path, required=True, metavar="DIR", help=output_help)
    share_help = "share of the rows for validation, where the corpus has no part for it (default: 0.02)"
    add("--val_share", type=number(float, 0, 0.99), metavar="SHARE", help=share_help)
    speakers_help = "speakers for validation, or how many to draw; replaces --val_share"
    add("--val_speakers", type=flag_types.name, nargs="+", metavar="SPEAKER", help=speakers_help)
    add(
        "--with_test",
        action="store_true",
        help="use the rows of the corpus's test part like those of its training part",
    )
    add("--seed", type=int, default=0, help="random seed of the split (default: 0)")
    add("--trim", action="store_true", help="write new clips without leading and trailing silence")
    loudness_help = "write new clips at this loudness (-23 if no value is given)"
    add("--loudness", type=number(float, -70, 0), nargs="?", const=-23.0, metavar="LUFS", help=loudness_help)
    rate, rate_help = number(int, MIN_SAMPLE_RATE, MAX_SAMPLE_RATE), "write new clips at this rate (default: 24000)"
    add("--resample", type=rate, nargs="?", const=24000, metavar="HZ", help=rate_help)
    parser.set_defaults(verb=_import)


def _format(text: str) -> str:
    """A format's name; behind a colon lhotse's recipe, or the configuration of a data set."""
    from ..data.foreign import FORMATS

    kind, colon, _ = text.partition(":")
    if kind not in FORMATS or (colon and kind not in ("lhotse", "datasets")):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(FORMATS)}, lhotse:RECIPE, datasets:CONFIG")
    return text


def _describe_flags(parser: argparse.ArgumentParser) -> None:
    add, number = parser.add_argument, flag_types.number
    train_help = "manifests, optionally with weights (FILE=WEIGHT) as in train_ds.py"
    add("--train_manifest", type=flag_types.name, required=True, nargs="+", metavar="FILE", help=train_help)
    add("--val_manifest", type=flag_types.name, metavar="FILE", help="validation manifest")
    output_help = "write describe.html, describe.png and faults.jsonl here (default: print only)"
    add("--output_dir", type=flag_types.path, metavar="DIR", help=output_help)
    root_help = "folder for clips, before the manifest's own"
    add("--audio_root", type=flag_types.name, metavar="DIR", help=root_help)
    add("--channel", type=number(int, -1), metavar="N", help="channel of clips with several, from 0 (-1: all mixed)")
    add("--audio_track", type=number(int, 0), metavar="N", help="sound track of containers with several, from 0")
    base_help = "count tokens with this checkpoint's tokenizer (default: estimate them)"
    add("--base_ckpt", type=flag_types.name, help=base_help)
    add("--max_tokens_per_batch", type=number(int, 1), default=16384, help="as set for the run (default: 16384)")
    add("--epochs", type=number(float, 0), default=1.0, help="for the time estimate (default: 1)")
    parser.set_defaults(verb=_describe)


def _tiny(args) -> int:
    if args.family == "v3":
        from ..model.higgs_v3.tiny import write_tiny
    else:
        from ..model.higgs_v2.tiny import write_tiny

    writable_folder(args.output_dir)
    with writing(f"--output_dir: {args.output_dir}"):
        count = write_tiny(args.output_dir, seed=args.seed)
    say(f"{args.output_dir}: a random base checkpoint of {count:,} parameters")
    return ExitCode.OK


def _import(args) -> int:
    from .importers.ingest import Sound, run_import

    split = {
        "val_share": args.val_share,
        "val_speakers": args.val_speakers,
        "with_test": args.with_test,
        "seed": args.seed,
    }
    sound = Sound(args.trim, args.loudness, args.resample)
    lines = run_import(args.path, args.output, kind=args.source, sound=sound, **split)
    say("\n".join(lines))
    return ExitCode.OK


def _describe(args) -> int:
    from ..data.portions import portions_of
    from .describe import run_describe

    tokenizer = family = None
    if args.base_ckpt is not None:
        from ..model.base import locate_checkpoint
        from ..model.families import family_at

        folder = locate_checkpoint(args.base_ckpt, weights=False)
        family = family_at(folder)
        tokenizer = family.load_tokenizer(folder)
    lines = run_describe(
        portions_of(args.train_manifest),
        args.val_manifest,
        args.output_dir,
        audio_root=args.audio_root,
        channel=args.channel,
        audio_track=args.audio_track,
        tokenizer=tokenizer,
        family=family,
        max_tokens=args.max_tokens_per_batch,
        epochs=args.epochs,
    )
    say("\n".join(lines))
    return ExitCode.OK


def _sample_codec(args) -> int:
    import numpy as np

    from ..codec.sample import SampleCodec
    from ..data.audio import read_audio
    from ..data.chatml import AudioRef
    from ..data.faults import grouped
    from ..data.manifest import read_manifest

    rows, faults = read_manifest(args.train_manifest)
    if faults:
        raise ConfigError(grouped(faults))
    clips: dict[AudioRef, tuple[np.ndarray, int]] = {}
    for row in rows:
        for where, ref in row.audio_refs:
            with reading(f"{row.origin}: {where}"):
                clips[ref] = clips[ref] if ref in clips else read_audio(ref)
    if not clips:
        raise ConfigError([f"--train_manifest: {args.train_manifest} has no clips"])
    writable_folder(args.output_dir)
    codec = SampleCodec.fit(clips.values(), seed=args.seed)
    with writing(f"--output_dir: {args.output_dir}"):
        codec.save(args.output_dir)
    say(f"{args.output_dir}: the sample codec, fitted on {len(clips)} clips")
    return ExitCode.OK
