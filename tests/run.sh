#!/usr/bin/env bash
# Lint, types and the whole test suite on a fresh machine. Sets itself up. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=launch,dev,deepspeed,hf
# mpirun's test needs Debian's openmpi; it is skipped where that cannot be had
command -v mpirun >/dev/null || timeout 120 apt-get install -y -qq openmpi-bin libopenmpi-dev >/dev/null 2>&1 ||
  echo "no mpirun, and apt-get install openmpi-bin failed: its test will be skipped" >&2
if command -v mpirun >/dev/null; then extras=$extras,mpi; fi
launch/setup.sh "$extras"
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q --numprocesses 2 --dist loadfile "$@"
