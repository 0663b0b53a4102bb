"""Tensors of equal size as one: which go together, into one tensor and back, the squares in it.
Writes the tensors it is handed.

What has no compiled pass is done on stacks, so that a step on hundreds of small tensors takes as
many operations as there are sizes. A stack holds at most `most_elements`, which bounds its memory;
a larger tensor is a stack of its own, and no copy.

Legend: B tensors of a stack, N local elements of each, L the dims in front of the last two (one
matrix per index; none of a tensor that is one matrix), E local elements of a block in one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.rule import Batch
from ..core.shards import Box, Shape, TensorShard
from . import reference

MOST_CPU = 1 << 16  # a stack and what is computed from it stay in the second-level cache
MOST_GPU = 1 << 22  # with a dozen numbers per element below 256 MB


@dataclass(frozen=True, slots=True)
class Stack:
    """Items of a batch that are worked on as one tensor, and the same as an index on its device."""

    items: list[int]
    places: Tensor

    def of(self, numbers: Tensor) -> Tensor:
        """Theirs of one number per item, (number of items, 1)."""
        return numbers.index_select(0, self.places)[:, None]


def of_batch(batch: Batch, entries: list[tuple[int, Hashable, int]]) -> list[Stack]:
    """The stacks of these items, see `equal`; looked for again only where the entries are others
    than in the step before.
    """
    kept = batch.cache.get("stacks")
    if kept is None or kept[0] != entries:
        kept = batch.cache["stacks"] = (entries, equal(entries, most_elements(batch.device)))
    return [
        Stack(items, batch.on_device(f"stack {items[0]}", tuple(items), torch.int64))
        for items in kept[1]
    ]


def most_elements(device: torch.device) -> int:
    """How many elements may go together."""
    return MOST_CPU if device.type == "cpu" else MOST_GPU


def equal(entries: Iterable[tuple[int, Hashable, int]], most: int) -> list[list[int]]:
    """The numbers of (number, key, elements), those of one key together, in order, with at most
    `most` elements or alone.
    """
    found: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], int]] = {}
    for number, key, elements in entries:
        members, filled = last.get(key, ([], 0))
        if not members or filled + elements > most:
            members, filled = [], 0
            found.append(members)
        members.append(number)
        last[key] = (members, filled + elements)
    return found


def empty(lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Uninitialised (N,) of these lengths in one piece of memory, each on a boundary of 64 bytes:
    products round by that.
    """
    padded = [-(-length // 16) * 16 for length in lengths]
    pieces = torch.empty(sum(padded), dtype=dtype, device=device).split(padded) if lengths else ()
    return [piece[:length] for piece, length in zip(pieces, lengths, strict=True)]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as (B, *shape); a view where there is one, else a copy."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def put_back(stack: Tensor, tensors: Sequence[Tensor]) -> None:
    """Bring (B, *shape) back to where `stacked` took it from (`tensors` are modified in place)."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), list(stack.unbind()))


def matrix_square_sums(stack: Tensor, shard: TensorShard) -> Tensor:
    """Local sums of squares over the last two dims, of tensors (B, N): float64 (B, matrices of
    each).

    Those of several matrices must be cut alike, as `shard` says.
    """
    lead = _lead(shard.shape)
    sums_BL = torch.zeros((len(stack), *lead), dtype=torch.float64, device=stack.device)
    for box in _boxes(stack, shard):
        x_BLE = box.view(stack).reshape(len(stack), *box.sizes[: len(lead)], -1)
        reference.lead_part(sums_BL, box, len(lead)).add_(reference.square_sums(x_BLE))
    return sums_BL.view(len(stack), math.prod(lead))


def scale_matrices(stack: Tensor, shard: TensorShard, factors: Tensor) -> None:
    """Multiply the elements (B, N) by their matrix's number in `factors` (B, matrices of each), in
    the order of `matrix_square_sums` (`stack` is modified in place).
    """
    lead = _lead(shard.shape)
    for box in _boxes(stack, shard):
        ones = [1] * (len(box.sizes) - len(lead))
        box.view(stack).mul_(
            reference.lead_part(factors.view(len(stack), *lead, *ones), box, len(lead))
        )


def _lead(shape: Shape) -> Shape:
    """The dims that have a matrix for every index; () of a tensor that is one matrix."""
    return () if math.prod(shape[:-2]) == 1 else shape[:-2]


def _boxes(stack: Tensor, shard: TensorShard) -> Iterator[Box]:
    """The local elements as blocks of bounded size; of a single matrix it does not matter where
    they lie.
    """
    flat = TensorShard.whole(shard.fqn, (shard.numel,))
    for box in (shard if _lead(shard.shape) else flat).boxes():
        yield from box.split(max(1, reference.part_size(stack.device) // len(stack)))
