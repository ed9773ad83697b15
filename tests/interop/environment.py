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
SECONDS = 600  # that one command may take


class Unreachable(RuntimeError):
    """The environment cannot be made here; says why."""


def interpreter() -> Path:
    """The Python of the second environment, made at the first call (about half a minute).

    Raises:
        Unreachable: no environment can be made here, or the packages cannot be had from the registry.
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
            _run("a virtual environment cannot be made", sys.executable, "-m", "venv", folder)
            install = ("-m", "pip", "install", "--quiet", "--no-input", "-r", REQUIREMENTS)
            _run("transformers 5 cannot be installed", python, *install)
            # Read after the environment's own packages, which therefore hide those of the same name in it.
            (packages,) = folder.glob("lib/python*/site-packages")
            (packages / "zz_shared.pth").write_text(shared + "\n")
            (folder / ".whole").touch()
    return python


def _run(what: str, *command: str | Path) -> None:
    """Raises Unreachable, with the last that a command said, where it fails or takes too long."""
    try:
        done = subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{what}: not done within {SECONDS} s") from None
    except OSError as error:
        raise Unreachable(f"{what}: {error}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing was said"]
        raise Unreachable(f"{what}: {said[-1]}")


if __name__ == "__main__":
    print(interpreter())
