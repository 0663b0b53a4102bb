"""One rank of several that are not there, in torch's fake process group: it sends nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (the backend "fake")


@contextmanager
def world_of(ranks: int, rank: int = 0) -> Iterator[None]:
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
