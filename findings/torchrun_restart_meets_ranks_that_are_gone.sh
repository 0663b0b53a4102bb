#!/usr/bin/env bash
# torchrun starts ranks again after a failure, and gloo then looks for those of the first start: --max-restarts=1 ends in an error.
#
#   findings/torchrun_restart_meets_ranks_that_are_gone.sh
#
# torch 2.13.0, two gloo ranks on one machine, no other package. `--max-restarts` is documented to restart a failed group of workers.
# The agent keeps one store for all of them, and `init_process_group` puts its keys there without saying of which start they are, so
# that a rank may read the addresses of the ranks before, if those of the others are not there yet. Seen: rank 1 dies in the first
# start, and the second one ends in "Connection refused" of gloo; with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which makes a store for
# each start, it goes on. Exit code 0 as long as that is so. NCCL: github.com/pytorch/pytorch/issues/167288.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/case.py" <<'PY'
import os
import time

import torch
import torch.distributed as dist

assert torch.__version__.startswith("2.13.0"), torch.__version__
start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if start == 1 and rank == 0:
    time.sleep(3)  # as one that is slower to start: the other one looks for the store's older entries
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
if start == 1 and rank == 0:
    print("the ranks of the second start met", flush=True)
if start == 0 and rank == 1:
    os._exit(1)
dist.barrier()
PY
export OMP_NUM_THREADS=1
said=()
for own_store in 0 1; do
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$own_store "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 --max-restarts 1 \
    "$folder/case.py" >"$folder/seen" 2>"$folder/errors" || true
  if grep -q "second start met" "$folder/seen"; then
    said+=("goes on")
  elif grep -q "connectFullMesh failed.*Connection refused" "$folder/errors"; then
    said+=("Connection refused")
  else
    cat "$folder/errors" >&2
    said+=("another error")
  fi
done
seen="restarted with a store that is kept: ${said[0]}; with one for each start: ${said[1]}"
echo "$seen"
wanted="restarted with a store that is kept: Connection refused; with one for each start: goes on"
[ "$seen" = "$wanted" ] || {
  echo "that has changed; wanted: $wanted" >&2
  exit 1
}
