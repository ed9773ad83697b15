#!/usr/bin/env bash
# What to run first on a new GPU machine, in ten minutes: is it right there, how fast is it, where does the time go.
#   bash benchmarks/gpu_check.sh [--stages right,program,…] [--minutes 10] [--output_dir runs/gpu_check]
# Set-up comes before it, once; PYTHON names an environment that is there already. Without a GPU: small, on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${PYTHON:-}" ] || source launch/setup.sh
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader 2>/dev/null || true
exec "$PYTHON" benchmarks/gpu_check.py "$@"
