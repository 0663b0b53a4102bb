"""Tensors of equal size as one: which go together, into one tensor and back. Writes the tensors it is handed.

What has no compiled pass is done on stacks, so that a step on hundreds of small tensors takes as many operations as there are
sizes. A stack holds at most `most_elements`, which bounds its memory; a larger tensor is a stack of its own, and no copy.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

MOST_CPU = 1 << 16  # a stack and what is computed from it stay in the second-level cache
MOST_GPU = 1 << 22  # with a dozen numbers per element below 256 MB


def most_elements(device: torch.device) -> int:
    """How many elements may go together."""
    return MOST_CPU if device.type == "cpu" else MOST_GPU


def equal(entries: Iterable[tuple[int, Hashable, int]], most: int) -> list[list[int]]:
    """The numbers of (number, key, elements), those of one key together, in order, with at most `most` elements or alone."""
    found: list[list[int]] = []
    last: dict[Hashable, tuple[list[int], int]] = {}
    for number, key, elements in entries:
        members, filled = last.get(key, ([], 0))
        if not members or filled + elements > most:
            members, filled = [], 0
            found.append(members)
        members.append(number)
        last[key] = (members, filled + elements)
    return found


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as (number, *shape); a view where there is one, else a copy."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def scatter(stack: Tensor, tensors: Sequence[Tensor]) -> None:
    """Bring (number, *shape) back to where `gather` took it from (the tensors are modified in place)."""
    if len(tensors) > 1:
        torch._foreach_copy_(list(tensors), list(stack.unbind()))
