"""The end of processes that have had a process group."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT

PROGRAM = """
import atexit, concurrent.futures, tempfile, threading, time
from higgs_ds.process import end_process

class Left:
    def __del__(self):
        print("torn down", flush=True)

left = Left()
folder = tempfile.TemporaryDirectory()
atexit.register(print, "exit functions")
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
threading.Thread(target=lambda: (time.sleep(0.3), print("written, "))).start()
pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(time.sleep, 0.1)
print(folder.name)
print("not flushed", end=", ")
end_process(3)
"""


def test_a_process_ends_with_everything_done_and_python_not_taken_down():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3
    folder, *lines = ended.stdout.splitlines()
    assert lines == ["not flushed, written, ", "exit functions"]
    assert not Path(folder).exists()
    assert ended.stderr == ""


STUCK = """
import atexit, multiprocessing, signal, sys, threading, time
from higgs_ds import process

def stay():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)

process.END_SEC = 1.0
child = multiprocessing.get_context("fork").Process(target=stay, daemon=True)
child.start()
if sys.argv[1] == "thread":
    threading.Thread(target=time.sleep, args=(600,)).start()
elif sys.argv[1] == "exit function":
    atexit.register(time.sleep, 600)
process.end_process(75)
"""


@pytest.mark.parametrize("what", ["thread", "exit function", "child"])
def test_nothing_that_never_comes_back_holds_up_the_end_nor_changes_the_exit_code(what):
    """Nor does a child that ignores SIGTERM stay: the pipe that it shares is closed. Python itself would join it."""
    ended = subprocess.run([sys.executable, "-c", STUCK, what], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "", "")


def test_a_line_is_one_write():
    """`print` under `python -u` writes the end of a line by itself, and another rank may come first."""
    program = "import sys, os; from higgs_ds.process import say; say('one\\ntwo'); say('three', error=True)"
    traced = (
        "import io, sys\n"
        "class Raw(io.RawIOBase):\n"
        "    seen = []\n"
        "    def writable(self): return True\n"
        "    def write(self, data): Raw.seen.append(bytes(data)); return len(data)\n"
        "sys.stdout = sys.stderr = io.TextIOWrapper(Raw(), write_through=True)\n"
        f"{program}\n"
        "sys.__stdout__.write(repr(Raw.seen))\n"
    )
    done = subprocess.run([sys.executable, "-u", "-c", traced], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == repr([b"one\ntwo\n", b"three\n"])
