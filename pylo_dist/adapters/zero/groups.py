"""What users give as parameters, as groups of named tensors. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ...layouts.plain import check_param, is_dtensor


def named_groups(model_or_params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    """All groups as `named_group` makes them: of a module one, with its trainable parameters.

    Raises:
        ValueError: there is none, or a parameter is in one twice.
    """
    if isinstance(model_or_params, nn.Module):
        entries: list[Any] = [p for p in model_or_params.named_parameters() if p[1].requires_grad]
        return [named_group(0, {"params": entries})]
    entries = list(model_or_params)
    if not entries:
        raise ValueError("optimizer got an empty parameter list")
    groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
    return [named_group(i, group) for i, group in enumerate(groups)]


def named_group(i: int, group: dict[str, Any]) -> dict[str, Any]:
    """Group number i with its trainable parameters as (fqn, tensor) pairs.

    Raises:
        ValueError: a parameter is in it twice.
    """
    entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    named = [
        entry if isinstance(entry, tuple) else (f"group{i}.{j}", entry)
        for j, entry in enumerate(entries)
    ]
    seen: set[int] = set()
    for fqn, param in named:
        if id(param) in seen:
            raise ValueError(f"{fqn!r} is in the same group twice; list a tied parameter once")
        seen.add(id(param))
    return {**group, "params": [(fqn, param) for fqn, param in named if param.requires_grad]}


def check_params(groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a parameter that cannot be sharded, or where there is none at all."""
    named = [pair for group in groups for pair in group["params"]]
    if not named:
        raise ValueError("there is no trainable parameter (requires_grad=True) to optimize")
    for fqn, param in named:
        check_param(fqn, param)
        if is_dtensor(param):
            raise ValueError(
                f"{fqn!r} is a DTensor (fully_shard, tensor parallelism), which is sharded "
                "already: give the parameters to the optimizer itself; ZeroOptimizer shards whole "
                "parameters"
            )
