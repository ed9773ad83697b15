"""Where the second environment cannot be made, its tests are skipped with the reason."""

import sys

import pytest

from tests.interop import environment
from tests.interop.environment import Unreachable, interpreter


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('no network')", "it failed: no network"),
        ("print('ensurepip is missing'); raise SystemExit(1)", "it failed: ensurepip is missing"),
        ("raise SystemExit(1)", "it failed: nothing was said"),
        ("import time; time.sleep(60)", "it failed: not done within 1 s"),
    ],
)
def test_a_command_that_fails_or_hangs_is_a_reason(code, words, monkeypatch):
    monkeypatch.setattr(environment, "SECONDS", 1)
    with pytest.raises(Unreachable, match=words):
        environment._run("it failed", sys.executable, "-c", code)


def test_an_interpreter_that_is_not_there_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CACHE", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(Unreachable, match="a virtual environment cannot be made: .*No such file"):
        interpreter()
