"""Run a function on real gloo processes and bring back what each returns; a failing or hanging rank
fails in bounded time.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# imported later, by torch itself, it would keep the group alive beyond its destruction
import torch.distributed.nn.functional
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)

# Ranks are forked from a server that has imported what takes seconds to import; it has run nothing
# and holds no threads.
PRELOAD = [
    "torch",
    "torch.distributed.nn.functional",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *PRELOAD,
        "torch.distributed.tensor.parallel",
        "functorch.compile",
        "torch._dynamo",
        "pylo_dist",
    ]
)


def _main(
    rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # whoever looks through all objects would copy the server's memory page by page
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT
    )
    try:
        torch.save(fn(rank, world, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`[fn(rank, world, *args) for every rank]`, each in its own process. `fn` must be a
    module-level function.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _main,
            args=(world, folder, fn, args),
            nprocs=world,
            join=True,
            start_method="forkserver",
        )
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)
        ]
