"""Judges of a run's samples, in a separate process: if it hangs or dies, the run continues without judging.

`python -m higgs_ds.judges.in_run` is that process. It answers requests over a pipe, one at a time.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

from ..data.chatml import AudioRef
from ..errors import ConfigError
from ..options.sections import PROJECT_ROOT
from .clips import Sentence, read_clip
from .panel import NONE, open_panel
from .summary import value_of

LOAD_SEC = 1800.0  # timeout for loading the judges, including downloads
CLIP_SEC = 120.0  # timeout for one recording or clip
SET = "samples"  # name of the set in judged.jsonl
FIGURES = {"wer": "WER", "cer": "CER", "similarity": "similarity", "stops": "ended by itself", "dnsmos": "DNSMOS"}

Request = tuple[Sentence, Path | None, bool | None, bool]  # sentence, clip, `ended`; True to enrol the recording


class Verdicts(NamedTuple):
    """Result for one set of samples."""

    lines: list[dict[str, Any]]  # for judged.jsonl
    failed: dict[str, str]  # reason by disabled judge

    @property
    def figures(self) -> dict[str, float]:
        """Metrics `eval/*`, over all clips."""
        values = {name: value_of([((None, None), line) for line in self.lines], of) for name, of in FIGURES.items()}
        return {f"eval/{name}": value for name, value in values.items() if value is not None}


class RunJudges:
    """Judges of a run; used on rank 0."""

    def __init__(self, judges: Sequence[str], words: str, voice: str, device: str):
        models = {"words": words, "voice": voice, "sound": "dnsmos"}
        self._models = {judge: model if judge in judges else NONE for judge, model in models.items()}
        self._device = device
        self._process: subprocess.Popen | None = None
        self._enrolled: set[str] = set()
        self.sentences: dict[str, Sentence] = {}  # texts of the samples, by origin
        self.corpus: list[Sentence] = []  # recordings of their speakers
        self.is_on = True

    def check(self) -> None:
        """Loads the judges. Raises ConfigError with a line for each missing library or model."""
        try:
            self._start(lambda: False)
        except (OSError, EOFError) as error:
            raise ConfigError([f"--judges: {self._reason(error)}"]) from error
        finally:
            self._free_gpu()

    def judge(
        self, clips: Sequence[tuple[str, Path | None, bool]], progressed: Callable[[], None], stop: Callable[[], bool]
    ) -> Verdicts:
        """Judges samples, given as (origin, file, ended); the result is empty if `stop()` becomes True meanwhile."""

        def interrupted() -> bool:
            progressed()
            return stop()

        lines: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        try:
            self._start(interrupted)
            recordings = [sentence for sentence in self.corpus if sentence.origin not in self._enrolled]
            for sentence in recordings:
                self._ask((sentence, None, None, True), interrupted)
                self._enrolled.add(sentence.origin)
            for origin, file, ended in clips:
                line, problems = self._ask((self.sentences[origin], file, ended, False), interrupted)
                lines.append(line)
                failed |= problems
        except InterruptedError:
            self.close()
            return Verdicts([], {})
        except (OSError, EOFError, ConfigError) as error:
            self.is_on = False
            reason = self._reason(error)
            self.close()
            return Verdicts([], {"all": reason})
        # A judge that failed on every clip is disabled. The process restarts without it at the next samples.
        broken = {judge: why for judge, why in failed.items() if all(judge in line.get("failed", ()) for line in lines)}
        for judge in broken.keys() & self._models.keys():
            self._models[judge] = NONE
            self.close()
        self._free_gpu()
        return Verdicts(lines, broken)

    def close(self) -> None:
        """Kills the process, even if it hangs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None
            self._enrolled = set()

    def _free_gpu(self) -> None:
        """Ends the process between samples if it uses a GPU, to free memory for training."""
        if self._device != "cpu":
            self.close()

    def _start(self, interrupted: Callable[[], bool]) -> None:
        if self._process is not None:
            return
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "higgs_ds.judges.in_run", str(theirs.fileno())]
        path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
        with contextlib.closing(theirs):
            # A new session, so that Ctrl-C in the terminal reaches only the run. Output of libraries goes to stderr.
            self._process = subprocess.Popen(
                [*command, *self._models.values(), self._device],
                pass_fds=[theirs.fileno()],
                stdout=2,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        if problems := self._answer(LOAD_SEC, interrupted):
            raise ConfigError(problems)

    def _ask(self, request: Request, interrupted: Callable[[], bool]) -> Any:
        self._pipe.send(request)
        return self._answer(CLIP_SEC, interrupted)

    def _answer(self, timeout_sec: float, interrupted: Callable[[], bool]) -> Any:
        deadline = time.monotonic() + timeout_sec
        while not self._pipe.poll(1.0):
            if interrupted():
                raise InterruptedError
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {timeout_sec:g} s")
        return self._pipe.recv()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, (EOFError, ConnectionError)) and self._process is not None:
            return f"the judges' process ended with exit code {self._process.wait()}"
        return str(error)


def _serve(pipe: Connection, words: str, voice: str, sound: str, device: str) -> None:
    try:
        panel = open_panel(words, voice, sound, device)
    except ConfigError as error:
        pipe.send(error.problems)
        return
    pipe.send([])
    languages: dict[str, str | None] = {}  # by origin, as detected from the recording
    while True:
        sentence, file, ended, is_recording = pipe.recv()
        try:
            if is_recording:
                pipe.send(panel.enrol(read_clip(sentence, sentence.recording, is_recording=True)))
                continue
            # The language of a sample is detected from its recording, since a voice in training may be unintelligible.
            if panel.words and not sentence.language and sentence.recording and sentence.origin not in languages:
                panel.judge(read_clip(sentence, sentence.recording))
                languages[sentence.origin] = sentence.language
            sentence.language = sentence.language or languages.get(sentence.origin)
            clip = read_clip(sentence, AudioRef(file) if file else None, ended=ended)
            pipe.send(panel.line(SET, str(file or ""), clip))
        except ConfigError as error:
            line = {"set": SET, "file": str(file or ""), "row": sentence.origin, "failed": {"clip": str(error)}}
            pipe.send((line, line["failed"]))


def _exit_with_parent(parent: int) -> None:
    """Exits when the parent process is gone, even if a judge hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_exit_with_parent, args=[os.getppid()], daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve(Connection(int(sys.argv[1])), *sys.argv[2:])
