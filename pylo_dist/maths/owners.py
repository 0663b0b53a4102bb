"""Whole matrices on one rank each: which rank owns which, and the exchanges that bring pieces there
and back. Writes the buffers of its exchanges and the whole matrices it makes.

Where a rule needs a whole matrix (Newton-Schulz), one all-to-all over all matrices brings every
matrix to its owner and a second one brings the results back. Sent per rank: the elements it holds
of matrices owned elsewhere, both ways; no rank receives more than the matrices it owns.

Legend: N local elements of a matrix, on the rank in question.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.pieces import ShardedParam
from ..core.requests import Exchange, Transfer
from ..core.shards import TensorShard
from . import stacks


@dataclass(frozen=True, slots=True)
class _Runs:
    """Elements that lie one after the other in a matrix, and in equal runs in the pieces of all
    ranks as they travel: one view of each, however many ranks have some.

    Attributes:
        matrix: its place.
        start: where they begin in it.
        at: where the first run begins in the pieces.
        run, count: elements of a run, and how many runs there are.
        stride: from the beginning of one to that of the next.
    """

    matrix: int
    start: int
    at: int
    run: int
    count: int = 1
    stride: int = 0

    def with_next(self, at: int, shard: TensorShard) -> _Runs | None:
        """These and the run of the next rank that has some; None if that one is not like them."""
        stride = self.stride or at - self.at
        if (
            shard.numel != self.run
            or shard.start != self.start + self.count * self.run
            or at != self.at + self.count * stride
        ):
            return None
        return replace(self, count=self.count + 1, stride=stride)


@dataclass(frozen=True, slots=True)
class OwnedMatrices:
    """The matrices of one process group.

    Attributes:
        group: the ranks that share them; None: this rank holds all of them whole, and there is
            nothing to exchange.
        rank, ranks: this one's place, and how many there are.
        items: index of each matrix in its batch.
        shards: per matrix the shards of all ranks.
        owners: per matrix the rank that gets it.
        mine: places of the matrices this rank owns.
        by_owner: places of all, sorted by owner.
        held: per rank, how many elements this one holds of that one's matrices.
        owned: per rank, how many elements that one holds of this one's matrices.
        runs: where the elements of this one's matrices lie as they travel, of intervals; in `boxes`
            those of other shards, each as its matrix, where it begins, and the shard.
    """

    group: Any
    rank: int
    ranks: int
    items: tuple[int, ...]
    shards: tuple[Sequence[TensorShard], ...]
    owners: tuple[int, ...]
    mine: tuple[int, ...]
    by_owner: tuple[int, ...]
    held: list[int]
    owned: list[int]
    runs: tuple[_Runs, ...]
    boxes: tuple[tuple[int, int, TensorShard], ...]

    @classmethod
    def deal(cls, items: Sequence[int], params: Sequence[ShardedParam]) -> OwnedMatrices:
        """Deal the matrices to ranks, the costliest first, each to the least loaded rank. Alike on
        all ranks.

        The cost is that of Newton-Schulz: the matrix's elements times its shorter side.
        """
        first = params[0]
        ranks = max(1, len(first.peers))
        cost = [param.shard.global_numel * min(param.shard.shape[-2:]) for param in params]
        least = [(0, rank) for rank in range(ranks)]  # a heap of loads
        owners = [0] * len(params)
        for i in sorted(range(len(params)), key=lambda i: (-cost[i], i)):
            load, owners[i] = least[0]
            heapq.heapreplace(least, (load + cost[i], owners[i]))
        shards = tuple(param.peers or (param.shard,) for param in params)
        mine = tuple(i for i, owner in enumerate(owners) if owner == first.rank)
        held = [0] * ranks
        for i, owner in enumerate(owners):
            held[owner] += shards[i][first.rank].numel
        owned, runs, boxes = _places(mine, shards, ranks)
        by_owner = tuple(sorted(range(len(owners)), key=lambda i: (owners[i], i)))
        return cls(
            group=first.group,
            rank=first.rank,
            ranks=ranks,
            items=tuple(items),
            shards=shards,
            owners=tuple(owners),
            mine=mine,
            by_owner=by_owner,
            held=held,
            owned=owned,
            runs=runs,
            boxes=boxes,
        )

    def to_owners(self, pieces: dict[int, Tensor], like: Tensor) -> Exchange:
        """Bring this rank's pieces (by item, (N,)) to the owners.

        Args:
            like: an empty tensor, of the dtype and device in which they travel.
        """
        send = torch.cat([like, *(pieces[self.items[i]].to(like.dtype) for i in self.by_owner)])
        return Exchange(
            [Transfer(self.group, send, self.held, like.new_empty(sum(self.owned)), self.owned)]
        )

    def assemble(self, answered: Exchange) -> dict[int, Tensor]:
        """The whole matrices this rank owns, by item."""
        received = answered.transfers[0].receive
        flat = stacks.empty(
            [self.shards[i][0].global_numel for i in self.mine], received.dtype, received.device
        )
        wholes = {
            self.items[i]: part.view(self.shards[i][0].shape)
            for i, part in zip(self.mine, flat, strict=True)
        }
        pairs = self._pairs(received, wholes)
        _copy([whole for _, whole in pairs], [piece for piece, _ in pairs])
        return wholes

    def give_back(self, wholes: dict[int, Tensor], like: Tensor) -> Exchange:
        """Bring every rank its pieces of the matrices that this rank owns."""
        send = like.new_empty(sum(self.owned))
        pairs = self._pairs(send, wholes)
        _copy([piece for piece, _ in pairs], [whole for _, whole in pairs])
        return Exchange(
            [Transfer(self.group, send, self.owned, like.new_empty(sum(self.held)), self.held)]
        )

    def _pairs(self, pieces: Tensor, wholes: dict[int, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Views of the same elements: in the pieces of all ranks, as they travel, and in the
        matrices this rank owns.
        """
        found: list[tuple[Tensor, Tensor]] = []
        for runs in self.runs:
            size = (runs.count, runs.run)
            piece = pieces.as_strided(
                size, (runs.stride or runs.run, 1), pieces.storage_offset() + runs.at
            )
            flat = wholes[self.items[runs.matrix]].view(-1)
            found.append((piece, flat[runs.start :][: runs.count * runs.run].view(size)))
        for i, at, shard in self.boxes:
            whole = wholes[self.items[i]]
            found += [(box.view(pieces[at:]), whole[box.slices]) for box in shard.boxes()]
        return found

    def pieces(self, answered: Exchange) -> dict[int, Tensor]:
        """This rank's pieces, by item, (N,)."""
        parts = answered.transfers[0].receive.split(
            [self.shards[i][self.rank].numel for i in self.by_owner]
        )
        return {self.items[i]: part for i, part in zip(self.by_owner, parts, strict=True)}


def _places(
    mine: Sequence[int], shards: Sequence[Sequence[TensorShard]], ranks: int
) -> tuple[list[int], tuple[_Runs, ...], tuple[tuple[int, int, TensorShard], ...]]:
    """How many elements every rank holds of the matrices `mine`, and where these lie in the pieces
    of all ranks: rank by rank, of each matrix by matrix.
    """
    owned, at = [0] * ranks, 0
    runs: dict[int, list[_Runs]] = {i: [] for i in mine}
    boxes = []
    for rank in range(ranks):
        for i in mine:
            shard = shards[i][rank]
            if shard.numel and shard.run < shard.numel:
                boxes.append((i, at, shard))
            elif shard.numel:
                more = runs[i][-1].with_next(at, shard) if runs[i] else None
                if more is not None:
                    runs[i][-1] = more
                else:
                    runs[i].append(_Runs(i, shard.start, at, shard.numel))
            owned[rank] += shard.numel
            at += shard.numel
    return owned, tuple(found for some in runs.values() for found in some), tuple(boxes)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each source into its target (modified in place); one launch for all that are contiguous."""
    for contiguous in (True, False):
        chosen = [
            pair
            for pair in zip(targets, sources, strict=True)
            if all(x.is_contiguous() for x in pair) == contiguous
        ]
        if chosen:
            torch._foreach_copy_([to for to, _ in chosen], [x for _, x in chosen])
