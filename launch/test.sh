#!/usr/bin/env bash
# Set-up, then the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest "$@"
