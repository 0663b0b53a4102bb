"""What users give as parameters, as groups of named tensors. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ...layouts.construction import check_ordered
from ...layouts.fsdp1 import is_flattened
from ...layouts.plain import check_leaf, check_param, held_in, is_dtensor
from ...optimizer import checks

FROZEN = "_pylo_dist_frozen"  # in a group, until it is sharded: its frozen parameters


def named_groups(
    model_or_params: nn.Module | Iterable[Any], module: nn.Module | None = None
) -> list[dict[str, Any]]:
    """All groups as `named_group` makes them: of a module one, with all its parameters.

    Args:
        module: the owner of the parameters, whose names those without one get.

    Raises:
        ValueError: there is none, a parameter is in one twice, or `module` has it not.
        TypeError: they have no order, or it is a single tensor.
    """
    if isinstance(model_or_params, nn.Module):
        if module is not None and module is not model_or_params:
            raise ValueError(
                "module= beside another module; wanted parameters or groups, and the module that "
                "owns them, or that module alone"
            )
        return [named_group(0, {"params": list(model_or_params.named_parameters())})]
    check_ordered(model_or_params)
    entries = checks.parameters(model_or_params, "model_or_params", "a module, parameters")
    check_ordered(entries)
    groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
    if module is not None:
        groups = [_names_of(module, i, group) for i, group in enumerate(groups)]
    return [named_group(i, group) for i, group in enumerate(groups)]


def _names_of(module: nn.Module, i: int, group: dict[str, Any]) -> dict[str, Any]:
    """Group number i with the names that `module` has for those given without."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"module={module!r}: wanted the torch.nn.Module that owns the parameters")
    known = {id(param): fqn for fqn, param in module.named_parameters()}
    named = []
    for j, entry in enumerate(_entries(group)):
        fqn, param = entry if isinstance(entry, tuple) else (None, entry)
        if id(param) not in known:
            raise ValueError(
                f"{fqn or f'parameter {j} of group {i}'!r} is none of module="
                f"{type(module).__name__}; wanted the module that owns all parameters of the groups"
            )
        named.append((fqn or known[id(param)], param))
    return {**group, "params": named}


def _entries(group: dict[str, Any]) -> list[Any]:
    group = checks.group(group)
    return [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])


def named_group(i: int, group: dict[str, Any]) -> dict[str, Any]:
    """Group number i with its trainable parameters as (fqn, tensor) pairs, and so the others under
    FROZEN.

    Raises:
        ValueError: a parameter is in it twice.
        TypeError: they have no order.
    """
    check_ordered([group], i)
    entries = _entries(group)
    named = [
        entry if isinstance(entry, tuple) else (f"group{i}.{j}", entry)
        for j, entry in enumerate(entries)
    ]
    seen: set[int] = set()
    for fqn, param in named:
        if id(param) in seen:
            raise ValueError(f"{fqn!r} is in the same group twice; list a tied parameter once")
        seen.add(id(param))
    return {
        **group,
        "params": [(fqn, param) for fqn, param in named if param.requires_grad],
        FROZEN: [(fqn, param) for fqn, param in named if not param.requires_grad],
    }


def take_frozen(groups: Sequence[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """The frozen parameters of all groups, which have none then (modified in place)."""
    return [pair for group in groups for pair in group.pop(FROZEN, ())]


def check_params(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a parameter that cannot be sharded, or where there is none at all."""
    named = [pair for group in groups for pair in group["params"]]
    if not named:
        raise ValueError("there is no trainable parameter (requires_grad=True) to optimize")
    for fqn, param in named:
        check_leaf(fqn, param)
        check_param(fqn, param)
        if is_dtensor(param) or is_flattened(param):
            kind = "of FullyShardedDataParallel"
            if is_dtensor(param):
                kind = "a DTensor (fully_shard, tensor parallelism)"
            raise ValueError(
                f"{fqn!r} is {kind}, which is sharded already: give the parameters to the "
                "optimizer itself; ZeroOptimizer shards whole parameters"
            )
        if held_in(param):
            raise ValueError(
                f"{fqn!r} is a {type(param).__name__}, whose numbers lie in another tensor: "
                "ZeroOptimizer would put its bucket under the outer one, and steps would reach no "
                "forward pass. Leave out what makes such parameters (torchao: "
                "enable_fsdp_float8_all_gather), or use fully_shard"
            )
