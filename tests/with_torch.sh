#!/usr/bin/env bash
# The test suite under another torch: a copy of the working tree in a temporary folder, with an environment of its own.
#
#   tests/with_torch.sh VERSION [PYTEST ARGUMENTS]        e.g. tests/with_torch.sh 2.15.0 tests/checkpoint -x
#
# All other versions are those of constraints.txt. PYTHON names the interpreter; pip's own settings (PIP_INDEX_URL, ...) hold.
set -euo pipefail
version=${1:?wanted a version of torch, e.g. 2.15.0}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents --target-directory "$copy"
cd "$copy"
# some tests ask it which files there are, and which commit
git init --quiet
git add --all
git -c user.name=tests -c user.email=tests@localhost commit --quiet --message "a copy"
sed -i "s/^torch==.*/torch==$version/" constraints.txt
launch/setup.sh launch,dev,deepspeed,hf,companions,convert
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -q --numprocesses 2 --dist loadfile "$@"
