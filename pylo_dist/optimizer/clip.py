"""`clip_grad_norm_`: one gradient norm over parameters of any layouts. Writes gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Union

import torch
from torch import Tensor

from .. import comm
from ..core.pieces import ShardBinding, bound_shard
from ..layouts.company import part_of
from ..layouts.describe import describe_all
from ..layouts.flat import opened
from ..layouts.gradients import Settled, settle
from ..layouts.plain import is_dtensor, local_tensor
from .learned import LearnedOptimizer

_LAYOUTS = "_pylo_dist_layouts"  # where one of torch's optimizers keeps them, beside its state
_PART = "_pylo_dist_part"  # and any optimizer what it has of a model
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


@torch.no_grad()
def clip_grad_norm_(
    optimizer_or_params: Union[torch.optim.Optimizer, Tensor, Iterable[Tensor]],
    max_norm: float,
) -> Tensor:
    """Scale gradients (modified in place) so that their norm over all tensors and ranks is at most
    `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, but for parameters on several meshes, whole ones beside
    sharded ones, and the pieces of a `ZeroOptimizer`; norm and gradients are those of one process.
    Call it on all ranks. The gradients of whole parameters beside DTensors (`ignored_params`) are
    averaged first, which a learned optimizer would do in its step.

    `max_grad_norm=` of a learned optimizer does the same without a collective of its own.

    Args:
        optimizer_or_params: an optimizer, or its parameters in the same order on every rank. Where
            DTensors come without an optimizer, the ranks compare their layouts at every call; of an
            optimizer they are known after the first.
        max_norm: bound, > 0; inf only measures.

    Returns:
        The norm before clipping, 0-d, in the widest dtype of the gradients (at least float32).

    Raises:
        ValueError: max_norm is no number > 0, the gradients of a ZeroOptimizer, which averages
            them in its step, or those of one stage of a pipeline.
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm={max_norm!r}: wanted a number > 0")
    if not isinstance(optimizer_or_params, (Tensor, torch.optim.Optimizer)):
        optimizer_or_params = list(optimizer_or_params)
    part = _part(optimizer_or_params)
    if part is not None:
        raise ValueError(
            f"here are the gradients of {part}, whose norm is not that of the model: take torch's "
            "get_total_norm, add its square over those ranks, and call clip_grads_with_norm_"
        )
    bound = _bound(optimizer_or_params)
    pieces = [param for binding, param in bound if bound_shard(param) is not None]
    if pieces and len(pieces) == len(bound) and all(p.grad is None for p in pieces):
        raise ValueError(
            "ZeroOptimizer averages gradients in its step, so that there are none yet: pass it "
            "max_grad_norm= (learned optimizers), or clip in a step pre-hook of its inner optimizer"
        )
    unreduced = _settle(bound)
    squares = _squares([(binding, param) for binding, param in bound if not binding.unreduced])
    squares += [_square(param.grad, param) for param in unreduced]
    if not squares:
        return torch.zeros(())
    device = squares[0].device
    norm = torch.stack([square.to(device) for square in squares]).sum().sqrt()
    scale = (max_norm / (norm + EPS)).clamp(max=1.0)
    dtype = torch.float32
    for _, param in bound:
        if param.grad is not None:
            dtype = torch.promote_types(dtype, param.grad.dtype)
            grad = local_tensor(param.grad)
            grad.mul_(scale.to(grad.device, torch.promote_types(torch.float32, grad.dtype)))
    return norm.to(dtype)


def _bound(optimizer_or_params: Any) -> list[tuple[ShardBinding, Tensor]]:
    """Every parameter with its layout."""
    if isinstance(optimizer_or_params, LearnedOptimizer):
        return optimizer_or_params.layouts()
    if not isinstance(optimizer_or_params, torch.optim.Optimizer):
        return _described(
            [optimizer_or_params]
            if isinstance(optimizer_or_params, Tensor)
            else optimizer_or_params
        )
    params = [param for group in optimizer_or_params.param_groups for param in group["params"]]
    known: list[tuple[ShardBinding, Tensor]] = optimizer_or_params.__dict__.get(_LAYOUTS, [])
    if list(map(id, params)) != [id(param) for _, param in known]:
        known = optimizer_or_params.__dict__[_LAYOUTS] = _described(params)
    return known


def _part(optimizer_or_params: Any) -> str | None:
    """What this is of a model whose other tensors other ranks have; None: all of it."""
    if comm.size(comm.default_group()) == 1:
        return None
    if not isinstance(optimizer_or_params, torch.optim.Optimizer):
        given = optimizer_or_params
        return part_of(None, [given] if isinstance(given, Tensor) else given)
    known = optimizer_or_params.__dict__
    if _PART not in known:
        groups = optimizer_or_params.param_groups
        known[_PART] = part_of(
            optimizer_or_params, [param for group in groups for param in group["params"]]
        )
    part: str | None = known[_PART]
    return part


def _described(params: list[Tensor]) -> list[tuple[ShardBinding, Tensor]]:
    params = opened([list(dict.fromkeys(params))], False)[0]
    return list(
        zip(
            describe_all([(f"parameter {i}", param) for i, param in enumerate(params)]),
            params,
            strict=True,
        )
    )


def _squares(bound: Sequence[tuple[ShardBinding, Tensor]]) -> list[Tensor]:
    """Squared norms, float64 0-d, of what each set of ranks shares: one packed sum per process
    group.
    """
    sums: dict[tuple[int, int], tuple[ShardBinding, list[Tensor]]] = {}
    for binding, param in bound:
        sums.setdefault((id(binding.holders), binding.replicas), (binding, []))[1].append(
            _square(param.grad, param)
        )
    results: list[Tensor] = []
    by_group: dict[int, tuple[Any, list[Tensor]]] = {}
    for binding, parts in sums.values():
        total = (
            torch.stack([part.to(parts[0].device) for part in parts]).sum()[None] / binding.replicas
        )
        if binding.holders is None:
            results.append(total[0])
        else:
            by_group.setdefault(id(binding.holders), (binding.holders, []))[1].append(total)
    buffers: list[Any] = [(group, torch.cat(totals)) for group, totals in by_group.values()]
    comm.serve([buffers])
    return results + [buffer.sum() for _, buffer in buffers]


def _square(grad: Tensor | None, param: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros((), dtype=torch.float64, device=param.device)
    norm: Tensor = torch.linalg.vector_norm(local_tensor(grad), dtype=torch.float64)
    return norm.square()


def _settle(bound: Sequence[tuple[ShardBinding, Tensor]]) -> list[Tensor]:
    """Give all parameters gradients that lie as they do (modified in place), whole ones their mean,
    also on ranks that had none.

    Returns:
        The whole parameters that have a mean gradient now.
    """
    settled: Settled = comm.serve(settle(bound))
    for _, param in bound:
        grad: Any = settled.sums.get(id(param), param.grad)
        if grad is not None and is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
        param.grad = grad
    averaged = []
    for param in (param for binding, param in bound if binding.unreduced):
        if param.grad is not None or bool(settled.present[id(param)]):
            param.grad = settled.means[id(param)].view(param.shape)
            averaged.append(param)
    return averaged
