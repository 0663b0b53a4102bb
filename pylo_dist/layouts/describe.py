"""Where the elements of an optimizer's parameters lie, whoever sharded them: asks the file of that
layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.pieces import ShardBinding
from . import dtensor, fsdp1, plain


def describe_all(
    named: Sequence[tuple[str, Any]], settings: Sequence[str] = ()
) -> list[ShardBinding]:
    """Where the elements of each parameter lie, and with whom they are shared. The parameters are
    all those of one optimizer. Collective where others hold parts of them.

    Args:
        settings: what else must be the same on all ranks.

    Raises:
        ValueError: a layout that cannot be served, or ranks that disagree; on all of them, by name.
    """
    params = [param for _, param in named]
    sharded, flattened = any(map(plain.is_dtensor, params)), any(map(fsdp1.is_flattened, params))
    if sharded and flattened:
        _check_one_kind(named)
    if sharded:
        return dtensor.describe(named, settings)
    if flattened:
        return fsdp1.describe(named, settings)
    return [plain.describe(fqn, param) for fqn, param in named]


def _check_one_kind(named: Sequence[tuple[str, Any]]) -> None:
    """Raise ValueError for parameters of FSDP1 beside DTensors: each adds its sums over ranks of
    its own, in an order of its own.
    """
    flat = next((fqn for fqn, p in named if fsdp1.is_flattened(p)), None)
    other = next(
        (fqn for fqn, p in named if plain.is_dtensor(p) and not fsdp1.is_flattened(p)), None
    )
    if flat is not None and other is not None:
        raise ValueError(
            f"{flat!r} belongs to FullyShardedDataParallel (FSDP1), {other!r} is a DTensor, "
            "as of fully_shard (FSDP2) or tensor parallelism: give each part an optimizer of its "
            "own, or shard the whole model with fully_shard"
        )


def domain_of(params: Sequence[Any]) -> tuple[int, ...]:
    """The ranks that hold parts of these parameters, rising; () where each rank holds all."""
    sharded = [("", param) for param in params if plain.is_dtensor(param)]
    if sharded:
        return dtensor.domain_of(sharded)
    return fsdp1.domain_of(params) if any(map(fsdp1.is_held, params)) else ()
