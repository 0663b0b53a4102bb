"""What a rule may ask the ranks for: sums and exchanges, packed over all tensors. Writes nothing
but its own buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from .pieces import ShardedParam

# Slots of the gradient audit, which every item has at the front of the first Sum of a step.
PRESENT, NONFINITE, SQUARES, UPDATE, FAILED = range(5)
AUDIT_SLOTS = 5


@dataclass(slots=True)
class Packed:
    """The sums of all `members` (items of a batch) that the same ranks share: added over `group`,
    divided by `replicas`.
    """

    group: Any
    replicas: int
    buffer: Tensor
    members: list[int]


class Sum:
    """A request: add `vectors` over the ranks that share each item's tensor (in place).

    `vectors[i]` is a float64 vector of the asked length for item i of the batch; `audits[i]` the
    (AUDIT_SLOTS,) gradient audit if this is the first request of a step. All are views of one
    packed buffer per process group (`buffers`), audits in front, so that one small all-reduce per
    group serves any number of tensors.
    """

    __slots__ = ("_places", "audits", "buffers", "vectors")

    def __init__(
        self,
        params: Sequence[ShardedParam],
        lengths: Sequence[int],
        device: torch.device,
        audited: bool,
    ) -> None:
        holders = {_sharers(param): param.holders for param in params}
        self.vectors: list[Tensor] = [torch.empty(0)] * len(params)
        self.audits: list[Tensor] = [torch.empty(0)] * len(params)
        self.buffers: list[Packed] = []
        self._places: dict[tuple[tuple[int, ...] | range, int, int], Tensor] = {}
        for key, group in holders.items():
            members = [i for i, param in enumerate(params) if _sharers(param) == key]
            front = AUDIT_SLOTS * len(members) if audited else 0
            buffer = torch.zeros(
                front + sum(lengths[i] for i in members), dtype=torch.float64, device=device
            )
            self.buffers.append(Packed(group, key[1], buffer, members))
            for place, i in enumerate(members):
                if audited:
                    self.audits[i] = buffer[place * AUDIT_SLOTS : (place + 1) * AUDIT_SLOTS]
                self.vectors[i] = buffer[front : front + lengths[i]]
                front += lengths[i]

    def audit_table(self) -> Tensor:
        """The audits of all items, (items, AUDIT_SLOTS); of a single buffer a view."""
        if len(self.buffers) == 1:
            return self.buffers[0].buffer[: AUDIT_SLOTS * len(self.audits)].view(-1, AUDIT_SLOTS)
        return torch.stack(self.audits)

    def heads(self, count: int) -> Tensor:
        """The first `count` numbers of every vector, float64 (items, count)."""
        return self.slices(range(len(self.vectors)), 0, count)

    def slices(self, items: tuple[int, ...] | range, first: int, count: int) -> Tensor:
        """`count` numbers of the vectors of these items, from number `first` on, float64 (number of
        these items, count).
        """
        flat = (
            self.buffers[0].buffer
            if len(self.buffers) == 1
            else torch.cat([packed.buffer for packed in self.buffers])
        )
        key = (items, first, count)
        if key not in self._places:
            begins, begin = [0] * len(self.vectors), first
            for packed in self.buffers:
                for i in packed.members:
                    begins[i] = begin + int(self.vectors[i].storage_offset())
                begin += packed.buffer.numel()
            places = torch.tensor([begins[i] for i in items]).view(-1, 1) + torch.arange(count)
            self._places[key] = places.flatten().to(flat.device)
        return flat.index_select(0, self._places[key]).view(len(items), count)

    def zero_(self) -> Sum:
        for packed in self.buffers:
            packed.buffer.zero_()
        return self


def _sharers(param: ShardedParam) -> tuple[int, int]:
    return id(param.holders), param.replicas


@dataclass(slots=True)
class Transfer:
    """What a rank sends to and receives from every rank of a process group, 1-D, in rank order
    (`receive` is written).
    """

    group: Any
    send: Tensor
    send_counts: list[int]
    receive: Tensor
    receive_counts: list[int]


@dataclass(slots=True)
class Exchange:
    """A request: carry out these transfers, one per process group. The counts must follow from
    shards and shapes alone.
    """

    transfers: list[Transfer]


Request = Union[Sum, Exchange]
