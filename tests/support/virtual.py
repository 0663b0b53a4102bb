"""Every optimizer for virtual ranks, the golden problem that they step, and cuts of a tensor at
random.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pylo_dist.core.shards import TensorShard
from support.golden import load
from support.optimizers import VARIANTS, Roles, cases

STEPS = 20
ROLES = Roles(widths={"t0": 4.0, "t6": 2.0}, embedding="t1")
SETTINGS = cases(ROLES, VARIANTS)
COMPILED = cases(ROLES, VARIANTS, able="kernels")


def golden_problem(
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], list[dict[str, Tensor | None]], list[float]]:
    """Golden parameters, gradients and losses; the 12 golden steps continued with them again."""
    file = load("velo_small_f32")
    params = {f"t{i}": torch.tensor(file[f"t{i}.p0"]).to(dtype) for i in range(9)}
    grads: list[dict[str, Tensor | None]] = [
        {f"t{i}": torch.tensor(file[f"t{i}.g"][t % 12]).to(dtype) for i in range(9)}
        for t in range(STEPS)
    ]
    grads[3]["t6"] = None  # no rank has a gradient for it
    return params, grads, [float(file["losses"][t % 12]) for t in range(STEPS)]


def random_shards(
    rng: random.Random, fqn: str, shape: tuple[int, ...], ranks: int
) -> list[TensorShard]:
    total = int(np.prod(shape, dtype=int))
    kind = rng.choice(["flat", "flat", "single", "shard", "grid"])
    if kind == "shard" and shape:
        dim = rng.randrange(len(shape))
        points = sorted(rng.choices(range(shape[dim] + 1), k=ranks - 1))
        return [
            TensorShard.block(fqn, shape, dim, a, b) for a, b in pairwise([0, *points, shape[dim]])
        ]
    if kind == "grid" and len(shape) >= 2 and ranks % 2 == 0:
        dim = rng.randrange(1, len(shape))
        middle = rng.randrange(shape[dim] + 1)
        points = sorted(rng.choices(range(shape[0] + 1), k=ranks // 2 - 1))
        rows = list(pairwise([0, *points, shape[0]]))
        return [
            TensorShard.block(fqn, shape, dim, a, b, r)
            for a, b in ((0, middle), (middle, shape[dim]))
            for r in rows
        ]
    if kind == "single" and total:
        at = rng.randrange(total)
        points = sorted([at, at + 1, *rng.choices(range(total + 1), k=ranks)][: ranks - 1])
    else:
        points = sorted(rng.choices(range(total + 1), k=ranks - 1))
    return [TensorShard.interval(fqn, shape, a, b) for a, b in pairwise([0, *points, total])]
