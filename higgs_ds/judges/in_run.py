"""The judges of a run's samples, in a process of their own: one that hangs or dies is given up, and the run goes on.

`python -m higgs_ds.judges.in_run` is that process. It answers one request after the other over a pipe.
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

LOAD_SEC = 1800.0  # for loading the judges, a download included
CLIP_SEC = 120.0  # for one recording or clip
SET = "samples"  # in judged.jsonl
FIGURES = {"wer": "WER", "cer": "CER", "similarity": "similarity", "stops": "ended by itself", "dnsmos": "DNSMOS"}

Request = tuple[Sentence, Path | None, bool | None, bool]  # a sentence, its clip, `ended`, and True for its recording


class Verdicts(NamedTuple):
    """The result for one set of samples."""

    lines: list[dict[str, Any]]  # of judged.jsonl
    failed: dict[str, str]  # by judge, why it is left out from now on

    @property
    def figures(self) -> dict[str, float]:
        """The metrics `eval/*`, over all clips."""
        values = {name: value_of([((None, None), line) for line in self.lines], of) for name, of in FIGURES.items()}
        return {f"eval/{name}": value for name, value in values.items() if value is not None}


class RunJudges:
    """The judges of a run, on rank 0."""

    def __init__(self, judges: Sequence[str], words: str, voice: str, device: str):
        named = {"words": words, "voice": voice, "sound": "dnsmos"}
        self._names = {judge: name if judge in judges else NONE for judge, name in named.items()}
        self._device = device
        self._process: subprocess.Popen | None = None
        self._enrolled: set[str] = set()
        self.sentences: dict[str, Sentence] = {}  # the texts of the samples, by origin
        self.corpus: list[Sentence] = []  # recordings of their speakers
        self.is_on = True

    def check(self) -> None:
        """Loads the judges. Raises ConfigError where a library or a model is missing, a line each."""
        try:
            self._open(lambda: False)
        except (OSError, EOFError) as error:
            raise ConfigError([f"--judges: {self._reason(error)}"]) from error
        finally:
            self._rest()

    def judge(
        self, clips: Sequence[tuple[str, Path | None, bool]], progressed: Callable[[], None], stop: Callable[[], bool]
    ) -> Verdicts:
        """Judges (origin, file, ended) of each sample; without lines where the run was asked to stop meanwhile."""

        def interrupted() -> bool:
            progressed()
            return stop()

        lines: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        try:
            self._open(interrupted)
            recordings = [sentence for sentence in self.corpus if sentence.origin not in self._enrolled]
            for sentence in recordings:
                self._ask((sentence, None, None, True), CLIP_SEC, interrupted)
                self._enrolled.add(sentence.origin)
            for origin, file, ended in clips:
                line, wrong = self._ask((self.sentences[origin], file, ended, False), CLIP_SEC, interrupted)
                lines.append(line)
                failed |= wrong
        except InterruptedError:  # asked to stop
            self.close()
            return Verdicts([], {})
        except (OSError, EOFError, ConfigError) as error:
            self.is_on = False
            reason = self._reason(error)
            self.close()
            return Verdicts([], {"all": reason})
        silent = {judge: why for judge, why in failed.items() if all(judge in line.get("failed", ()) for line in lines)}
        for judge in silent.keys() & self._names.keys():  # from the next start on
            self._names[judge] = NONE
            self.close()
        self._rest()
        return Verdicts(lines, silent)

    def close(self) -> None:
        """Ends the process, hung or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = None
            self._enrolled = set()

    def _rest(self) -> None:
        """On a GPU the process ends between samples: the training has its memory."""
        if self._device != "cpu":
            self.close()

    def _open(self, interrupted: Callable[[], bool]) -> None:
        if self._process is not None:
            return
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "higgs_ds.judges.in_run", str(theirs.fileno())]
        path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
        with contextlib.closing(theirs):
            # A session of its own: Ctrl-C in the terminal is the run's to answer. What libraries print goes to stderr.
            self._process = subprocess.Popen(
                [*command, *self._names.values(), self._device],
                pass_fds=[theirs.fileno()],
                stdout=2,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        if problems := self._answer(LOAD_SEC, interrupted):
            raise ConfigError(problems)

    def _ask(self, request: Request, seconds: float, interrupted: Callable[[], bool]) -> Any:
        self._pipe.send(request)
        return self._answer(seconds, interrupted)

    def _answer(self, seconds: float, interrupted: Callable[[], bool]) -> Any:
        until = time.monotonic() + seconds
        while not self._pipe.poll(1.0):
            if interrupted():
                raise InterruptedError
            if time.monotonic() > until:
                raise TimeoutError(f"no answer within {seconds:g} s")
        return self._pipe.recv()

    def _reason(self, error: Exception) -> str:
        if isinstance(error, (EOFError, ConnectionError)) and self._process is not None:
            return f"their process ended with {self._process.wait()}"
        return str(error)


def _serve(pipe: Connection, words: str, voice: str, sound: str, device: str) -> None:
    try:
        panel = open_panel(words, voice, sound, device)
    except ConfigError as error:
        pipe.send(error.problems)
        return
    pipe.send([])
    languages: dict[str, str | None] = {}  # by origin, told from the recording where there is one
    while True:
        sentence, file, ended, is_recording = pipe.recv()
        try:
            if is_recording:
                pipe.send(panel.enrol(read_clip(sentence, sentence.recording, is_recording=True)))
                continue
            if panel.words and not sentence.language and sentence.recording and sentence.origin not in languages:
                panel.judge(read_clip(sentence, sentence.recording))
                languages[sentence.origin] = sentence.language
            sentence.language = sentence.language or languages.get(sentence.origin)
            clip = read_clip(sentence, AudioRef(file) if file else None, ended=ended)
            pipe.send(panel.line(SET, str(file or ""), clip))
        except ConfigError as error:
            line = {"set": SET, "file": str(file or ""), "row": sentence.origin, "failed": {"clip": str(error)}}
            pipe.send((line, line["failed"]))


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone, whatever hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve(Connection(int(sys.argv[1])), *sys.argv[2:])
