"""Samples of the voice during training: the same few texts every N steps, to compare with the recordings.

The ranks share the texts. Training is unaffected: random generators are restored and weights are not touched. Failures
are reported and skipped. Files: `samples/step-000500/01-name.wav`, each with a line in `samples.jsonl` in the same
folder, and `samples/recordings/01-name.wav`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..data.audio import read_audio, write_wav
from ..data.chatml import AudioRef, Row, Turn, speech_messages
from ..errors import ConfigError, reading, words_of
from ..files import write_text

if TYPE_CHECKING:
    from ..distributed.ranks import Ranks
    from ..judges.in_run import RunJudges

FOLDER, LIST, RECORDINGS, JUDGED = "samples", "samples.jsonl", "recordings", "judged.jsonl"
COUNT = 4  # default number of validation rows
# A clip is cut at twice the recording's frames plus SPARE_FRAMES, or at MOST_FRAMES (15 s) without a recording.
SPARE_FRAMES, MOST_FRAMES = 64, 375


@dataclass(frozen=True)
class Prompt:
    """A text to speak, and its recording for comparison."""

    name: str  # stem of its files
    text: str
    origin: str  # file and line
    turns: tuple[Turn, ...]
    context: tuple[np.ndarray, ...] = ()  # codes of the clips in the turns, int16 [codebooks, frames]
    recording: AudioRef | None = None
    recorded_frames: int | None = None

    @property
    def most_frames(self) -> int:
        """Length limit of the answer, in frames."""
        return MOST_FRAMES if self.recorded_frames is None else 2 * self.recorded_frames + SPARE_FRAMES


@dataclass
class Sample:
    """A line of `samples.jsonl`."""

    global_step: int
    name: str
    text: str
    origin: str
    file: str | None  # None if the model failed or answered without audio
    seconds: float
    recorded_sec: float | None
    ended: bool  # by the model rather than cut
    problem: str | None = None


@dataclass
class Spoken:
    """A step's samples of all ranks, in the prompts' order, and the judges' results."""

    samples: list[Sample]
    seconds: float  # wall time of speaking
    lines: list[dict[str, Any]] = field(default_factory=list)  # for judged.jsonl, on rank 0
    judging_sec: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)  # reason by disabled judge
    figures: dict[str, float] = field(default_factory=dict)  # metrics `eval/*`, equal on all ranks


def folder_of(samples: Path, step: int) -> Path:
    """Returns the folder of a step's samples."""
    return samples / f"step-{step:06d}"


def write_lists(spoken: Spoken, folder: Path) -> None:
    """Writes a step's `samples.jsonl`, and `judged.jsonl` if it was judged. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / LIST, "".join(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in spoken.samples))
    if spoken.lines:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in spoken.lines]
        write_text(folder / JUDGED, "".join(lines))


class Voice(Protocol):
    """The part of a family's `Speaker` used for samples."""

    codec: Any

    def sample(
        self, turns: Sequence[Turn], context: Sequence[np.ndarray], *, most_frames: int, seed: int
    ) -> tuple[np.ndarray | None, bool]:
        """Returns codes int16 [codebooks, frames] or None, and True if the model ended the answer itself."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Returns the waveform of codes, float32 [samples]."""


def prompts_from_rows(rows: Sequence[Row], count: int, codes_of: Callable[[AudioRef], np.ndarray]) -> list[Prompt]:
    """Makes prompts of at most `count` rows, evenly spaced over the manifest; skips rows that end without a clip."""
    picked = np.unique(np.linspace(0, len(rows) - 1, num=min(count, len(rows))).round().astype(int)).tolist()
    prompts: list[Prompt] = []
    for row in (rows[place] for place in picked):
        target = row.target()
        if target is None:
            continue
        text, clip = target
        refs = [ref for _, ref in row.audio_refs]
        name = f"{len(prompts) + 1:02d}-{refs[clip].path.stem if refs[clip].path else 'clip'}"
        context = tuple(codes_of(ref) for ref in refs[:clip])
        frames = codes_of(refs[clip]).shape[1]
        prompts.append(Prompt(name, text, row.origin, row.messages[:-1], context, refs[clip], frames))
    return prompts


def prompts_from_file(path: Path, prompt_style: str) -> list[Prompt]:
    """Makes a prompt of each non-empty line, without a reference clip. Raises ConfigError."""
    with reading(f"--sample_texts: {path}"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    prompts = []
    for number, line in enumerate(lines, 1):
        if text := line.strip():
            turns, _ = speech_messages(text, None, prompt_style=prompt_style)
            prompts.append(Prompt(f"text-{number:02d}", text, f"{path}:{number}", turns))
    if not prompts:
        raise ConfigError([f"--sample_texts: {path} contains no text; write one text per line"])
    return prompts


class Sampler:
    """Speaks the prompts; every rank must call it at the same step."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        output_dir: Path,
        ranks: Ranks,
        voice: Callable[[], AbstractContextManager[Voice | None]],
        *,
        seed: int,
        progressed: Callable[[], None] = lambda: None,
        stop_requested: Callable[[], bool] = lambda: False,
        judges: RunJudges | None = None,
    ):
        """
        Args:
            voice: opens the model in training for speaking, on every rank; gives None, already reported, on failure.
            seed: seed of every sample, the same at every step.
            progressed: called after every clip.
            stop_requested: returns True once the run should stop; the remaining clips are then skipped.
            judges: judges of the samples, on rank 0.
        """
        self.prompts = list(prompts)
        self.folder = output_dir / FOLDER
        self._ranks, self._voice, self._seed = ranks, voice, seed
        self._progressed, self._stop_requested = progressed, stop_requested
        self._judges = judges
        self.is_on = True

    def speak(self, step: int) -> Spoken:
        """Speaks this step's samples and judges them on rank 0; restores the random generators of CPU and device."""
        import torch  # not at the top: curves can be drawn without torch

        began = time.monotonic()
        device = self._ranks.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"),
            torch.no_grad(),
            self._voice() as voice,
        ):
            mine = [] if voice is None else list(self._speak_mine(voice, step))
            if voice is not None:
                voice.codec.release()
        parts = self._ranks.gather((voice is not None, mine))
        self.is_on = all(speaks for speaks, _ in parts)
        samples = sorted((sample for _, part in parts for sample in part), key=lambda sample: sample.name)
        spoken = Spoken(samples, time.monotonic() - began)
        if self._judges is not None and self._judges.is_on and len(samples) == len(self.prompts):
            self._judge(self._judges, spoken, folder_of(self.folder, step))
        spoken.figures = self._ranks.gather(spoken.figures)[0]
        return spoken

    def _judge(self, judges: RunJudges, spoken: Spoken, folder: Path) -> None:
        from ..distributed.agreement import patiently

        began = time.monotonic()
        clips = []
        for sample in spoken.samples:
            file = folder / sample.file if sample.file else None
            if file is not None:
                patiently(file.exists, bool)  # files of other hosts appear late on a network file system
            if not sample.problem:
                clips.append((sample.origin, file, sample.ended))
        verdicts = judges.judge(clips, self._progressed, self._stop_requested)
        spoken.lines, spoken.failed, spoken.figures = *verdicts, verdicts.figures
        spoken.judging_sec = time.monotonic() - began

    def _write_recording(self, prompt: Prompt) -> None:
        file = self.folder / RECORDINGS / f"{prompt.name}.wav"
        if prompt.recording is not None and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_wav(file, *read_audio(prompt.recording))

    def _speak_mine(self, voice: Voice, step: int) -> Iterator[Sample]:
        """Yields this rank's samples; a failure is recorded in the sample's `problem`."""
        folder = folder_of(self.folder, step)
        for prompt in self.prompts[self._ranks.rank :: self._ranks.world_size]:
            if self._stop_requested():
                return
            rate = voice.codec.frame_rate
            recorded = None if prompt.recorded_frames is None else prompt.recorded_frames / rate
            sample = Sample(step, prompt.name, prompt.text, prompt.origin, None, 0.0, recorded, ended=False)
            try:
                self._write_recording(prompt)
                codes, sample.ended = voice.sample(
                    prompt.turns, prompt.context, most_frames=prompt.most_frames, seed=self._seed
                )
                if codes is not None and codes.shape[1]:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_wav(folder / f"{prompt.name}.wav", voice.decode(codes), voice.codec.sample_rate)
                    sample.file, sample.seconds = f"{prompt.name}.wav", codes.shape[1] / rate
            except (ConfigError, OSError, RuntimeError, ValueError) as error:
                sample.problem = words_of(error)
            self._progressed()
            yield sample
