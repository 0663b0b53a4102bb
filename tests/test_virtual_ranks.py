"""Tensors cut anywhere give the same step.

Every cross-element quantity of a rule is a sum of per-rank partial sums, so any cut of any tensor must reproduce the uncut run to
the layout tolerance. The cuts here are random: mid-row, one element, empty shards, and the pitched boxes of Shard(k) and of
Shard(k) cut again on dimension 0.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor

import pylo_dist
from pylo_dist.shards import TensorShard
from pylo_dist.testing import largest_changes, layout_error, run_virtual

RANKS = (2, 3, 5, 8)
STEPS = 20


def golden_problem(dtype: torch.dtype) -> tuple[dict[str, Tensor], list[dict[str, Tensor | None]]]:
    """Golden parameters and gradients; the 12 golden steps continued with them again."""
    with np.load(GOLDEN / "small_fc_f32.npz") as file:
        params = {f"t{i}": torch.tensor(file[f"t{i}.p0"]).to(dtype) for i in range(9)}
        grads = [{f"t{i}": torch.tensor(file[f"t{i}.g"][t % 12]).to(dtype) for i in range(9)} for t in range(STEPS)]
    return params, grads


def random_shards(rng: random.Random, fqn: str, shape: tuple[int, ...], ranks: int) -> list[TensorShard]:
    total = int(np.prod(shape, dtype=int))
    kind = rng.choice(["flat", "flat", "single", "shard", "grid"])
    if kind == "shard" and shape:
        dim = rng.randrange(len(shape))
        points = sorted(rng.choices(range(shape[dim] + 1), k=ranks - 1))
        return [TensorShard.block(fqn, shape, dim, a, b) for a, b in zip([0, *points], [*points, shape[dim]], strict=True)]
    if kind == "grid" and len(shape) >= 2 and ranks % 2 == 0:
        dim = rng.randrange(1, len(shape))
        middle = rng.randrange(shape[dim] + 1)
        points = sorted(rng.choices(range(shape[0] + 1), k=ranks // 2 - 1))
        bounds = list(zip([0, *points], [*points, shape[0]], strict=True))
        return [TensorShard.block(fqn, shape, dim, a, b, rows) for a, b in ((0, middle), (middle, shape[dim])) for rows in bounds]
    if kind == "single" and total:
        at = rng.randrange(total)
        points = sorted([at, at + 1, *rng.choices(range(total + 1), k=ranks)][: ranks - 1])
    else:
        points = sorted(rng.choices(range(total + 1), k=ranks - 1))
    bounds = [0, *points, total]
    return [TensorShard.interval(fqn, shape, a, b) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["unclipped", "clipped"])
def test_any_cut_is_the_uncut_run(
    dtype: torch.dtype, clip: float | None, golden_weights: dict[str, Tensor], figures: list[str]
) -> None:
    params, grads = golden_problem(dtype)
    kwargs = {"weights": golden_weights, "max_grad_norm": clip, "weight_decay": 0.01}
    uncut = run_virtual(pylo_dist.AdafacLO, params, 1, grads, **kwargs)
    change = largest_changes([params, *uncut.history])
    rng = random.Random(0)
    worst, worst_state, cuts, empty = 0.0, 0.0, 0, 0
    rounds = 6 if clip is None else 2
    for ranks in (1, *RANKS * rounds):
        shards = {fqn: random_shards(rng, fqn, tuple(p.shape), ranks) for fqn, p in params.items()}
        run = run_virtual(pylo_dist.AdafacLO, params, shards, grads, **kwargs)
        assert run.reductions == [2] * STEPS
        cuts += len(shards) if ranks > 1 else 0
        empty += sum(s.numel == 0 for pieces in shards.values() for s in pieces)
        worst = max(worst, *layout_error(run.params, uncut.params, change).values())
        for fqn in params:
            # a state element is an average of g or g^2: bounded by units in its last place, as every step rounds once
            largest = {name: s.abs().max() for name, s in uncut.state[fqn].items()}
            worst_state = max(worst_state, *layout_error(run.state[fqn], uncut.state[fqn], largest).values())
    assert cuts >= (200 if clip is None else 70)
    assert empty > 0
    assert worst <= 1.0, worst
    assert worst_state <= 1.0, worst_state
    figures.append(
        f"virtual ranks {str(dtype)[6:]}, clip {clip}: {cuts} cuts of 1 to 8 ranks, {STEPS} steps: "
        f"{worst:.2f} of the layout tolerance, state {worst_state:.2f}"
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_two_reductions_for_any_number_of_tensors(ranks: int, golden_weights: dict[str, Tensor]) -> None:
    for tensors in (1, 10, 300):
        params = {f"p{i}": torch.randn(3, 4) if i % 2 else torch.randn(5) for i in range(tensors)}
        grads = [{fqn: torch.randn_like(p) for fqn, p in params.items()} for _ in range(2)]
        run = run_virtual(pylo_dist.AdafacLO, params, ranks, grads, weights=golden_weights)
        assert run.reductions == [2, 2]


def test_cuts_that_do_not_tile_are_refused(golden_weights: dict[str, Tensor]) -> None:
    shards = [TensorShard.interval("w", (4, 4), 0, 9), TensorShard.interval("w", (4, 4), 8, 16)]
    with pytest.raises(ValueError, match=r"'w'.*exactly once"):
        run_virtual(pylo_dist.AdafacLO, {"w": torch.zeros(4, 4)}, {"w": shards}, [], weights=golden_weights)
