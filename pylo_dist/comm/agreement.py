"""What makes ranks agree, or fail alike: comparisons of what they have, and errors of one rank that
reach all. Changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .collectives import all_gather, gather_objects, size

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another rank could not do its part; what it could not do is in its own error. Nothing was
    changed.
    """

    def __init__(
        self,
        message: str = "another rank could not take this step, see its error; nothing was changed",
    ) -> None:
        super().__init__(message)


def raise_together(
    problem: Exception | None, group: Any, error: type[Exception] = PeerError
) -> None:
    """Raise `problem` on this rank, and its text as an `error` on the ranks of `group` that have
    none of their own.

    Every rank calls it, with None where all is well, at a place where an error of one rank would
    leave the others waiting.
    """
    texts = gather_objects(
        None if problem is None else str(problem) or type(problem).__name__, group
    )
    if problem is not None:
        raise problem
    for other, text in enumerate(texts):
        if text is not None:
            raise error(f"rank {other}: {text}")


def together(work: Callable[[], T], group: Any, error: type[Exception] = PeerError) -> T:
    """`work()` of this rank, which calls no collective; what it raises on one rank is raised on
    all, see `raise_together`.
    """
    problem: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as caught:
        problem = caught
    raise_together(problem, group, error)
    done: T = result
    return done


def check_equal(what: str, entries: list[Any], group: Any, device: torch.device) -> None:
    """Raise ValueError on every rank if the JSON-able `entries` differ between ranks, naming the
    first that does.

    Called where a disagreement would later be a hang.
    """
    digest = hashlib.sha256(json.dumps(entries).encode()).digest()[:8]
    mine = torch.tensor(
        [int.from_bytes(digest, "little", signed=True)], dtype=torch.int64, device=device
    )
    all_digests = mine.new_empty(size(group))
    all_gather(all_digests, mine, group, f"a comparison of every {what}").wait()
    if bool((all_digests == all_digests[0]).all()):
        return
    gathered = gather_objects(entries, group)
    for other, theirs in enumerate(gathered):
        for place in range(max(len(theirs), len(gathered[0]))):
            here = gathered[0][place] if place < len(gathered[0]) else "nothing"
            there = theirs[place] if place < len(theirs) else "nothing"
            if here != there:
                raise ValueError(
                    f"the ranks disagree on {what} number {place}: rank 0 has {here}, rank {other} "
                    f"has {there}; build the same model and optimizer on every rank"
                )


def agree(what: str, entries: Callable[[], list[Any]], group: Any, device: torch.device) -> None:
    """As `check_equal` for entries that this rank may fail to say: its ValueError is raised on all
    ranks, here as it is.
    """
    problem: ValueError | None = None
    try:
        mine = entries()
    except ValueError as error:  # the others hear of it in the comparison
        problem, mine = error, [[f"an error: {error}"]]
    try:
        check_equal(what, mine, group, device)
    except ValueError as disagreement:
        raise problem or disagreement from None
    if problem is not None:
        raise problem


def checksums(tensors: Sequence[Tensor | None]) -> Tensor:
    """int64 (len,): a number >= 0 per tensor that changes with any of its bits (and their places);
    -1 where there is none.
    """
    device = next((tensor.device for tensor in tensors if tensor is not None), None)
    sums = []
    for tensor in tensors:
        if tensor is None:
            sums.append(torch.full((), -1, device=device))
            continue
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
        sums.append((bits * (torch.arange(len(bits), device=bits.device) % 8191 + 1)).sum())
    return torch.stack(sums)


def differing(sums: Tensor, group: Any) -> list[int]:
    """Places where the int64 `sums` are not the same on all ranks of `group` that have one (>= 0);
    waits for the device.
    """
    everyone = sums.new_empty(size(group) * len(sums))
    all_gather(everyone, sums, group, "a comparison of replicated state").wait()
    table = everyone.view(-1, len(sums))
    differ = (table != table.amax(0)) & (table >= 0)
    return [int(i) for i in differ.any(0).nonzero()]
