"""Tensors copied to their places in one reading, in which the least and the largest number of each
are noted. Writes the places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import compiled

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def copy_with_ends(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor | None:
    """targets[i] <- sources[i], of the same shape (modified in place).

    Args:
        targets: all of one device, not empty, with 1 or 2 dims, neighbours of the last one beside
            each other; sources likewise.

    Returns:
        float32 (len, 2): the least and the largest number of each source, NaN where it holds one;
        None where no kernel serves, and torch has copied them.
    """
    if targets and _served(targets, sources):
        # zeros, and a row more: what a GPU counts in
        ends = torch.zeros(len(targets) + 1, 2, device=targets[0].device)
        torch.ops.pylo_dist.copy_pass(list(targets), list(sources), ends)
        return ends[:-1]
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
    return None


def _served(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    device = targets[0].device
    return (
        compiled.enabled()
        and device.type in ("cpu", "cuda")
        and not compiled.library(device.type)
        and all(x.dtype in DTYPES and x.device == device for x in (*targets, *sources))
        and not any(x.is_neg() for x in sources)
    )
