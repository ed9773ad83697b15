"""Makes the second Python environment, once: `python tests/interop/environment.py` prints its interpreter."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
CACHE = HERE.parents[1] / ".cache" / "interop"


class Unreachable(RuntimeError):
    """The environment cannot be made here; says why."""


def interpreter() -> Path:
    """The Python of the second environment, made at the first call (about half a minute).

    Raises:
        Unreachable: the packages cannot be had from the registry.
    """
    shared = sysconfig.get_paths()["purelib"]
    made_of = REQUIREMENTS.read_text() + shared + sys.version
    folder = CACHE / hashlib.sha256(made_of.encode()).hexdigest()[:12]
    python = folder / "bin" / "python"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=subprocess.DEVNULL)
            command = [python, "-m", "pip", "install", "--quiet", "--no-input", "-r", REQUIREMENTS]
            done = subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=600)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
                raise Unreachable(f"transformers 5 cannot be installed: {reason}")
            # Read after the environment's own packages, which therefore hide those of the same name in it.
            (packages,) = folder.glob("lib/python*/site-packages")
            (packages / "zz_shared.pth").write_text(shared + "\n")
            (folder / ".whole").touch()
    return python


if __name__ == "__main__":
    print(interpreter())
