"""The only module that calls torch.distributed collectives. Touches the buffers it is handed and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .optim.base import Transfer

# Renamed in newer torch, where the old names warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Reduction = tuple[Any, Tensor]  # a process group and the buffer to be added over its ranks, in place
Collective = Union[Reduction, Transfer]


def default_group() -> Any:
    """The world's process group, or None when torch.distributed is not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def size(group: Any) -> int:
    """Number of ranks of `group`; 1 for None."""
    return 1 if group is None else int(group.size())


def rank(group: Any) -> int:
    """This process's rank in `group`; 0 for None."""
    return 0 if group is None else int(group.rank())


def serve(phases: Iterable[list[Collective]]) -> None:
    """Drive an engine: carry out the collectives of a phase, those of all groups at once, until the phases end."""
    for collectives in phases:
        for work in [_start(collective) for collective in collectives]:
            work.wait()


def _start(collective: Collective) -> Any:
    if isinstance(collective, Transfer):
        t = collective
        return dist.all_to_all_single(t.receive, t.send, t.receive_counts, t.send_counts, group=t.group, async_op=True)
    group, buffer = collective
    return dist.all_reduce(buffer, group=group, async_op=True)


def reduce_scatter_mean(shard: Tensor, full: Tensor, group: Any) -> None:
    """shard <- mean over ranks of this rank's part of `full` (`shard` is modified in place).

    Args:
        shard: (numel,), full: (ranks * numel,).
    """
    _reduce_scatter(shard, full, group=group)
    shard.div_(size(group))  # once, after the sum: the rounding of an average then does not depend on the backend


def all_gather(full: Tensor, shard: Tensor, group: Any) -> None:
    """full <- the shards of all ranks, in rank order (`full` is modified in place; `shard` may be a view of it)."""
    _all_gather(full, shard, group=group)


def broadcast_from_first(tensor: Tensor, group: Any) -> None:
    """tensor <- that of rank 0 of `group` (modified in place)."""
    dist.broadcast(tensor, group_src=0, group=group)


def check_equal(what: str, entries: list[Any], group: Any, device: torch.device) -> None:
    """Raise ValueError on every rank if the JSON-able `entries` differ between ranks, naming the first that does.

    Called where a disagreement would later be a hang.
    """
    digest = hashlib.sha256(json.dumps(entries).encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], dtype=torch.int64, device=device)
    all_digests = mine.new_empty(size(group))
    _all_gather(all_digests, mine, group=group)
    if bool((all_digests == all_digests[0]).all()):
        return
    gathered: list[Any] = [None] * size(group)
    dist.all_gather_object(gathered, entries, group=group)
    for other, theirs in enumerate(gathered):
        for place in range(max(len(theirs), len(gathered[0]))):
            here = gathered[0][place] if place < len(gathered[0]) else "nothing"
            there = theirs[place] if place < len(theirs) else "nothing"
            if here != there:
                raise ValueError(
                    f"the ranks disagree on {what} number {place}: rank 0 has {here}, rank {other} has {there}; "
                    "build the same model and optimizer on every rank"
                )


def broadcast(tensor: Tensor, source: int, group: Any) -> None:
    """tensor <- that of rank `source` of `group` (modified in place)."""
    dist.broadcast(tensor, group_src=source, group=group)


def gather_objects(mine: Any, group: Any) -> list[Any]:
    """What every rank of `group` has, in rank order, on all of them."""
    if group is None:
        return [mine]
    gathered: list[Any] = [None] * size(group)
    dist.all_gather_object(gathered, mine, group=group)
    return gathered


def raise_together(problem: Exception | None, group: Any) -> None:
    """Raise `problem` on this rank, and its text as a ValueError on the ranks of `group` that have none of their own.

    Every rank calls it, with None where all is well: called where an error of one rank would leave the others waiting.
    """
    texts = gather_objects(None if problem is None else str(problem), group)
    if problem is not None:
        raise problem
    for other, text in enumerate(texts):
        if text is not None:
            raise ValueError(f"rank {other}: {text}")
