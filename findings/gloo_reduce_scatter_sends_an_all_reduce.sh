#!/usr/bin/env bash
# torch's reduce_scatter_tensor over gloo sends as much as an all-reduce, twice what it has to, so that sharding saves no bytes there.
#
#   findings/gloo_reduce_scatter_sends_an_all_reduce.sh
#
# torch 2.13.0, four processes on one Linux machine, 16 MB of float32 on each; bytes are those of the loopback device. Of N ranks each has
# to send (N - 1) / N of its input for a reduce-scatter, and twice that for an all-reduce. all_to_all_single, after which a rank can add up
# its parts by itself, sends 0.75 of the input per rank, all_gather_into_tensor 0.75, all_reduce 1.5, and reduce_scatter_tensor 1.5 too: it
# is an all-reduce of a copy, of which a rank keeps its part. So a sharded data-parallel step over gloo (reduce-scatter, then all-gather)
# sends 2.25 where all_reduce alone sends 1.5. Exit code 0 as long as that is so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet torch==2.13.0 numpy==2.4.6

cat >"$folder/case.py" <<'PY'
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS, NUMEL = 4, 1 << 22
WANTED = {
    "all_reduce": 1.5,
    "reduce_scatter_tensor": 1.5,
    "all_gather_into_tensor": 0.75,
    "all_to_all_single": 0.75,
}


def sent() -> int:
    """Bytes that the loopback device has carried."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])


def rank_main(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    whole, part = torch.ones(NUMEL), torch.ones(NUMEL // RANKS)
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, part),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(NUMEL), whole),
    }
    for name, call in calls.items():
        call()  # opens connections
        dist.barrier()
        before = sent()
        dist.barrier()
        call()
        dist.barrier()
        if rank == 0:
            share = (sent() - before) / (RANKS * 4 * NUMEL)
            print(f"{name}: {share:.2f} of the input per rank")
            assert abs(share - WANTED[name]) < 0.1, share
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert torch.__version__.startswith("2.13.0"), torch.__version__
    mp.spawn(rank_main, (f"{Path(sys.argv[1]).resolve()}/meeting",), nprocs=RANKS)
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore "$folder/case.py" "$folder"
