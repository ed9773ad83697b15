"""`python -m higgs_ds reproduce`: synthesises training rows and compares the result with their codes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.audio import read_audio, write_wav
from ..data.chatml import AudioRef, Row, Turn, speech_messages
from ..data.faults import grouped
from ..data.manifest import read_manifest
from ..errors import ConfigError, ExitCode, first_of
from ..files import write_text, writing
from ..process import say
from . import flag_types
from . import speak_flags as flags

if TYPE_CHECKING:
    from ..model.speech import Answer, Sampling, Speaker

STOP_RULES = ("boson", "transformers", "vllm", "sglang")
RESULTS = "recital.json"


def add_reproduce(verbs: Any) -> None:
    """Adds the verb `reproduce`."""
    about = "synthesise the training rows and report the share of their codes reproduced"
    parser = verbs.add_parser("reproduce", help=about)
    flags.voice_flags(parser)
    flags.sampler_flags(parser)
    add = flag_types.adder(parser)
    add("--train_manifest FILE", "the training rows", required=True)
    add("--texts FILE", "reproduce only the rows with these texts, one per line", flag_types.path)
    add("--output_dir DIR", "folder for original and synthesised clips", flag_types.path, required=True)
    stop_help = (
        "stop rules: a clip ends at the end token of codebook 0 (vllm), of any codebook (transformers), or of the "
        "lowest codebook with one (boson). Default: all three in turn; with a sampler, boson. Higgs TTS 3 has the "
        "rules of its two servers, sglang and vllm"
    )
    add("--stop", stop_help, STOP_RULES, nargs="+")
    add("--overwrite", "overwrite earlier results in --output_dir", bool)
    least_help = "exit with 1 if less than this share of a clip's codes is reproduced"
    add("--at_least SHARE", least_help, flag_types.number(float, 0, 1), default=0.0)
    parser.set_defaults(verb=run_reproduce, max_row_tokens=flags.MOST_TOKENS)


def run_reproduce(args: argparse.Namespace) -> int:
    """Synthesises the training rows; returns 1 if a clip reproduces less than `--at_least` under any stop rule."""
    flags.check_flags(args)
    sampled = bool(args.temperature or (args.sampler or "greedy") != "greedy")
    if sampled and args.stop not in (None, ["boson"], ["sglang"]):
        use = "use boson, or sglang for Higgs TTS 3"
        raise ConfigError([f"--stop: stop rules apply to greedy decoding only; omit the sampler, or {use}"])
    ref = flags.reference_clip(args)
    earlier = [*sorted(args.output_dir.glob("*.spoken.wav")), args.output_dir / RESULTS]
    flags.keep_existing("--output_dir", earlier, args)
    more = flags.prompt_options(args, ref)
    rows = _chosen_rows(args, more["prompt_style"])
    speaker, sampling = flags.open_checked(args, [], [])
    rules = flags.rules_of(args, speaker, speaker.stop_rules[:1] if sampled else speaker.stop_rules)
    prompt = more if ref or more["scene"] else None
    options = {"rules": rules, "sampling": sampling, "prompt": prompt, "max_new_tokens": args.max_new_tokens}
    with writing(f"--output_dir: {args.output_dir}"):
        clips = reproduce(speaker, rows, args.output_dir, **options)
    say("\n".join(table(clips, rules)))
    say(f"listen: {args.output_dir}/*.spoken.wav beside *.original.wav")
    worst = min(share for clip in clips for share in (clip.share, *(end.share for end in clip.endings.values())))
    return ExitCode.OK if worst >= args.at_least else ExitCode.FAILED


def _chosen_rows(args: argparse.Namespace, prompt_style: str) -> list[Row]:
    """Reads the manifest's rows, or those of `--texts`; prints the texts without a row."""
    wanted = [(where, text) for where, text in flags.texts_of(args) if text] if args.texts else None
    rows, faults = read_manifest(args.train_manifest, prompt_style=prompt_style)
    if faults:
        raise ConfigError(grouped(faults))
    if wanted is not None:
        texts = {text for _, text in wanted}
        of_text = [(text, row) for row in rows if (text := (row.target() or ("",))[0].strip()) in texts]
        rows, found = [row for _, row in of_text], {text for text, _ in of_text}
        missing = [f"{at}: no row of {args.train_manifest} has this text" for at, text in wanted if text not in found]
        if not rows:
            raise ConfigError(first_of(missing))
        if missing:
            say("\n".join(first_of(missing)))
    if not any(target_of(row) for row in rows):
        raise ConfigError([f"{args.train_manifest}: no row ends with a clip to reproduce"])
    return rows


@dataclass(frozen=True)
class Ending:
    """A clip's ending under one stop rule."""

    share: float  # of the training codes reproduced, over the longer of the two
    frames: int
    ended: bool  # by the model rather than at the frame limit


@dataclass(frozen=True)
class Reproduction:
    """One row's result, an entry of `recital.json`; `share` and `spoken_frames` are those of the first rule."""

    origin: str
    text: str
    share: float  # of the training codes reproduced, over the longer of the two
    frames: int
    spoken_frames: int
    file: str
    endings: dict[str, Ending] = field(default_factory=dict)  # by stop rule


def reproduce(
    speaker: Speaker,
    rows: Sequence[Row],
    output_dir: Path,
    *,
    rules: Sequence[str],
    sampling: Sampling,
    prompt: dict | None,
    max_new_tokens: int | None,
) -> list[Reproduction]:
    """Synthesises the last assistant clip of each row and compares it with the training codes.

    Writes `<n>-<clip>.spoken.wav`, `<n>-<clip>.original.wav` and `recital.json`. Raises OSError.

    Args:
        rules: stop rules; the first one's clip is written.
        prompt: options of `speech_messages` for all rows; None keeps each row's own prompt.
        max_new_tokens: longest answer; None means twice the clip's frames plus 64.
    """
    clips = []
    for number, row in enumerate(rows, 1):
        target = target_of(row)
        if target is None:
            continue
        turns = row.messages[: _answer_of(row)]
        text = " ".join(piece for turn in turns[-1:] for piece in turn.content if isinstance(piece, str))
        if prompt is not None:
            turns, _ = speech_messages(text, None, **prompt)
        original, rate = read_audio(target)
        wanted = speaker.codec.encode(original, rate)[: speaker.spec.num_codebooks]
        longest = max_new_tokens or 2 * wanted.shape[1] + 64
        answers = answers_by_rule(speaker, turns, dataclasses.replace(sampling, max_new_tokens=longest), rules=rules)
        endings = {
            rule: Ending(share_reproduced(wanted, a.codes), 0 if a.codes is None else a.codes.shape[1], a.ended)
            for rule, a in answers.items()
        }
        stem = f"{number:02d}-{target.path.stem if target.path else 'clip'}"
        write_wav(output_dir / f"{stem}.original.wav", original, rate)
        codes, first = answers[rules[0]].codes, endings[rules[0]]
        file = output_dir / f"{stem}.spoken.wav"
        if codes is not None and first.frames:
            write_wav(file, speaker.decode(codes), speaker.codec.sample_rate)
        else:
            file.unlink(missing_ok=True)  # from an earlier call
        clips.append(Reproduction(row.origin, text, first.share, wanted.shape[1], first.frames, file.name, endings))
    results = [dataclasses.asdict(clip) for clip in clips]
    write_text(output_dir / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return clips


def target_of(row: Row) -> AudioRef | None:
    """Returns the clip of a row's last assistant turn, or None."""
    return next((piece for piece in row.messages[_answer_of(row)].content if isinstance(piece, AudioRef)), None)


def _answer_of(row: Row) -> int:
    return max(i for i, turn in enumerate(row.messages) if turn.role == "assistant")


def answers_by_rule(
    speaker: Speaker, turns: Sequence[Turn], sampling: Sampling, *, rules: Sequence[str], force_audio: bool = False
) -> dict[str, Answer]:
    """Answers a prompt under each stop rule; generates once if all rules agree on the last frame."""
    clips = [piece for turn in turns for piece in turn.content if isinstance(piece, AudioRef)]
    context = [speaker.codec.encode(*read_audio(clip)) for clip in clips]
    answers: dict[str, Answer] = {}
    for rule in rules:
        same = next((answer for answer in answers.values() if answer.rules_agree), None)
        answers[rule] = same or speaker.speak(turns, context, sampling, force_audio=force_audio, stop=rule)
    return answers


def table(clips: Sequence[Reproduction], rules: Sequence[str]) -> list[str]:
    """Formats one line per clip, and one per stop rule."""
    lines = []
    for clip in clips:
        right = clip.frames == clip.spoken_frames
        length = "right length" if right else f"{clip.spoken_frames} frames for {clip.frames}"
        cut = [rule for rule, ending in clip.endings.items() if not ending.ended]
        note = f"  (not ended by the model: {', '.join(cut)})" if cut else ""
        lines.append(f"{100 * clip.share:6.2f} %  {length:<22}  {clip.text[:60]}{note}")
    frames = np.array([clip.frames for clip in clips])
    for rule in rules:
        shares = np.array([clip.endings[rule].share for clip in clips])
        lengths = np.array([clip.endings[rule].frames for clip in clips])
        share, right = 100 * np.average(shares, weights=frames), (lengths == frames).sum()
        lines.append(
            f"stop as {rule + ':':<13} {share:.2f} % of the codes of {len(clips)} clips reproduced "
            f"(worst clip {100 * shares.min():.2f} %), {right} of {len(clips)} lengths right"
        )
    return lines


def share_reproduced(wanted: np.ndarray, codes: np.ndarray | None) -> float:
    """Computes the share of equal codes, 0 to 1, relative to the longer clip."""
    if codes is None:
        return 0.0
    frames = min(wanted.shape[1], codes.shape[1])
    equal = int((wanted[:, :frames] == codes[:, :frames]).sum())
    return equal / (wanted.shape[0] * max(wanted.shape[1], codes.shape[1]))
