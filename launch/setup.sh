#!/usr/bin/env bash
# The environment of every script here: sourced, it leaves $PYTHON and the PATH set.
# Uses the active environment where it satisfies requirements.txt, else makes .venv; the second time it does nothing.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

satisfied() { # is every pin of requirements.txt installed in this python?
  "$1" - "$ROOT/requirements.txt" <<'PY' 2>/dev/null
import re, sys
from importlib.metadata import PackageNotFoundError, version
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(1)
pins = [line.strip().split("==") for line in open(sys.argv[1]) if "==" in line and not line.startswith("#")]
try:
    wrong = [name for name, pin in pins if version(name).split("+")[0] != pin]
except PackageNotFoundError:
    sys.exit(1)
sys.exit(bool(wrong))
PY
}

find_python() {
  local candidate
  for candidate in "${HIGGS_DS_PYTHON:-}" python3.11 python3.12 python3.10 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.10 to 3.12 found; install one or set HIGGS_DS_PYTHON to it" >&2
  return 1
}

if command -v python >/dev/null && satisfied python; then
  PYTHON=$(command -v python)
else
  if [ ! -x "$ROOT/.venv/bin/python" ]; then
    base=$(find_python)
    echo "setup: making .venv with $("$base" --version)"
    "$base" -m venv "$ROOT/.venv"
  fi
  if ! satisfied "$ROOT/.venv/bin/python"; then
    echo "setup: installing requirements.txt into .venv (about 4 minutes and 6 GB, once)"
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    satisfied "$ROOT/.venv/bin/python" || { echo "setup: .venv does not hold the pins; remove .venv and try again" >&2; exit 1; }
    echo "setup: done"
  fi
  PYTHON="$ROOT/.venv/bin/python"
  export VIRTUAL_ENV="$ROOT/.venv" PATH="$ROOT/.venv/bin:$PATH"
fi
export PYTHON
# Tokenizers' threads and forked data workers do not go together; ranks on CPU must not fight over the cores.
export TOKENIZERS_PARALLELISM=false
