"""The command line of the verbs other than training: `python -m higgs_ds VERB`."""

from __future__ import annotations

import argparse
import traceback

import numpy as np

from ..data.audio import AudioError, read_audio
from ..data.chatml import AudioRef
from ..data.faults import grouped
from ..data.manifest import read_manifest
from ..distributed.launch_env import enter_launch
from ..errors import ConfigError, ExitCode, reading, words_of
from ..files import writing
from ..options.parse import parse_args
from ..process import say, tell
from . import flag_types
from .describe import add_describe
from .importers.ingest import add_import
from .judge import add_judge
from .merge import add_export, add_merge
from .outputs import writable_folder
from .report import add_report
from .reproduce import add_reproduce
from .speak import add_generate

LIKE_TRAINING = ("check", "prepare", "plan")  # verbs that take the flags of train_ds.py


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
        if argv[:1] == ["plan"]:
            from .plan import main as plan

            return plan(argv[1:])
        args = build_parser().parse_args(argv)
        given = [word.split("=")[0] for word in argv if word.startswith("--")]
        if argv[:1] == ["import"]:  # there --output is an alias of --output_dir
            given = [name.removesuffix("_dir") for name in given]
        if twice := {name: None for name in given if given.count(name) > 1}:  # argparse would take the last
            raise ConfigError([f"{name}: given twice; leave one out" for name in twice])
        return args.verb(args)
    except (ConfigError, AudioError, FileExistsError) as error:
        return tell(error, argv)
    except Exception as error:  # unforeseen: a damaged file, a full disk, or a bug
        tell(ConfigError([f"{' '.join(argv[:1])}: {words_of(error)} (--debug shows where)"]), [])
        if "--debug" in argv:
            traceback.print_exception(error)
        return ExitCode.FAILED


def _check(argv: list[str]) -> int:
    """Runs `check` with the flags of train_ds.py."""
    from ..distributed.device import name_accelerator
    from ..distributed.ds_config import read_deepspeed_config
    from ..distributed.launch_env import grow_segments

    config = parse_args(argv, prog="python -m higgs_ds check")
    ds_raw = read_deepspeed_config(config.run.deepspeed_config)
    grow_segments()
    name_accelerator()
    from ..run import check

    return check(config, ds_raw)


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all verbs; those of `LIKE_TRAINING` are only listed, they have the flags of train_ds.py."""
    about = "Prepare data, check a run, and use a trained voice."
    parser = argparse.ArgumentParser(prog="python -m higgs_ds", description=about, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    tiny = verbs.add_parser("tiny", help="write a small, randomly initialised base checkpoint for experiments")
    family_help = "model family: v2 is Higgs Audio v2 (default), v3 Higgs TTS 3"
    flag_types.adder(tiny)("--family", family_help, ("v2", "v3"), default="v2")
    codec = verbs.add_parser("sample-codec", help="fit the sample codec to the clips of a manifest")
    flag_types.adder(codec)("--train_manifest FILE", "manifest with the clips", flag_types.name, required=True)
    for verb, run in ((tiny, _tiny), (codec, _sample_codec)):
        flag_types.adder(verb)("--output_dir DIR", "folder to write to", flag_types.path, required=True)
        flag_types.adder(verb)("--seed", "random seed (default: 0)", int, default=0)
        verb.set_defaults(verb=run)
    add_import(verbs)
    add_describe(verbs)
    verbs.add_parser("prepare", help="encode all clips and count all tokens in advance; takes the flags of train_ds.py")
    verbs.add_parser("check", help="run the loss checks on the first batches; takes the flags of train_ds.py")
    verbs.add_parser(
        "plan", help="estimate memory, token budgets and hours of a run; takes the flags of train_ds.py, and --json"
    )
    add_generate(verbs)
    add_reproduce(verbs)
    add_judge(verbs)
    add_merge(verbs)
    add_export(verbs)
    add_report(verbs)
    for name, verb in verbs.choices.items():
        if name not in LIKE_TRAINING:  # those have it already
            verb.add_argument("--debug", action="store_true", help="print the traceback behind an error message")
    return parser


def _tiny(args: argparse.Namespace) -> int:
    if args.family == "v3":
        from ..model.higgs_v3.tiny import write_tiny
    else:
        from ..model.higgs_v2.tiny import write_tiny

    writable_folder(args.output_dir)
    with writing(f"--output_dir: {args.output_dir}"):
        count = write_tiny(args.output_dir, seed=args.seed)
    say(f"{args.output_dir}: a random base checkpoint of {count:,} parameters")
    return ExitCode.OK


def _sample_codec(args: argparse.Namespace) -> int:
    from ..codec.sample import SampleCodec

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
