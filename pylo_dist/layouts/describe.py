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
    if any(plain.is_dtensor(param) for _, param in named):
        return dtensor.describe(named, settings)
    if any(fsdp1.is_flattened(param) for _, param in named):
        return fsdp1.describe(named, settings)
    return [plain.describe(fqn, param) for fqn, param in named]


def domain_of(params: Sequence[Any]) -> tuple[int, ...]:
    """The ranks that hold parts of these parameters, rising; () where each rank holds all."""
    sharded = [("", param) for param in params if plain.is_dtensor(param)]
    if sharded:
        return dtensor.domain_of(sharded)
    return fsdp1.domain_of(params) if any(map(fsdp1.is_flattened, params)) else ()
