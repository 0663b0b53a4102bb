#!/usr/bin/env bash
# Start this machine's ranks of a run on several machines. The same command on each of them, at about the same time:
#
#   NODES=2 HEAD=node1:29400 launch/torchrun_node.sh launch/gpt2.py --preset 124m --out runs/shared ...
#
#   NODES          how many machines
#   HEAD           name and port of one of them, where all meet
#   RANKS_PER_NODE default: the machine's GPUs, or 1
#   RUN_ID         tells this run from others that meet there; default: gpt2
#   LOCAL_ADDR     this machine's address, where its name does not lead to it
#
# The machine of rank 0 chooses where the ranks meet; torchrun's c10d rendezvous at HEAD only brings the machines together.
set -euo pipefail

: "${NODES:?set NODES, the number of machines}" "${HEAD:?set HEAD, name and port of the first machine, such as node1:29400}"
[ $# -gt 0 ] || {
  echo "usage: NODES=2 HEAD=node1:29400 $0 launch/gpt2.py ..." >&2
  exit 2
}
launch=$(dirname -- "${BASH_SOURCE[0]}")
python=${PYTHON:-$launch/../.venv/bin/python}
ranks=${RANKS_PER_NODE:-}
if [ -z "$ranks" ]; then
  ranks=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$ranks" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" \
  --rdzv-id="${RUN_ID:-gpt2}" ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} "$@"
