"""Settings of every rule for virtual ranks, the golden problem that they step, and cuts of a tensor
at random.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pylo_dist
from pylo_dist.core.shards import TensorShard
from support.golden import celo2_weights, load, small_fc_weights, velo_weights

STEPS = 20
SMALL_FC = small_fc_weights(load("small_fc_f32"))


@dataclass(frozen=True)
class Setting:
    """A rule and its arguments; every one is run on 9 tensors x 4 numbers of ranks x `rounds`
    random cuts (2 in float64).
    """

    optimizer_class: type[pylo_dist.LearnedOptimizer]
    rounds: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    exchanges: int = 0
    share32: float = 1e-5  # of the largest one-step change, the layout tolerance in float32
    share64: float = 1e-12


CELO2 = celo2_weights(load("celo2_default_f64"))
BASE = {
    "weights": CELO2,
    "orthogonalize": False,
    "exp_mult": 0.1,
    "param_scale_mult": True,
    "embedding_pattern": "t1",
}
SETTINGS = {
    "adafac": Setting(pylo_dist.AdafacLO, 6, {"weights": SMALL_FC, "weight_decay": 0.01}),
    "adafac_clipped": Setting(pylo_dist.AdafacLO, 2, {"weights": SMALL_FC, "max_grad_norm": 1.0}),
    "mulo": Setting(
        pylo_dist.MuLO, 6, {"weights": SMALL_FC, "width_mults": {"t0": 4.0, "t6": 2.0}}
    ),
    "elo": Setting(
        pylo_dist.ELO, 6, {"weights": SMALL_FC, "weight_decay": 0.1, "clip_grad": True, "lr": 0.003}
    ),
    "velo": Setting(pylo_dist.VeLO, 6, {"weights": velo_weights("small"), "num_steps": 200}),
    "velo_clipped": Setting(
        pylo_dist.VeLO, 2, {"weights": velo_weights("small"), "num_steps": 15, "max_grad_norm": 1.0}
    ),
    # Newton-Schulz drives small singular values towards 1, and with them the last bits of its
    # input: some 1e2 times an ulp
    "celo2": Setting(
        pylo_dist.CELO2, 6, {"weights": CELO2, "embedding_pattern": "t1"}, 2, 5e-5, 1e-12
    ),
    "celo2_base": Setting(pylo_dist.CELO2, 2, {**BASE, "weight_decay": 0.05}),
    "elo_celo2": Setting(pylo_dist.ELO_CELO2, 6, {"weights": CELO2}, 2, 5e-5, 1e-12),
}


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
