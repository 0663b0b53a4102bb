#!/usr/bin/env bash
# Lint, types and the whole test suite on a fresh machine. Sets itself up. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# by the very lines that build the image
sed -n 's/^RUN //p' docker/Dockerfile | bash -e || {
  echo "without openmpi: the tests of mpirun will be skipped" >&2
  launch/setup.sh launch,dev,deepspeed,hf
}
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q --numprocesses 2 --dist loadfile "$@"
