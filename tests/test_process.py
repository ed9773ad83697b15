"""How processes end that have had a process group."""

import subprocess
import sys
from pathlib import Path

from tests.ranks import ROOT

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
