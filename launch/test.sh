#!/usr/bin/env bash
# Set-up, then the tests, a file on each of two processes: bash launch/test.sh [pytest arguments, -n 0 for one process]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HIGGS_DS_DEV=1
source launch/setup.sh
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
