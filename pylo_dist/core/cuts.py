"""What all ranks of a group hold of a tensor, as a formula: thousands of ranks cost no memory.
Touches no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from .shards import Shape, TensorShard


class Cuts(Sequence[TensorShard]):
    """The shards of a tensor by rank; together they hold every element once.

    Made when they are asked for.
    """

    __slots__ = ()

    def _at(self, rank: int) -> TensorShard:
        """The shard of a rank, which exists."""
        raise NotImplementedError

    @overload
    def __getitem__(self, rank: int) -> TensorShard: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[TensorShard]: ...
    def __getitem__(self, rank: Any) -> Any:
        if isinstance(rank, slice):
            return [self._at(r) for r in range(*rank.indices(len(self)))]
        if not -len(self) <= rank < len(self):
            raise IndexError(f"rank {rank} of {len(self)}")
        return self._at(rank % len(self))

    def __iter__(self) -> Iterator[TensorShard]:
        return (self._at(rank) for rank in range(len(self)))


@dataclass(frozen=True, slots=True)
class EvenCuts(Cuts):
    """A tensor that lies in a flat one, which is cut evenly: rank r has the elements r * part ..
    (r + 1) * part of that.

    Attributes:
        offset: where the tensor begins in the flat one.
        ranks: how many there are; together they have all of it.
    """

    fqn: str
    shape: Shape
    part: int
    offset: int
    ranks: int

    def __len__(self) -> int:
        return self.ranks

    def _at(self, rank: int) -> TensorShard:
        numel, low = math.prod(self.shape), rank * self.part - self.offset
        start, stop = min(max(low, 0), numel), min(max(low + self.part, 0), numel)
        return TensorShard.interval(self.fqn, self.shape, start, stop)


@dataclass(frozen=True, slots=True)
class GridCuts(Cuts):
    """A tensor whose dimensions are cut into chunks, again and again, over the axes of a grid.

    A dimension of `size` in `count` chunks has ceil(size / count) indices per chunk, as far as
    there are some, as `torch.chunk` and DTensor's `Shard` have it.

    Attributes:
        sizes: of the axes of the grid.
        axes: per dimension that is cut, the axes that do, in the order in which they do.
        places: of every rank its place in the grid, in C order; None: rank r has place r.

    Raises:
        ValueError: when a shard is asked for, if two dimensions beside the first are cut.
    """

    fqn: str
    shape: Shape
    sizes: tuple[int, ...]
    axes: tuple[tuple[int, tuple[int, ...]], ...]
    places: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def _at(self, rank: int) -> TensorShard:
        place = rank if self.places is None else self.places[rank]
        at = []
        for size in reversed(self.sizes):
            place, index = divmod(place, size)
            at.append(index)
        return self.shard(at[::-1])

    def shard(self, at: Sequence[int]) -> TensorShard:
        """What lies at these indices of the grid."""
        bounds = {
            dim: _chunk(self.shape[dim], [(self.sizes[axis], at[axis]) for axis in axes])
            for dim, axes in self.axes
        }
        inner = [dim for dim in bounds if dim > 0]
        if len(inner) > 1:
            raise ValueError(
                f"{self.fqn!r} of shape {self.shape} is cut on dimensions {inner}: dimension 0 and "
                "one more can be cut; change the shard_placement_fn or the tensor-parallel style of"
                " it"
            )
        if inner:
            dim = inner[0]
            return TensorShard.block(self.fqn, self.shape, dim, *bounds[dim], rows=bounds.get(0))
        if 0 in bounds:
            row = math.prod(self.shape[1:])
            first, stop = bounds[0]
            return TensorShard.interval(self.fqn, self.shape, first * row, stop * row)
        return TensorShard.whole(self.fqn, self.shape)


def _chunk(size: int, cuts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and last + 1 of the indices left by cutting 0 .. size into chunks, again and again:
    (number of chunks, which one).
    """
    first, stop = 0, size
    for count, index in cuts:
        chunk = -(-(stop - first) // count)
        first, stop = min(first + index * chunk, stop), min(first + (index + 1) * chunk, stop)
    return first, stop
