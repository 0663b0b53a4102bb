"""Newton-Schulz on many matrices: those of equal shape in one batched product. Writes the matrices
it is handed.

All results have rms 1. A matrix much longer than wide goes through its Gram matrix
(`gram.is_slender`), wherever it lies.

A batch holds at most `MOST_CPU` or `MOST_GPU` elements, or one matrix. Beside the matrices
themselves a call needs five times a batch, and through Gram matrices, which are float64, six times:
400 MB for float32 on a GPU. The last bits of a product may depend on how many matrices are in its
batch, so copies of a matrix on several ranks must be batched with the same others: callers give a
call only matrices that the same ranks share.

Legend: B matrices of a batch, R rows and C columns of each; in the Gram way of slender ones X as
`gram` has it, on its side where it is tall, so that R <= C. N local elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.shards import TensorShard
from . import gram, reference, stacks

# added to the mean square of the step (and, where that scales it, of the parameter)
EPS_STEP = 1e-9
MOST_CPU = 1 << 20
MOST_GPU = 1 << 24


def most_elements(device: torch.device) -> int:
    """How many elements of matrices may be in a batch."""
    return MOST_CPU if device.type == "cpu" else MOST_GPU


@dataclass(frozen=True, slots=True)
class NewtonSchulz:
    """The iteration and its numbers, see `reference.newton_schulz`."""

    coefficients: tuple[float, float, float]
    iterations: int
    eps: float

    def whole_(self, tensors: Sequence[Tensor]) -> None:
        """Every matrix of contiguous tensors (..., R, C) to its iterate at rms 1 (modified in
        place).
        """
        slender = [x for x in tensors if gram.is_slender(tuple(x.shape)) and x.numel()]
        shards = [TensorShard.whole("", tuple(x.shape)) for x in slender]
        locals_ = [x.view(-1) for x in slender]
        sizes = [min(x.shape) ** 2 for x in slender]
        device = tensors[0].device if tensors else None
        sums = (
            torch.empty(sum(sizes), dtype=torch.float64, device=device).split(sizes)
            if sizes
            else ()
        )
        self.gram_sums(locals_, shards, sums)
        self.through_gram_(locals_, shards, sums)
        pieces: list[Tensor] = []  # (B, R, C) of each other tensor, as many matrices as may be
        for x in tensors:
            if not gram.is_slender(tuple(x.shape)) and x.numel():
                size = x.shape[-2] * x.shape[-1]
                pieces += x.view(-1, *x.shape[-2:]).split(max(1, most_elements(x.device) // size))
        for members in _batches(pieces):
            own = [pieces[i] for i in members]
            batch_BRC = own[0] if len(own) == 1 else torch.cat(own)
            s_BRC = reference.newton_schulz(batch_BRC, self.coefficients, self.iterations, self.eps)
            square = torch.linalg.vector_norm(
                s_BRC, dim=(-2, -1), keepdim=True, dtype=torch.float64
            ).square_()
            s_BRC.mul_((square / s_BRC[0].numel() + EPS_STEP).rsqrt_().to(s_BRC.dtype))
            torch._foreach_copy_(own, list(s_BRC.split([len(x) for x in own])))

    def gram_sums(
        self, locals_: Sequence[Tensor], shards: Sequence[TensorShard], sums: Sequence[Tensor]
    ) -> None:
        """X X^T of the local elements (N,) of every slender matrix, into `sums`, float64 (R * R,)
        each (modified in place).
        """
        views = _contiguous(locals_, shards)
        for members in _batches(views):
            batch = stacks.stacked([views[i] for i in members])
            x_BRC = batch.mT if _is_tall(shards[members[0]]) else batch
            torch._foreach_copy_(
                [sums[i] for i in members], list(gram.gram_matrix(x_BRC).flatten(1).unbind())
            )

    def through_gram_(
        self, locals_: Sequence[Tensor], shards: Sequence[TensorShard], sums: Sequence[Tensor]
    ) -> None:
        """Local elements (N,) of slender matrices to their iterates at rms 1, from X X^T (`locals_`
        are modified in place).
        """
        views = _contiguous(locals_, shards)
        for members in _batches(views):
            shard = shards[members[0]]
            rows = min(shard.shape)
            grams_BRR = stacks.stacked([sums[i].view(rows, rows) for i in members])
            q_BRR, square = gram.newton_schulz_factor(
                grams_BRR, self.coefficients, self.iterations, self.eps
            )
            by = (square / shard.global_numel + EPS_STEP).rsqrt()
            own = [views[i] for i in members]
            batch = stacks.stacked(own)
            q_BRR = (q_BRR * by[:, None, None]).to(batch.dtype)
            moved = batch @ q_BRR.mT if _is_tall(shard) else q_BRR @ batch
            torch._foreach_copy_(own, list(moved.unbind()))


def _batches(views: Sequence[Tensor]) -> list[list[int]]:
    """Which of them go into one batch: equal matrices, of equal dtype, as many as its bound
    allows.
    """
    entries = [(i, (x.shape[-2:], x.dtype), x.numel()) for i, x in enumerate(views)]
    return stacks.equal(entries, most_elements(views[0].device)) if views else []


def _is_tall(shard: TensorShard) -> bool:
    return shard.shape[0] >= shard.shape[1]


def _contiguous(locals_: Sequence[Tensor], shards: Sequence[TensorShard]) -> list[Tensor]:
    """Views of the local elements as they lie in memory: X^T (local C, R) of tall matrices, X (R,
    local C) of wide ones.
    """
    slices = (gram.local_slices(x, shard) for x, shard in zip(locals_, shards, strict=True))
    return [x.mT if _is_tall(shard) else x for x, shard in zip(slices, shards, strict=True)]
