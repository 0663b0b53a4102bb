#!/usr/bin/env bash
# Pretrain a small GPT-2 with a sharded learned optimizer: two ranks, any machine, a few minutes. Sets itself up.
# Then AdamW on the same samples, drawn beside it in runs/quickstart/loss.png (--beside none: without).
# Further arguments go to launch/gpt2.py, e.g. ./launch/quickstart.sh --steps 1000
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

launch/setup.sh launch
export OMP_NUM_THREADS=1 # one thread a rank, so that two cores are shared fairly
exec .venv/bin/torchrun --standalone --nproc_per_node=2 launch/gpt2.py \
  --recipe launch/recipes/quickstart.yaml --beside adamw --out runs/quickstart --overwrite "$@"
