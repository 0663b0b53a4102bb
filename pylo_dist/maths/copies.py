"""Tensors copied to their places, with the least and the largest number of each noted in the same
reading. Writes the places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import compiled


def serves(sources: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether there is a kernel that copies these, all of one device, to places of this dtype."""
    return (
        bool(sources)
        and compiled.enabled()
        and {dtype, *(source.dtype for source in sources)} <= {*compiled.DTYPES}
        and not compiled.missing(sources[0].device)
        and not any(map(Tensor.is_neg, sources))
    )


def copy_with_ends(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Tensor:
    """targets[i] <- sources[i], of the same shape (modified in place), where a kernel serves.

    Args:
        targets: none of them empty, of 1 or 2 dims, the numbers of the last one beside each other;
            sources likewise.

    Returns:
        float32 (len, 2): the least and the largest number of each source, NaN where it holds one.
    """
    # zeros, and a row more: what a GPU counts in
    ends = torch.zeros(len(targets) + 1, 2, dtype=torch.float32, device=targets[0].device)
    torch.ops.pylo_dist.copy_pass(list(targets), list(sources), ends)
    return ends[:-1]
