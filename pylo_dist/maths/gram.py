"""Newton-Schulz on slender matrices, through their Gram matrix; such a matrix may stay sharded
along its longer side.

With X (k, l), k <= l, all iterates are polynomials of G = X X^T times X: one sum of k x k numbers
over the ranks, then every rank runs the chain on k x k matrices and multiplies its own columns. The
chain is in float64: float32 would be off by up to 2e-4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.shards import Shape, TensorShard

FLOPS_PER_BYTE = (
    100.0  # what a device computes in float32 while a byte leaves it; an H200 on NVLink is near it
)
# what could be sent in the time that one more dependent collective takes: 20 us at 25 GB/s
LATENCY_BYTES = 500_000.0
FLOAT64_COST = 2.0  # of a float64 operation, in float32 ones


# times longer than wide: a matrix of which every layout takes this way, so that all layouts round
# alike
SLENDER = 4
CHUNK = 1 << 21  # elements in float64 at a time


def is_slender(shape: Shape) -> bool:
    """Whether a matrix goes through its Gram matrix, wherever it lies."""
    return len(shape) == 2 and max(shape) >= SLENDER * min(shape)


def columns_of(shard: TensorShard) -> tuple[int, int] | None:
    """(k, local l) if the shard of a 2-D tensor is whole slices across its shorter side, else None.
    Empty shards are.
    """
    if len(shard.shape) != 2:
        return None
    rows, columns = shard.shape
    if shard.numel == 0:
        return min(rows, columns), 0
    if rows >= columns:  # whole rows
        whole = (
            shard.run == shard.numel and shard.start % columns == 0 and shard.numel % columns == 0
        )
        return (columns, shard.numel // columns) if whole else None
    whole = shard.is_whole or (
        shard.run < shard.numel and shard.numel == rows * shard.run and shard.start < columns
    )
    return (rows, shard.numel // rows) if whole else None


def is_cheaper(shape: Shape, peers: Sequence[TensorShard], iterations: int) -> bool:
    """Whether the Gram way costs a rank less than bringing the matrix to an owner; decided from the
    shards of all ranks.

    Per rank, of R, for a matrix (k, l) of n = k l float32 elements, in bytes sent plus operations /
    FLOPS_PER_BYTE:

        owner  2 * 4 n / R                   bytes, there and back
               iterations * (4 k n + 2 k^3) / R   operations (the matrices are dealt evenly)
        Gram   2 * 8 k^2 + LATENCY_BYTES     bytes of an all-reduce in float64, which comes on top of the exchange of others
               2 k n / R + iterations * 6 k^3     float64 operations, the chain on every rank
               2 k n / R                     operations, applying the result

    A shard that is not whole slices along the longer side leaves only the owner, as does a matrix
    that is not slender.
    """
    if len(peers) < 2 or not is_slender(shape) or any(columns_of(shard) is None for shard in peers):
        return False
    ranks, k, n = len(peers), min(shape), shape[0] * shape[1]
    owner_flops = iterations * (4.0 * k * n + 2.0 * k**3) / ranks
    gram_flops = (
        FLOAT64_COST * (2.0 * k * n / ranks + iterations * 6.0 * k**3) + 2.0 * k * n / ranks
    )
    return (
        LATENCY_BYTES + 16.0 * k * k + gram_flops / FLOPS_PER_BYTE
        < 8.0 * n / ranks + owner_flops / FLOPS_PER_BYTE
    )


def local_slices(local: Tensor, shard: TensorShard) -> Tensor:
    """The local elements (N,) as X (k, local l), a view."""
    rows, columns = shard.shape
    k, length = min(rows, columns), shard.numel // max(1, min(rows, columns))
    return local.view(length, k).mT if rows >= columns else local.view(k, length)


def gram_matrix(x: Tensor) -> Tensor:
    """X X^T of the slices X (..., k, l), (..., k, k) float64."""
    k, length = x.shape[-2:]
    total = torch.zeros((*x.shape[:-1], k), dtype=torch.float64, device=x.device)
    for part in x.split(max(1, CHUNK * length // max(1, x.numel())), dim=-1):
        wide = part.to(torch.float64)
        total += wide @ wide.mT
    return total


def newton_schulz_factor(
    gram: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(Q, square): Newton-Schulz of X is Q X, and the sum of its squares (...,), from G = X X^T
    (..., k, k) float64.
    """
    c0, c1, c2 = coefficients
    shape, gram = gram.shape, gram.reshape(-1, *gram.shape[-2:])
    scale = 1.0 / (_trace(gram).sqrt() + eps)[:, None, None]
    a = gram * scale.square()
    identity = torch.eye(shape[-1], dtype=gram.dtype, device=gram.device)
    q = identity * scale
    for _ in range(iterations):
        p = torch.baddbmm(torch.add(c0 * identity, a, alpha=c1), a, a, alpha=c2)
        q = p @ q
        a = p @ a @ p
    return q.view(shape), _trace(a).view(shape[:-2])


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)
