"""`python -m higgs_ds describe`: summary of a manifest, estimate of the training time, and the ten oddest clips.

Lengths come from the clips' headers, so that hours of speech take seconds; nothing is decoded but the clips to play.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..batching.batch_plan import make_plan
from ..batching.mixture import Mixture
from ..data.audio import AudioError, duration_sec
from ..data.chatml import AudioRef, Row
from ..data.faults import grouped, plural, write_faults
from ..data.manifest import Manifest
from ..data.portions import Portion, names_of
from ..data.transcripts import TEXT_STATS, SpeechStats, first_lines, text_stats_of, warnings_of
from ..errors import ConfigError
from ..files import writing
from .described import Described

if TYPE_CHECKING:
    from ..model.family import Family

# Boson's codec and the model's stream around each clip: BOS, EOS and the delay of 8 codebooks.
FRAMES_PER_SEC, FRAMES_AROUND = 25, 9
BYTES_PER_TOKEN = 3.5  # of text under Boson's tokenizer, roughly, where no tokenizer is given
TOKENS_PER_TURN = 5
# benchmarks/roofline.py: the 5.8 B model in bf16, LoRA rank 16. Arithmetic at what large kernels reach, not measured.
CARD, TOKENS_PER_SEC = "H100", 32_000


def describe(path: str, *, tokenizer=None, family: Family | None = None, **read_as: Any) -> Described:
    """Reads a manifest and its clips' headers. With a tokenizer and its family, tokens are counted, else estimated.

    `read_as` are `Manifest`'s own options.
    """
    from ..data.controls import DEFAULT_CONTROLS, control_tokens

    controls = DEFAULT_CONTROLS if tokenizer is None else control_tokens(tokenizer)
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
        np.array([_tokens(row, sec, tokenizer, family) for row, sec in zip(rows, of_rows, strict=True)], np.int64),
        [*faults, *of_texts],
        manifest.notes(),
        warnings,
    )


def frames_of(seconds: float) -> int:
    """Positions that a clip takes of the model, by its length."""
    return math.ceil(seconds * FRAMES_PER_SEC) + FRAMES_AROUND


def _tokens(row: Row, seconds: list[float], tokenizer, family: Family | None) -> int:
    frames = sum(map(frames_of, seconds))
    if tokenizer is not None and family is not None:
        return frames - len(seconds) + len(family.tokenize(row.messages, row.start_index, tokenizer)[0])
    pieces = [piece for turn in row.messages for piece in turn.content]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    around = TOKENS_PER_TURN * len(row.messages) + 2 * len(seconds)
    return frames + around + math.ceil(sum(len(text.encode("utf-8")) for text in texts) / BYTES_PER_TOKEN)


def lines_of(found: Described) -> list[str]:
    """Summary of a manifest: its size, and the hours of each speaker."""
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
    """Size of an epoch of these manifests by their weights; with `epochs`, the training time."""
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


def run_describe(
    portions: list[Portion],
    val_manifest: str | None,
    output_dir: Path | None,
    *,
    tokenizer=None,
    family: Family | None = None,
    max_tokens: int = 16_384,
    epochs: float = 1.0,
    **read_as: Any,
) -> list[str]:
    """The lines to print; with `output_dir`, describe.html, describe.png and faults.jsonl are left there.

    The page plays clips of the first manifest. `read_as` are `Manifest`'s own options.

    Raises:
        ConfigError: a manifest without a usable row, or a folder that cannot be written to.
    """
    trained = len(portions)
    sides = [*portions, *([Portion(val_manifest)] if val_manifest else [])]
    described = [
        describe(side.path, tokenizer=tokenizer, family=family, trains=number < trained, **read_as)
        for number, side in enumerate(sides)
    ]
    said: list[str] = []
    for number, found in enumerate(described):
        if not found.rows:
            raise ConfigError([*grouped(found.faults), f"{sides[number].path}: no usable row"])
        said += [*lines_of(found), *found.notes]
        if number == trained - 1:
            said += epoch_lines(described[:trained], portions, max_tokens=max_tokens, epochs=epochs)
        elif number >= trained:
            said += epoch_lines([found], sides[trained:], max_tokens=max_tokens, epochs=None)
    warnings = [warning for found in described for warning in found.warnings]
    warnings += warnings_of([found.speech for found in described], trained)
    faults = [fault for found in described for fault in found.faults]
    for count, what, some in ((len(faults), "fault", faults), (len(warnings), "warning", warnings)):
        if some:
            said += [f"{plural(count, what)}:", *grouped(some)]
    if output_dir is not None:
        from .describe_page import write_page

        with writing(f"--output_dir: {output_dir}"):
            output_dir.mkdir(parents=True, exist_ok=True)
            page = write_page(output_dir, described[0], said)
        write_faults(output_dir, [*faults, *warnings])
        said.append(f"report: {page}")
    return said
