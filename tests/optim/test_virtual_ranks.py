"""Tensors cut anywhere give the same step, for every rule.

Every cross-element quantity of a rule is a sum of per-rank partial sums, so any cut of any tensor must reproduce the uncut run to
the layout tolerance. The cuts here are random: mid-row, one element, empty shards, and the pitched boxes of Shard(k) and of
Shard(k) cut again on dimension 0.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import celo2_weights, load, small_fc_weights, velo_weights
from torch import Tensor

import pylo_dist
from pylo_dist.core.shards import TensorShard
from pylo_dist.testing import largest_changes, layout_error, run_virtual

RANKS = (2, 3, 5, 8)
STEPS = 20
SMALL_FC = small_fc_weights(load("small_fc_f32"))


@dataclass(frozen=True)
class Setting:
    """A rule and its arguments; every one is run on 9 tensors x 4 numbers of ranks x `rounds` random cuts (2 in float64)."""

    optimizer_class: type[pylo_dist.LearnedOptimizer]
    rounds: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    exchanges: int = 0
    share32: float = 1e-5  # of the largest one-step change, the layout tolerance in float32
    share64: float = 1e-12


CELO2 = celo2_weights(load("celo2_default_f64"))
BASE = {"weights": CELO2, "orthogonalize": False, "exp_mult": 0.1, "param_scale_mult": True, "embedding_pattern": "t1"}
SETTINGS = {
    "adafac": Setting(pylo_dist.AdafacLO, 6, {"weights": SMALL_FC, "weight_decay": 0.01}),
    "adafac_clipped": Setting(pylo_dist.AdafacLO, 2, {"weights": SMALL_FC, "max_grad_norm": 1.0}),
    "mulo": Setting(pylo_dist.MuLO, 6, {"weights": SMALL_FC, "width_mults": {"t0": 4.0, "t6": 2.0}}),
    "elo": Setting(pylo_dist.ELO, 6, {"weights": SMALL_FC, "weight_decay": 0.1, "clip_grad": True, "lr": 0.003}),
    "velo": Setting(pylo_dist.VeLO, 6, {"weights": velo_weights("small"), "num_steps": 200}),
    "velo_clipped": Setting(pylo_dist.VeLO, 2, {"weights": velo_weights("small"), "num_steps": 15, "max_grad_norm": 1.0}),
    # Newton-Schulz drives small singular values towards 1, and with them the last bits of its input: some 1e2 times an ulp
    "celo2": Setting(pylo_dist.CELO2, 6, {"weights": CELO2, "embedding_pattern": "t1"}, 2, 5e-5, 1e-12),
    "celo2_base": Setting(pylo_dist.CELO2, 2, {**BASE, "weight_decay": 0.05}),
    "elo_celo2": Setting(pylo_dist.ELO_CELO2, 6, {"weights": CELO2}, 2, 5e-5, 1e-12),
}


def golden_problem(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor | None]], list[float]]:
    """Golden parameters, gradients and losses; the 12 golden steps continued with them again."""
    file = load("velo_small_f32")
    params = {f"t{i}": torch.tensor(file[f"t{i}.p0"]).to(dtype) for i in range(9)}
    grads: list[dict[str, Tensor | None]] = [
        {f"t{i}": torch.tensor(file[f"t{i}.g"][t % 12]).to(dtype) for i in range(9)} for t in range(STEPS)
    ]
    grads[3]["t6"] = None  # no rank has a gradient for it
    return params, grads, [float(file["losses"][t % 12]) for t in range(STEPS)]


def random_shards(rng: random.Random, fqn: str, shape: tuple[int, ...], ranks: int) -> list[TensorShard]:
    total = int(np.prod(shape, dtype=int))
    kind = rng.choice(["flat", "flat", "single", "shard", "grid"])
    if kind == "shard" and shape:
        dim = rng.randrange(len(shape))
        points = sorted(rng.choices(range(shape[dim] + 1), k=ranks - 1))
        return [TensorShard.block(fqn, shape, dim, a, b) for a, b in pairwise([0, *points, shape[dim]])]
    if kind == "grid" and len(shape) >= 2 and ranks % 2 == 0:
        dim = rng.randrange(1, len(shape))
        middle = rng.randrange(shape[dim] + 1)
        points = sorted(rng.choices(range(shape[0] + 1), k=ranks // 2 - 1))
        rows = list(pairwise([0, *points, shape[0]]))
        return [TensorShard.block(fqn, shape, dim, a, b, r) for a, b in ((0, middle), (middle, shape[dim])) for r in rows]
    if kind == "single" and total:
        at = rng.randrange(total)
        points = sorted([at, at + 1, *rng.choices(range(total + 1), k=ranks)][: ranks - 1])
    else:
        points = sorted(rng.choices(range(total + 1), k=ranks - 1))
    return [TensorShard.interval(fqn, shape, a, b) for a, b in pairwise([0, *points, total])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SETTINGS)
def test_any_cut_is_the_uncut_run(name: str, dtype: torch.dtype, figures: list[str]) -> None:
    setting = SETTINGS[name]
    params, grads, losses = golden_problem(dtype)
    uncut = run_virtual(setting.optimizer_class, params, 1, grads, losses=losses, **setting.kwargs)
    change = largest_changes([params, *uncut.history])
    share = setting.share32 if dtype == torch.float32 else setting.share64
    rng = random.Random(0)
    worst, worst_state, cuts, empty = 0.0, 0.0, 0, 0
    rounds = setting.rounds if dtype == torch.float32 or name == "adafac" else 2
    for ranks in RANKS * rounds:
        shards = {fqn: random_shards(rng, fqn, tuple(p.shape), ranks) for fqn, p in params.items()}
        run = run_virtual(setting.optimizer_class, params, shards, grads, losses=losses, **setting.kwargs)
        # a cut into whole slices may be worth a Gram matrix, which is one more sum
        through_gram = any("gram" in row["rule"] for row in run.optimizers[0].report())
        assert run.reductions == [3 if name == "celo2_base" or through_gram else 2] * STEPS
        assert run.exchanges == [setting.exchanges] * STEPS
        cuts += len(shards)
        empty += sum(s.numel == 0 for pieces in shards.values() for s in pieces)
        worst = max(worst, *layout_error(run.params, uncut.params, change, share).values())
        for fqn in params:
            # a state element is an average of g or g^2, or an LSTM's: measured by the largest of its tensor
            largest = {key: s.abs().max() for key, s in uncut.state[fqn].items()}
            worst_state = max(worst_state, *layout_error(run.state[fqn], uncut.state[fqn], largest).values())
    assert cuts == 9 * 4 * rounds
    assert empty > 0
    assert worst <= 1.0, worst
    assert worst_state <= 1.0, worst_state
    figures.append(
        f"virtual ranks | {name} {str(dtype)[6:]} | {cuts} cuts of 2 to 8 ranks, {STEPS} steps | "
        f"{worst:.2g} of the layout tolerance, state {worst_state:.2g}"
    )


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", ["adafac", "velo", "celo2"])
def test_two_reductions_for_any_number_of_tensors(name: str, ranks: int) -> None:
    setting = SETTINGS[name]
    for tensors in (1, 10, 300):
        params = {f"p{i}": torch.randn(5) if i % 2 else torch.randn(3, 4) for i in range(tensors)}
        grads = [{fqn: torch.randn_like(p) for fqn, p in params.items()} for _ in range(2)]
        run = run_virtual(setting.optimizer_class, params, ranks, grads, losses=[1.0, 0.9], **setting.kwargs)
        assert run.reductions == [2, 2]


def test_cuts_that_do_not_tile_are_refused() -> None:
    shards = [TensorShard.interval("w", (4, 4), 0, 9), TensorShard.interval("w", (4, 4), 8, 16)]
    with pytest.raises(ValueError, match=r"'w'.*exactly once"):
        run_virtual(pylo_dist.AdafacLO, {"w": torch.zeros(4, 4)}, {"w": shards}, [], weights=SMALL_FC)
