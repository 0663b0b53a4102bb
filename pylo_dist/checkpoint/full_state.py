"""Whole copies of sharded state, for torch.save and for torch's functions. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import comm
from ..core.pieces import ShardBinding, bound_shard
from ..layouts.describe import domain_of
from ..layouts.plain import is_dtensor
from ..optimizer.sharded_state import ShardedState, whole_tensor


def full_state_dict(optimizer: torch.optim.Optimizer, *, rank0_only: bool = True) -> dict[str, Any]:
    """The state dict with whole tensors in host memory, e.g. for torch.save. All ranks that share
    the parameters call it alike.

    `load_state_dict` of any layout takes it, and `torch.load(..., weights_only=True)` reads it
    back. Memory on the way: one state tensor at a time on the device.

    Args:
        rank0_only: give it to the first of these ranks only, and {} to the others.
    """
    return _gathered(optimizer.state_dict(), optimizer, rank0_only, cpu=True)


def get_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, options: Any = None
) -> dict[str, Any]:
    """torch.distributed.checkpoint.state_dict's function of this name, which also gathers what
    ZeroOptimizer has sharded.

    Without `full_state_dict` torch's own does as well, and its set_optimizer_state_dict serves
    every layout. Before the first step both step an optimizer of torch with zero gradients, which
    counts; `full_state_dict` does not, and learned optimizers have their state when they are built.

    Args:
        options: a StateDictOptions. With `full_state_dict` tensors are whole on every rank; with
            `cpu_offload` too, on the first of the ranks only and {} elsewhere, as in torch.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict as get

    options = options or StateDictOptions()
    if not (options.full_state_dict and _bindings(optimizer)):
        return get(model, optimizer, options=options)
    state = get(
        model, optimizer, options=replace(options, full_state_dict=False, cpu_offload=False)
    )
    return _gathered(state, optimizer, options.cpu_offload, options.cpu_offload)


def _bindings(optimizer: torch.optim.Optimizer) -> dict[str, ShardBinding]:
    """The parameters of which this rank has a piece, by name."""
    bound = [bound_shard(param) for group in optimizer.param_groups for param in group["params"]]
    return {binding.shard.fqn: binding for binding in bound if binding is not None}


def _is_first(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this is the first of the ranks that share the parameters; where none are shared, of
    those that average the loss.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    holders = next((b.holders for b in _bindings(optimizer).values()), None)
    if holders is not None:
        return comm.rank(holders) == 0
    group = comm.default_group()
    domain = domain_of(params)
    if domain:
        return comm.rank(group) == domain[0]
    given = getattr(optimizer, "process_group", None)
    return given is False or comm.rank(given or group) == 0


@torch.no_grad()
def _gathered(
    tree: dict[str, Any], optimizer: torch.optim.Optimizer, rank0_only: bool, cpu: bool
) -> dict[str, Any]:
    bindings = _bindings(optimizer)
    wanted = not rank0_only or _is_first(optimizer)

    def whole(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: whole(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [whole(entry) for entry in value]
        if isinstance(value, ShardedState):
            value = whole_tensor(value, bindings[value.shard.fqn], wanted)
        elif is_dtensor(value):
            value = value.full_tensor()
        if isinstance(value, Tensor) and wanted:
            return value.detach().to("cpu" if cpu else value.device, copy=True)
        return value

    result: dict[str, Any] = whole(tree)
    return result if wanted else {}
