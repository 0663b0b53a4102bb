#!/usr/bin/env bash
# Lint, types and the whole test suite on a fresh machine. Sets itself up. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# by the very lines that build the image
bash -ec "$(sed -n 's/^RUN //p' docker/Dockerfile)" || {
  extras=launch,dev,deepspeed,hf,companions,convert,docs
  if command -v mpirun >/dev/null; then extras=$extras,mpi; else echo "no mpirun: its tests will be skipped" >&2; fi
  launch/setup.sh "$extras"
}
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q --numprocesses 2 --dist loadfile "$@"
