"""Gradients that do not lie as their parameters do, packed: whole ones that nobody averaged, and
summands beside DTensors. Reads gradients; writes none.

Whole parameters beside DTensors (`ignored_params` of fully_shard) have a gradient per rank, of
which the mean is wanted. Under sequence parallelism each rank has seen a part of the sequence, and
the gradient of a norm is a `Partial` DTensor: the sum over the ranks is wanted. Both leave in one
buffer per process group, however many tensors there are.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..comm import Collective, Reduction
from ..core.pieces import ShardBinding, raw_grad
from .plain import is_dtensor, local_tensor

_PLAIN = frozenset((Tensor, type(None)))
Bound = Sequence[tuple[ShardBinding, Tensor]]


@dataclass(frozen=True, slots=True)
class Settled:
    """Gradients by id of their parameter.

    Attributes:
        means: of parameters that nobody averaged, as local 1-D tensors.
        present: on how many ranks there was one of those, 0-d.
        sums: DTensors that were `Partial`, and are so no more.
    """

    means: dict[int, Tensor] = field(default_factory=dict)
    present: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, Any] = field(default_factory=dict)


def settle(bound: Bound) -> Generator[list[Collective], None, Settled]:
    """Mean gradients of whole parameters over their holders, and the sums of partial ones. Yields
    the reductions it needs.

    The mean is taken in float64, where that of equal numbers is the number itself: averaging twice
    changes nothing. None counts as zeros, and so does a gradient that cannot be used.
    """
    whole = [(binding, param) for binding, param in bound if binding.unreduced]
    grads = [raw_grad(param) for _, param in bound]
    partial: dict[int, Any] = {}
    if not _PLAIN.issuperset(map(type, grads)):
        partial = {
            id(param): grad
            for (_, param), grad in zip(bound, grads, strict=True)
            if grad is not None and is_dtensor(grad) and _axis_to_add(grad) is not None
        }
    packed = _pack_means(whole)
    more: list[Reduction] = [] if packed is None else [(whole[0][0].holders, packed)]
    while True:
        by_group: dict[tuple[int, torch.device], tuple[Any, list[int]]] = {}
        for key, grad in partial.items():
            axis = _axis_to_add(grad)
            if axis is not None:
                group = grad.device_mesh.get_group(axis)
                by_group.setdefault((id(group), local_tensor(grad).device), (group, []))[1].append(
                    key
                )
        buffers = [
            (group, _pack([local_tensor(partial[key]) for key in keys]))
            for group, keys in by_group.values()
        ]
        if not more and not buffers:
            break
        yield [*more, *buffers]
        more = []
        for (_, keys), (_, buffer) in zip(by_group.values(), buffers, strict=True):
            sizes = [local_tensor(partial[key]).numel() for key in keys]
            for key, total in zip(keys, buffer.split(sizes), strict=True):
                partial[key] = _added(partial[key], total)
    if packed is None:
        return Settled(sums=partial)
    present, *sums = packed.split([len(whole), *(binding.shard.numel for binding, _ in whole)])
    means = [
        (total / binding.replicas).to(param.dtype)
        for total, (binding, param) in zip(sums, whole, strict=True)
    ]
    keys = [id(param) for _, param in whole]
    return Settled(
        dict(zip(keys, means, strict=True)), dict(zip(keys, present, strict=True)), partial
    )


def _pack_means(whole: Bound) -> Tensor | None:
    """float64 (tensors + all their elements,): whether there is a gradient, and the gradients
    themselves.
    """
    if not whole:
        return None
    grads = [param.grad for _, param in whole]
    parts = [
        grad.reshape(-1)
        if grad is not None and grad.layout == torch.strided
        else param.new_zeros(binding.shard.numel)
        for grad, (binding, param) in zip(grads, whole, strict=True)
    ]
    present = torch.ones(len(whole), dtype=torch.float64, device=parts[0].device)
    for i, grad in enumerate(grads):
        if grad is None:
            present[i].zero_()
    return torch.cat([present, *(part.detach().to(torch.float64) for part in parts)])


def _axis_to_add(grad: Any) -> int | None:
    """The first mesh axis over which a DTensor is still to be added up."""
    for axis, placement in enumerate(grad.placements):
        if type(placement).__name__ == "Partial" and placement.reduce_op in ("sum", "avg"):
            return axis
    return None


def _pack(parts: Sequence[Tensor]) -> Tensor:
    """One buffer, 1-D, at least float32: gloo and NCCL add narrower numbers in their own width."""
    dtype = reduce(torch.promote_types, [part.dtype for part in parts], torch.float32)
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])


def _added(grad: Any, total: Tensor) -> Any:
    """The DTensor behind one reduction: `total` (N,) is the sum over its first axis to add, on all
    ranks of it.
    """
    from torch.distributed.tensor import DTensor, Replicate

    axis, placements, mesh = _axis_to_add(grad), list(grad.placements), grad.device_mesh
    assert axis is not None
    if placements[axis].reduce_op == "avg":
        total = total / mesh.size(axis)
    placements[axis] = Replicate()
    local = total.to(grad.dtype).view(local_tensor(grad).shape)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride()
    )
