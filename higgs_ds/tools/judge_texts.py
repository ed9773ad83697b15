"""Sentences to judge, from a manifest or a file of texts, and their clips in a folder."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..data.audio import SOUND_FORMATS
from ..data.chatml import Row
from ..data.faults import grouped
from ..data.manifest import Manifest
from ..errors import ConfigError, first_of, nearest, reading
from ..judges.clips import Sentence, enrolled, spread
from . import speak_flags as flags


@dataclass
class Asked:
    """Sentences to judge, and their rows and recordings in the manifest."""

    sentences: list[Sentence]
    corpus: list[Sentence] = field(default_factory=list)  # some recordings of each speaker
    rows: dict[str, Row] = field(default_factory=dict)  # by the sentence's origin

    def drawn(self, count: int | None) -> Asked:
        """Copies this with `count` of the sentences, evenly spaced; None keeps all."""
        return Asked(spread(self.sentences, count or len(self.sentences)), self.corpus, self.rows)


@dataclass(frozen=True)
class Made:
    """A clip's file and its sentence."""

    sentence: Sentence
    file: Path | None  # None if the answer has no frame of audio
    ended: bool | None = None


def asked_of(args: argparse.Namespace, prompt_style: str) -> Asked:
    """Reads the sentences of `--texts`, else of `--manifest`. Raises ConfigError."""
    known = _of_manifest(args, prompt_style) if args.manifest else Asked([])
    if args.texts is None:
        return known
    texts = flags.texts_of(args)
    flags.refuse(flags.empty_texts(texts))
    speakers = sorted({sentence.speaker or "" for sentence in known.corpus})
    if len(speakers) > 1:
        raise ConfigError([f"--speaker: choose the speaker of --texts: {', '.join(filter(None, speakers[:20]))}"])
    speaker = known.corpus[0].speaker if known.corpus else args.speaker
    sentences = [Sentence(text, where.removeprefix("--texts: "), speaker) for where, text in texts]
    return Asked(sentences, known.corpus)


def _of_manifest(args: argparse.Namespace, prompt_style: str) -> Asked:
    manifest = Manifest(args.manifest, audio_root=args.audio_root, prompt_style=prompt_style)
    rows: dict[str, Row] = {}
    sentences: list[Sentence] = []
    faults = list(manifest.faults)
    for number in range(len(manifest)):
        row, found = manifest.check(number)
        faults += found
        if row is not None and (sentence := Sentence.of_row(row, manifest.column(number, "language"))):
            sentences.append(sentence)
            rows[row.origin] = row
    if faults or not sentences:
        raise ConfigError(grouped(faults) or [f"--manifest: {args.manifest} has no row that speaks a clip"])
    names = {sentence.speaker for sentence in sentences if sentence.speaker is not None}
    if args.speaker is not None:
        sentences = [sentence for sentence in sentences if sentence.speaker == args.speaker]
        if not sentences:
            hint = nearest(args.speaker, names)
            raise ConfigError([f"--speaker: {args.manifest} has no row of {args.speaker!r}{hint}"])
    return Asked(sentences, enrolled(sentences), rows)


def clips_in(folder: Path, asked: Asked) -> list[Made]:
    """Finds the sentences' clips in a folder, in order, by the recording's name or by the row or line number.

    `x.wav`, `07-x.wav` and `07-x.spoken.wav` match the recording x. Numbers are used only if no name matches.

    Raises:
        ConfigError: no file matches, or the match is ambiguous.
    """
    with reading(f"--clips: {folder}"):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SOUND_FORMATS)
    stems = {file: file.stem.removesuffix(".spoken") for file in files if not file.stem.endswith(".original")}
    names: dict[str, list[str]] = {}
    for sentence in asked.sentences:
        if sentence.recording is not None and sentence.recording.path is not None:
            names.setdefault(sentence.recording.path.stem, []).append(sentence.origin)
    said = {file: names.get(stem) or names.get(re.sub(r"^\d+-", "", stem), []) for file, stem in stems.items()}
    if not any(said.values()):
        numbers = {number: [sentence.origin] for number, sentence in enumerate(asked.sentences, 1)}
        said = {file: numbers.get(int(stem), []) if stem.isdecimal() else [] for file, stem in stems.items()}
    found: dict[str, Path] = {}
    problems = []
    for file, origins in said.items():
        if len(origins) > 1:
            problems.append(f"--clips: {file.name} matches {' and '.join(origins[:3])}; number the clips: 0001.wav")
        elif origins and origins[0] in found:
            problems.append(f"--clips: {found[origins[0]].name} and {file.name} both match {origins[0]}; keep one")
        elif origins:
            found[origins[0]] = file
    if problems or not found:
        nothing = f"--clips: {folder} has no clip named like a recording, or by row or line number: 0001.wav"
        raise ConfigError(first_of(problems) or [nothing])
    return [Made(sentence, found[sentence.origin]) for sentence in asked.sentences if sentence.origin in found]
