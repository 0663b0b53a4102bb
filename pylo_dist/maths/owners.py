"""Whole matrices on one rank each: which rank owns which, and the exchanges that bring pieces there
and back. Writes the buffers of its exchanges and the whole matrices it makes.

Where a rule needs a whole matrix (Newton-Schulz), one all-to-all over all matrices brings every
matrix to its owner and a second one brings the results back. Sent per rank: the elements it holds
of matrices owned elsewhere, both ways; no rank receives more than the matrices it owns.

Legend: N local elements of a matrix, on the rank in question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.pieces import ShardedParam
from ..core.requests import Exchange, Transfer
from ..core.shards import TensorShard
from . import stacks


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

    @classmethod
    def deal(cls, items: Sequence[int], params: Sequence[ShardedParam]) -> OwnedMatrices:
        """Deal the matrices to ranks, the costliest first, each to the least loaded rank. Alike on
        all ranks.

        The cost is that of Newton-Schulz: the matrix's elements times its shorter side.
        """
        first = params[0]
        ranks = max(1, len(first.peers))
        cost = [param.shard.global_numel * min(param.shard.shape[-2:]) for param in params]
        load = [0] * ranks
        owners = [0] * len(params)
        for i in sorted(range(len(params)), key=lambda i: (-cost[i], i)):
            owners[i] = min(range(ranks), key=lambda rank: (load[rank], rank))
            load[owners[i]] += cost[i]
        shards = tuple(param.peers or (param.shard,) for param in params)
        mine = tuple(i for i, owner in enumerate(owners) if owner == first.rank)
        held = [0] * ranks
        for i, owner in enumerate(owners):
            held[owner] += shards[i][first.rank].numel
        owned = [sum(shards[i][rank].numel for i in mine) for rank in range(ranks)]
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
        order = [(rank, i) for rank in range(self.ranks) for i in self.mine]
        found: list[tuple[Tensor, Tensor]] = []
        for (rank, i), piece in zip(
            order, pieces.split([self.shards[i][rank].numel for rank, i in order]), strict=True
        ):
            shard, whole = self.shards[i][rank], wholes[self.items[i]]
            if shard.run == shard.numel:  # an interval
                found.append((piece, whole.view(-1)[shard.start : shard.start + shard.numel]))
            else:
                found += [(box.view(piece), whole[box.slices]) for box in shard.boxes()]
        return found

    def pieces(self, answered: Exchange) -> dict[int, Tensor]:
        """This rank's pieces, by item, (N,)."""
        parts = answered.transfers[0].receive.split(
            [self.shards[i][self.rank].numel for i in self.by_owner]
        )
        return {self.items[i]: part for i, part in zip(self.by_owner, parts, strict=True)}


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
