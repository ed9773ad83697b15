"""Synthesis of the sentences to judge, with every selected reference, sampler and stop rule."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..data.audio import write_wav
from ..data.chatml import AudioRef, Turn, speech_messages
from ..judges.clips import Sentence
from ..model.speech import Answer, Speaker
from ..process import say
from . import speak_flags as flags
from .judge_texts import Asked, Made
from .reproduce import answers_by_rule

GREEDY = "greedy"


def prompt_of(sentence: Sentence, reference: str, asked: Asked, args: argparse.Namespace, style: str) -> list[Turn]:
    """Returns the prompt's turns. A missing reference clip counts as reference none."""
    row = asked.rows.get(sentence.origin)
    if reference == "row" and row is not None:
        return list(row.messages[:-1])
    more: dict = {"scene": row.scene if row is not None else None, "prompt_style": style}
    if reference == "clip":
        more |= {"ref_text": args.ref_text, "ref_audio": AudioRef(args.ref_audio)}
    if reference == "speaker":
        of_speaker = [s for s in asked.corpus if s.speaker == sentence.speaker and s.origin != sentence.origin]
        if of_speaker:  # the clip with the text of median length, as in `generate --speaker`
            chosen = sorted(of_speaker, key=lambda other: len(other.text))[len(of_speaker) // 2]
            more |= {"ref_text": chosen.text, "ref_audio": chosen.recording}
    return list(speech_messages(sentence.text, None, **more)[0])


def speak_all(
    speaker: Speaker, asked: Asked, args: argparse.Namespace, style: str, folder: Path
) -> dict[str, list[Made]]:
    """Speaks all sentences for each set (sampler, stop rule, reference), into one folder per set. Raises OSError."""
    spoken: dict[str, list[Made]] = {}
    asked_for = flags.rules_of(args, speaker, speaker.stop_rules[:1])
    given = {name: value for name in ("seed", "max_new_tokens") if (value := getattr(args, name)) is not None}
    for reference in args.reference:
        for sampler in args.sampler:
            sampling = dataclasses.replace(speaker.samplers[sampler], **given)
            rules = asked_for if sampler == GREEDY else [speaker.stop_rules[0]]
            say(f"speaking {len(asked.sentences)} texts: {sampler}, {', '.join(rules)}, reference {reference}")
            for number, sentence in enumerate(asked.sentences, 1):
                turns = prompt_of(sentence, reference, asked, args, style)
                for rule, answer in answers_by_rule(speaker, turns, sampling, rules=rules, force_audio=True).items():
                    name = f"{sampler}, {rule}, {reference}"
                    file = _written(speaker, answer, folder / f"{sampler}-{rule}-{reference}" / f"{number:04d}.wav")
                    spoken.setdefault(name, []).append(Made(sentence, file, answer.ended))
    return spoken


def _written(speaker: Speaker, answer: Answer, file: Path) -> Path | None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if answer.codes is None or answer.codes.shape[1] == 0:
        file.unlink(missing_ok=True)  # from an earlier call
        return None
    write_wav(file, speaker.decode(answer.codes), speaker.codec.sample_rate)
    return file
