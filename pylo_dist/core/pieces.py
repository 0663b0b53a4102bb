"""A rank's piece of a parameter: what a rule sees of it, and the mark that tells an optimizer where
it lies. Marks the tensors it is handed.

Legend: N local elements.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from .shards import TensorShard


@dataclass(slots=True)
class ShardedParam:
    """One parameter as a rule sees it, owned by its adapter.

    Attributes:
        shard: where the local elements lie.
        value: local elements (N,), written in place by the rule.
        grad: local gradient (N,); None only where `present` is False and `holders` is None.
        present: whether this rank's backward produced a gradient; a tensor moves when one of its
            holders has one, and ranks without one then contribute zeros.
        group: the process group whose ranks tile the tensor exactly once; None when this rank holds
            all of it.
        peers: the shards of all ranks of `group`, in rank order; () without a group.
        rank: this one's place among them; 0 without a group.
        holders: the process group over which sums are added: `group`, or where there are replicas
            the ranks of all of them together, so that every copy of a replicated sum has the same
            bits; None: nobody else.
        replicas: how often the ranks of `holders` hold every element; sums are divided by it.
    """

    shard: TensorShard
    value: Tensor
    grad: Tensor | None
    present: bool
    group: Any = None
    peers: Sequence[TensorShard] = ()
    rank: int = 0
    holders: Any = None
    replicas: int = 1


@dataclass(slots=True)
class ShardBinding:
    """Says that a local parameter is the piece `shard` of a larger tensor, and who has the others;
    fields as in `ShardedParam`.

    `present` is set by the adapter before each step; `unreduced` says that nobody has averaged its
    gradients over the holders.
    """

    shard: TensorShard
    group: Any
    peers: Sequence[TensorShard] = ()
    rank: int = 0
    present: bool = True
    holders: Any = None
    replicas: int = 1
    unreduced: bool = False

    def __post_init__(self) -> None:
        if self.holders is None:
            self.holders = self.group


def _codes(code: CodeType) -> Iterator[int]:
    yield id(code)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):  # a comprehension
            yield from _codes(inner)


_GRAD: Any = torch.Tensor.grad
_read, _caller = _GRAD.__get__, sys._getframe  # this is asked for every piece in every step
# `.grad` of a tensor, for code of ours, which asks a piece for it several times a step
raw_grad: Callable[[Tensor], Tensor | None] = _read
set_raw_grad: Callable[[Tensor, Tensor | None], None] = _GRAD.__set__
# code of torch's clip_grad_norm_ that reads gradients, by id
_CLIPPING = frozenset(_codes(inspect.unwrap(torch.nn.utils.clip_grad_norm_).__code__))


def check_reader(piece: Tensor, code: CodeType) -> None:
    """Raise ValueError if the code that reads the gradient of a piece is torch's clip_grad_norm_,
    and other ranks have the rest of it: it would bound the norm of this rank's pieces, and where no
    rank's is too large, nothing of it could be seen later.
    """
    if id(code) in _CLIPPING:
        binding = bound_shard(piece)
        if binding is not None and binding.group is not None:
            raise ValueError(
                "torch's clip_grad_norm_ would take the norm of this rank's pieces alone, which"
                " is another on every rank: clip with pylo_dist.clip_grad_norm_(optimizer, "
                "max_norm), or with max_grad_norm= of a learned optimizer"
            )


class PieceParameter(torch.nn.Parameter):
    """The local 1-D piece of a model's parameter `whole`, equal to it as a key.

    So code that looks a model's parameters up among those of an optimizer finds the pieces, above
    all torch's `get_optimizer_state_dict` and `set_optimizer_state_dict`. Compared with anything
    else it is an ordinary tensor.

    Where other ranks have the rest, torch's `clip_grad_norm_` is a ValueError (`check_reader`).
    """

    whole: Tensor

    @property
    def grad(self) -> Tensor | None:
        check_reader(self, _caller(1).f_code)
        grad: Tensor | None = _read(self)
        return grad

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        _GRAD.__set__(self, grad)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__delete__(self)

    @staticmethod
    def __new__(cls, local: Tensor, whole: Tensor) -> PieceParameter:
        piece: PieceParameter = super().__new__(cls, local)
        piece.whole = whole
        return piece

    def __hash__(self) -> int:
        return hash(self.whole)

    def __eq__(self, other: object) -> Any:
        return other is self or other is self.whole or super().__eq__(other)


_BINDING = "_pylo_dist_shard"


def bind_shard(
    param: Tensor,
    peers: Sequence[TensorShard],
    rank: int,
    group: Any,
    holders: Any = None,
    replicas: int = 1,
) -> ShardBinding:
    """Mark the 1-D tensor `param` as the piece `peers[rank]`, so that an optimizer built on it
    knows its layout.
    """
    shard = peers[rank]
    if tuple(param.shape) != (shard.numel,):
        raise ValueError(
            f"{shard.fqn!r}: local tensor has shape {tuple(param.shape)}, its shard {shard.numel} "
            "elements"
        )
    binding = ShardBinding(shard, group, peers, rank, holders=holders, replicas=replicas)
    setattr(param, _BINDING, binding)
    return binding


def bound_shard(param: Tensor) -> ShardBinding | None:
    """The binding of a local piece, or None for an ordinary parameter."""
    return getattr(param, _BINDING, None)
