#!/usr/bin/env bash
# Make .venv in the repository with the pinned requirements and this package, its compiled passes built in place where there is a
# C++ compiler (those for CUDA only where there is a GPU: `nvcc` takes minutes).
#
#   launch/setup.sh EXTRAS        e.g. launch/setup.sh launch,dev
#
# Does nothing when an earlier call with the same EXTRAS, constraints.txt, csrc and pyproject.toml files finished. PYTHON names the
# interpreter.
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

extras=$1
python=${PYTHON:-python3}
sources=(constraints.txt ./{,launch/,benchmarks/,tests/support/}pyproject.toml setup.py csrc/*.* csrc/include/pylo_dist/*)
stamp=.venv/.done-$(printf "%s\n" "$extras" "$PWD" | cat - "${sources[@]}" | cksum | cut -d " " -f 1)
[ -e "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "$python is older than Python 3.10; name another one: PYTHON=python3.11 $0 $extras" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv || {
  rm -rf .venv
  echo "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
  exit 2
}
echo "setting up .venv (once; torch is large)" >&2
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt)
"${pip[@]}" torch setuptools wheel packaging
export DS_BUILD_OPS=0 # deepspeed would compile its kernels, which take minutes and are not used here
nvidia-smi >/dev/null 2>&1 || export DS_ACCELERATOR=cpu
[ -n "${PYLO_DIST_CUDA:-}" ] || { nvidia-smi >/dev/null 2>&1 || export PYLO_DIST_CUDA=0; }
"${pip[@]}" --no-build-isolation --editable ".[$extras]"
if [[ ",$extras," == *,dev,* ]]; then
  # alone: by torchvision, which it never imports, it would bring another torch along
  "${pip[@]}" --no-build-isolation --no-deps mup
  # what tests and benchmarks import beside the package
  "${pip[@]}" --no-build-isolation --no-deps --editable ./tests/support --editable ./launch --editable ./benchmarks
fi
wanted=$(sed -n 's/^torch==//p' constraints.txt)
.venv/bin/python -c "import torch; assert torch.__version__.split('+')[0] == '$wanted', torch.__version__" || {
  echo "a requirement replaced torch $wanted; remove .venv and try again" >&2
  exit 1
}
touch "$stamp"
