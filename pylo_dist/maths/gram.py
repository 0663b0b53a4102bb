"""Newton-Schulz on slender matrices, through their Gram matrix; such a matrix may stay sharded
along its longer side. Writes nothing.

With X (R, C), R <= C, all iterates are polynomials of G = X X^T times X: one sum of R x R numbers
over the ranks, then every rank runs the chain on R x R matrices and multiplies its own columns. The
chain is in float64: float32 would be off by up to 2e-4.

Legend: B matrices; R rows and C columns of X, a tall matrix on its side; of a sharded one C are the
local columns. N local elements, n those of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.shards import Shape, TensorShard

# what a device computes in float32 while a byte leaves it; an H200 on NVLink is near it
FLOPS_PER_BYTE = 100.0
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
    """(R, local C) if the shard of a 2-D tensor is whole columns of X, as empty ones are, else
    None.
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

    Per rank, of P, for n float32 elements, in bytes sent plus operations / FLOPS_PER_BYTE:

        owner  2 * 4 n / P                       bytes, there and back
               iterations * (4 R n + 2 R^3) / P  operations (the matrices are dealt evenly)
        Gram   2 * 8 R^2 + LATENCY_BYTES         bytes of an all-reduce in float64, on top of the
                                                 exchange of others
               2 R n / P + iterations * 6 R^3    float64 operations, the chain on every rank
               2 R n / P                         operations, applying the result

    A shard that is not whole columns of X leaves only the owner, as does a matrix that is not
    slender.
    """
    if len(peers) < 2 or not is_slender(shape) or any(columns_of(shard) is None for shard in peers):
        return False
    ranks, rows, numel = len(peers), min(shape), shape[0] * shape[1]
    applied = 2.0 * rows * numel / ranks
    owner_flops = iterations * (4.0 * rows * numel + 2.0 * rows**3) / ranks
    gram_flops = FLOAT64_COST * (applied + iterations * 6.0 * rows**3) + applied
    return (
        LATENCY_BYTES + 16.0 * rows * rows + gram_flops / FLOPS_PER_BYTE
        < 8.0 * numel / ranks + owner_flops / FLOPS_PER_BYTE
    )


def local_slices(local: Tensor, shard: TensorShard) -> Tensor:
    """The local elements (N,) as X (R, local C), a view."""
    rows, columns = min(shard.shape), shard.numel // max(1, min(shard.shape))
    if shard.shape[0] >= shard.shape[1]:
        return local.view(columns, rows).mT
    return local.view(rows, columns)


def gram_matrix(x_BRC: Tensor) -> Tensor:
    """X X^T of the local columns X (..., R, C), (..., R, R) float64."""
    rows, columns = x_BRC.shape[-2:]
    total_BRR = torch.zeros((*x_BRC.shape[:-1], rows), dtype=torch.float64, device=x_BRC.device)
    for part_BRC in x_BRC.split(max(1, CHUNK * columns // max(1, x_BRC.numel())), dim=-1):
        wide_BRC = part_BRC.to(torch.float64)
        total_BRR += wide_BRC @ wide_BRC.mT
    return total_BRR


def newton_schulz_factor(
    gram_BRR: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(Q, square): Newton-Schulz of X is Q X, and the sum of its squares (...,), from G = X X^T
    (..., R, R) float64.

    Q <- P Q and A <- P A P with P = c0 + c1 A + c2 A A, from A = G / (|X| + eps)^2 and
    Q = 1 / (|X| + eps).
    """
    c0, c1, c2 = coefficients
    shape, gram_BRR = gram_BRR.shape, gram_BRR.reshape(-1, *gram_BRR.shape[-2:])
    scale = 1.0 / (_trace(gram_BRR).sqrt() + eps)[:, None, None]
    a_BRR = gram_BRR * scale.square()
    identity = torch.eye(shape[-1], dtype=gram_BRR.dtype, device=gram_BRR.device)
    q_BRR = identity * scale
    for _ in range(iterations):
        p_BRR = torch.baddbmm(torch.add(c0 * identity, a_BRR, alpha=c1), a_BRR, a_BRR, alpha=c2)
        q_BRR = p_BRR @ q_BRR
        a_BRR = p_BRR @ a_BRR @ p_BRR
    return q_BRR.view(shape), _trace(a_BRR).view(shape[:-2])


def _trace(x_BRR: Tensor) -> Tensor:
    return x_BRR.diagonal(dim1=-2, dim2=-1).sum(-1)
