"""`python -m higgs_ds describe`: summarises a manifest, estimates the training time, and plays the ten oddest clips.

Lengths are read from the clips' headers, so hours of speech take seconds; only the clips to play are decoded.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..batching.batch_plan import make_plan
from ..batching.mixture import Mixture
from ..batching.token_counts import count_tokens
from ..data.audio import AudioError, duration_sec
from ..data.chatml import AudioRef, Row
from ..data.faults import Fault, grouped, plural, write_faults
from ..data.manifest import Manifest
from ..data.portions import Portion, names_of, portions_of
from ..data.transcripts import TEXT_STATS, SpeechStats, first_lines, oddness, text_stats_of, warnings_of
from ..errors import ConfigError, ExitCode
from ..files import writing
from ..process import say
from . import flag_types

if TYPE_CHECKING:
    from ..model.base import BaseCheckpoint

FRAMES_PER_SEC, FRAMES_AROUND = 25, 9  # of Boson's codec; added per clip: BOS, EOS and the delay of 8 codebooks
BYTES_PER_TOKEN = 3.5  # of text, estimated for Boson's tokenizer
TOKENS_PER_TURN = 5
# benchmarks/roofline.py: the 5.8 B model in bf16, LoRA rank 16; calculated from large kernels' speed, not measured.
CARD, TOKENS_PER_SEC = "H100", 32_000
ODDEST = 10  # number of clips to play


@dataclass
class Described:
    """A manifest's usable rows with their sizes, and its faults."""

    speech: SpeechStats
    rows: list[Row]
    seconds: np.ndarray  # float64 [rows], sum over a row's clips
    tokens: np.ndarray  # int64 [rows]
    faults: list[Fault]
    notes: list[str] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)  # about the texts as a whole


def oddest(found: Described) -> list[int]:
    """Finds the rows, at most ten, with the oddest speaking rates; of few rows, those with the oddest lengths."""
    speech = found.speech
    there = np.flatnonzero(speech.seconds > 0)
    score = abs(oddness(speech)[there])
    if not score.any() and len(there):
        length = np.log(speech.seconds[there])
        score = abs(length - np.median(length))
    return there[np.argsort(-score, kind="stable")[:ODDEST]].tolist()


def describe(path: str, *, base: BaseCheckpoint | None = None, **read_as: Any) -> Described:
    """Reads a manifest and its clips' headers; counts tokens with a base checkpoint, else estimates them.

    `read_as` are options of `Manifest`.
    """
    from ..data.controls import DEFAULT_CONTROLS, control_tokens

    controls = DEFAULT_CONTROLS if base is None else control_tokens(base.tokenizer)
    manifest = Manifest(path, controls=controls, **read_as)
    lengths: dict[AudioRef, float] = {}
    rows: list[Row] = []
    of_rows: list[list[float]] = []
    faults = list(manifest.faults)
    for number in range(len(manifest)):
        row, found = manifest.check(number)
        seconds: list[float] = []
        if row is None:
            faults += found
            continue
        for where, ref in row.audio_refs:
            try:
                if ref not in lengths:
                    lengths[ref] = duration_sec(ref)
                seconds.append(lengths[ref])
            except AudioError as error:
                found.append(row.fault(where, str(error)))
        faults += found
        if not found:
            rows.append(row)
            of_rows.append(seconds)
    of_texts, warnings = manifest.of_texts()
    stats = np.array([text_stats_of(row) for row in rows], TEXT_STATS)
    speech = [
        (row.audio_refs[clip][1], seconds[clip]) if clip >= 0 else (None, 0.0)
        for row, seconds, clip in zip(rows, of_rows, stats["clip"].tolist(), strict=True)
    ]
    clips = np.array([0 if ref is None else hash(ref) % 2**64 for ref, _ in speech], np.uint64)
    spoken_sec = [seconds for _, seconds in speech]
    lines, elements = (np.array([getattr(row, name) for row in rows], np.int64) for name in ("line", "element"))
    return Described(
        SpeechStats(path, lines, elements, stats, clips, np.array(spoken_sec, np.float64)),
        rows,
        np.array([sum(seconds) for seconds in of_rows], np.float64),
        np.array([_tokens(row, lengths, base) for row in rows], np.int64),
        [*faults, *of_texts],
        manifest.notes(),
        warnings,
    )


def frames_of(seconds: float) -> int:
    """Computes the number of positions in the model for a clip of this length."""
    return math.ceil(seconds * FRAMES_PER_SEC) + FRAMES_AROUND


def _tokens(row: Row, lengths: dict[AudioRef, float], base: BaseCheckpoint | None) -> int:
    if base is not None:
        return count_tokens(row, base.spec, base.tokenizer, lambda ref: math.ceil(lengths[ref] * FRAMES_PER_SEC))
    seconds = [lengths[ref] for _, ref in row.audio_refs]
    frames = sum(map(frames_of, seconds))
    pieces = [piece for turn in row.messages for piece in turn.content]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    around = TOKENS_PER_TURN * len(row.messages) + 2 * len(seconds)
    return frames + around + math.ceil(sum(len(text.encode("utf-8")) for text in texts) / BYTES_PER_TOKEN)


def lines_of(found: Described) -> list[str]:
    """Summarises a manifest: its size, and the hours of each speaker."""
    lines = first_lines(found.speech)
    hours: dict[str, float] = defaultdict(float)
    for row, seconds in zip(found.rows, found.speech.seconds.tolist(), strict=True):
        hours[row.speaker or "(none named)"] += seconds / 3600
    most = sorted(hours.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name[:40]!r} {share:.3g} h" for name, share in most[:8])
    named = len(hours) - ("(none named)" in hours)
    return [*lines, f"speakers: {named}: {shown}" + (f" and {len(most) - 8} more" if len(most) > 8 else "")]


def epoch_lines(
    described: list[Described], portions: list[Portion], *, max_tokens: int, epochs: float | None
) -> list[str]:
    """Describes an epoch of these manifests by their weights; with `epochs`, also the training time."""
    fits = [found.tokens <= max_tokens for found in described]
    tokens = np.concatenate([found.tokens[fit] for found, fit in zip(described, fits, strict=True)])
    counts = [int(fit.sum()) for fit in fits]
    too_long = sum(len(fit) for fit in fits) - sum(counts)
    if not sum(counts):
        return [f"an epoch: none, all {plural(too_long, 'row')} are longer than {max_tokens:,} tokens"]
    weights = [portion.weight for portion in portions]
    mixture = Mixture(counts, weights, tokens=tokens, names=names_of(portions))
    plan = make_plan(
        *(len(tokens), tokens), batch_size=1, max_tokens=max_tokens, grad_accum=1, world_size=1, seed=0, mixture=mixture
    )
    total = int(tokens[plan.mixture.rows(0)].sum())
    es = "es" * (plan.steps_per_epoch != 1)
    lines = [f"manifest {name}: {text}" for name, text in mixture.lines().items()]
    lines.append(
        f"an epoch: about {total:,} tokens, {plan.steps_per_epoch:,} micro-batch{es} of up to {max_tokens:,} tokens"
        + (f", {plural(too_long, 'row')} longer than that" if too_long else "")
    )
    if epochs is None:
        return lines
    took = f"{epochs:g} epoch{'s' * (epochs != 1)} on one {CARD}: about {_time(total * epochs / TOKENS_PER_SEC)}"
    note = f"at {TOKENS_PER_SEC:,} tokens a second (benchmarks/roofline.py: calculated, not measured)"
    return [*lines, f"{took} {note}"]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else plural(max(1, round(seconds / 60)), "minute")


def add_describe(verbs: Any) -> None:
    """Adds the verb `describe`."""
    parser = verbs.add_parser("describe", help="summarise a manifest and estimate the training time")
    add, name, number = flag_types.adder(parser), flag_types.name, flag_types.number
    train_help = "manifests, optionally with weights (FILE=WEIGHT) as in train_ds.py"
    add("--train_manifest FILE", train_help, name, required=True, nargs="+")
    add("--val_manifest FILE", "validation manifest", name)
    output_help = "write describe.html, describe.png and faults.jsonl here (default: print only)"
    add("--output_dir DIR", output_help, flag_types.path)
    add("--audio_root DIR", "folder to search for clips first, then the manifest's", name)
    add("--channel N", "channel of clips with several, from 0 (-1: all mixed)", number(int, -1))
    add("--audio_track N", "sound track of containers with several, from 0", number(int, 0))
    add("--base_ckpt", "count tokens with this checkpoint's tokenizer (default: estimate them)", name)
    add("--max_tokens_per_batch", "as set for the run (default: 16384)", number(int, 1), default=16384)
    add("--epochs", "for the time estimate (default: 1)", number(float, 0), default=1.0)
    parser.set_defaults(verb=run_describe)


def run_describe(args: argparse.Namespace) -> int:
    """Prints a summary of the manifests; writes describe.html, describe.png and faults.jsonl to `--output_dir`.

    The page plays clips of the first manifest.

    Raises:
        ConfigError: a manifest has no usable row, or the folder is not writable.
    """
    read_as = {"audio_root": args.audio_root, "channel": args.channel, "audio_track": args.audio_track}
    if args.base_ckpt is not None:
        from ..model.families import open_base

        read_as |= {"base": open_base(args.base_ckpt, weights=False)}
    portions, most = portions_of(args.train_manifest), args.max_tokens_per_batch
    trained = len(portions)
    sides = [*portions, *([Portion(args.val_manifest)] if args.val_manifest else [])]
    described = [describe(side.path, trains=number < trained, **read_as) for number, side in enumerate(sides)]
    said: list[str] = []
    for number, found in enumerate(described):
        if not found.rows:
            raise ConfigError([*grouped(found.faults), f"{sides[number].path}: no usable row"])
        said += [*lines_of(found), *found.notes]
        if number == trained - 1:
            said += epoch_lines(described[:trained], portions, max_tokens=most, epochs=args.epochs)
        elif number >= trained:
            said += epoch_lines([found], sides[trained:], max_tokens=most, epochs=None)
    warnings = [warning for found in described for warning in found.warnings]
    warnings += warnings_of([found.speech for found in described], trained)
    faults = [fault for found in described for fault in found.faults]
    for what, some in (("fault", faults), ("warning", warnings)):
        if some:
            said += [f"{plural(len(some), what)}:", *grouped(some)]
    if args.output_dir is not None:
        from .describe_page import write_page

        with writing(f"--output_dir: {args.output_dir}"):
            args.output_dir.mkdir(parents=True, exist_ok=True)
            page = write_page(args.output_dir, described[0], said)
        write_faults(args.output_dir, [*faults, *warnings])
        said.append(f"report: {page}")
    say("\n".join(said))
    return ExitCode.OK
