"""Which state a parameter has, and its allocation. Touches only the tensors it makes.

Legend: N local elements of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .shards import Shape, TensorShard


@dataclass(frozen=True, slots=True)
class StateField:
    """One state tensor of a parameter.

    Attributes:
        copies: leading dimensions, e.g. (3,) for one slice per decay.
        initial: values a replicated state starts from; None: zeros.
        replicated: None for element state, which has the parameter's own shape and is sharded as it
            is; else the shape that follows `copies` of a tensor which every rank holds whole (the
            row and column factors).
        beside_elements: of a replicated state, that ranks without elements of the parameter keep
            none of it (VeLO's LSTM rows).
        slot: of element state that may be kept in bfloat16, the slot of random bits that its first
            copy is rounded with, see maths/rounding.py; those of a parameter's other copies and
            fields are others. None: it is never halved.
    """

    copies: Shape = ()
    replicated: Shape | None = None
    initial: Tensor | None = None
    beside_elements: bool = False
    slot: int | None = None

    def canonical_shape(self, shape: Shape) -> Shape:
        """Shape of this state in the unsharded optimizer; `shape` is the parameter's global one."""
        return (*self.copies, *(shape if self.replicated is None else self.replicated))

    def everywhere(self) -> StateField:
        """The same where every rank keeps what is replicated."""
        return replace(self, beside_elements=False) if self.beside_elements else self

    def part(self, shard: TensorShard) -> TensorShard:
        """Which elements of this state, under each copy, a rank keeps that holds these of the
        parameter.
        """
        if self.replicated is None:
            return shard
        numel = math.prod(self.replicated) if self.is_kept(shard) else 0
        return TensorShard.interval(shard.fqn, self.replicated, 0, numel)

    def is_kept(self, shard: TensorShard) -> bool:
        """Whether such a rank keeps anything of this state."""
        return not self.beside_elements or shard.numel > 0 or shard.is_whole

    def local_shape(self, shard: TensorShard) -> Shape:
        """Shape on a rank: canonical where it keeps all elements, else (*copies, N)."""
        if shard.is_whole or (self.replicated is not None and self.is_kept(shard)):
            return self.canonical_shape(shard.shape)
        return (*self.copies, 0 if self.replicated is not None else shard.numel)

    def flat(self, tensor: Tensor) -> Tensor:
        """View of the local state as (*copies, elements)."""
        return tensor.view((*self.copies, math.prod(tensor.shape[len(self.copies) :])))

    def dtype(self, param: torch.dtype, halved: bool) -> torch.dtype:
        """What it is kept in, beside a parameter of this dtype; `halved`: where bfloat16 is wanted.

        What is kept in one loads into the other: see `loads`.
        """
        return torch.bfloat16 if halved and self.slot is not None else state_dtype(param)

    def loads(self, dtype: torch.dtype, param: torch.dtype) -> bool:
        """Whether state that was saved in `dtype` belongs beside a parameter of dtype `param`."""
        wide = state_dtype(param)
        return dtype == wide or (wide == torch.float32 and dtype == self.dtype(param, halved=True))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 parameters: the dtype of the arithmetic of a parameter, and
    of all its state that is not halved.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def allocate_states(
    entries: Iterable[tuple[dict[str, StateField], TensorShard, Tensor]],
    halved: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """New state for each of these parameters with their fields and shards, on its device, in the
    dtype of its field (see `StateField.dtype`); every tensor has memory of its own. All are to be
    made before one is written.
    """
    # the first of each kind, by name: how one like it is made, which is cheaper, and like what
    first: dict[Any, list[tuple[str, Callable[[Tensor], Tensor], Tensor]]] = {}
    for fields, shard, param in entries:
        dtype, device = param.dtype, param.device
        kind = id(fields), shard.shape, shard.numel, dtype, device
        if kind in first:
            yield {name: make(like) for name, make, like in first[kind]}
            continue
        first[kind] = []
        for name, field in fields.items():
            kept_in = field.dtype(dtype, halved)
            new = torch.zeros(field.local_shape(shard), dtype=kept_in, device=device)
            if field.initial is not None and field.is_kept(shard):
                new.copy_(field.initial)
                first[kind].append((name, torch.clone, new))
            else:
                first[kind].append((name, torch.zeros_like, new))
        yield {name: new for name, _, new in first[kind]}


def allocate_state(
    fields: dict[str, StateField], shard: TensorShard, param: Tensor, halved: bool = False
) -> dict[str, Tensor]:
    """As `allocate_states`, for one parameter."""
    return next(allocate_states([(fields, shard, param)], halved))
