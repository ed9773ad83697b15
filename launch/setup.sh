#!/usr/bin/env bash
# The environment of every script here: sourced, it leaves $PYTHON and the PATH set.
# Uses the active environment where it satisfies requirements.txt, else makes .venv; the second time it does nothing.
# With HIGGS_DS_DEV=1 the tools of requirements-dev.txt and the judges of requirements-judge.txt are asked for too.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

REQUIREMENTS=("$ROOT/requirements.txt")
if [ "${HIGGS_DS_DEV:-}" = 1 ]; then REQUIREMENTS+=("$ROOT/requirements-dev.txt" "$ROOT/requirements-judge.txt"); fi

satisfied() { # is every pin installed in this python?
  "$1" - "${REQUIREMENTS[@]}" <<'PY' 2>/dev/null
import re, sys
from importlib.metadata import PackageNotFoundError, version
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(1)
lines = [line for file in sys.argv[1:] for line in open(file)]
pins = [line.strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
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
    "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check "${REQUIREMENTS[@]/#/-r}"
    satisfied "$ROOT/.venv/bin/python" || { echo "setup: .venv does not hold the pins; remove .venv and try again" >&2; exit 1; }
    echo "setup: done"
  fi
  PYTHON="$ROOT/.venv/bin/python"
  export VIRTUAL_ENV="$ROOT/.venv" PATH="$ROOT/.venv/bin:$PATH"
fi
export PYTHON
# Tokenizers' threads and forked data workers do not go together; ranks on CPU must not fight over the cores.
export TOKENIZERS_PARALLELISM=false
