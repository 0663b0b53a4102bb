"""Tensors cut anywhere give the same step, for every optimizer and each of its variants.

Every cross-element quantity of a rule is a sum of per-rank partial sums, so any cut of any tensor
must reproduce the uncut run to the layout tolerance. The cuts here are random: mid-row, one
element, empty shards, and the pitched boxes of Shard(k) and of Shard(k) cut again on dimension 0.
"""

from __future__ import annotations

import random

import pytest
import torch

import pylo_dist
from pylo_dist.core.shards import TensorShard
from pylo_dist.testing import largest_changes, layout_error, run_virtual
from support.optimizers import OPTIMIZERS, SMALL_FC, Roles
from support.virtual import SETTINGS, STEPS, golden_problem, random_shards

RANKS = (2, 3, 5, 8)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")
        for name, case in SETTINGS.items()
        for dtype in (torch.float32, torch.float64)
        if str(dtype)[6:] not in case.cannot
    ],
)
def test_any_cut_is_the_uncut_run(name: str, dtype: torch.dtype, figures: list[str]) -> None:
    """Where state is kept in bfloat16 its bits do not depend on the cut: a rank rounds an element
    by where that is in the whole tensor.
    """
    case = SETTINGS[name]
    params, grads, losses = golden_problem(dtype)
    uncut = run_virtual(case.face, params, 1, grads, losses=losses, **case.arguments)
    change = largest_changes([params, *uncut.history])
    assert all(float(c) > 0 for c in change.values())
    share = case.share(dtype)
    rng = random.Random(0)
    worst, worst_state, cuts, empty = 0.0, 0.0, 0, 0
    rounds = 1
    of_their_own = name not in ("Celo", "CeloAdam")  # whose passes are VeLO's and PyTorch's
    if dtype == torch.float32 and name in OPTIMIZERS and case.built_in and of_their_own:
        rounds = 3  # by compiled passes, the quick ones
    for ranks in RANKS * rounds:
        shards = {fqn: random_shards(rng, fqn, tuple(p.shape), ranks) for fqn, p in params.items()}
        run = run_virtual(case.face, params, shards, grads, losses=losses, **case.arguments)
        # a cut into whole slices may be worth a Gram matrix, which is one more sum
        through_gram = any("gram" in row["rule"] for row in run.optimizers[0].report())
        assert run.reductions == [3 if through_gram else case.reductions] * STEPS
        assert run.exchanges == [case.exchanges] * STEPS
        cuts += len(shards)
        empty += sum(s.numel == 0 for pieces in shards.values() for s in pieces)
        worst = max(worst, *layout_error(run.params, uncut.params, change, share).values())
        for fqn in params:
            # a state element is an average of g or g^2, or an LSTM's: measured by the largest of
            # its tensor
            largest = {key: s.abs().max() for key, s in uncut.state[fqn].items()}
            worst_state = max(
                worst_state, *layout_error(run.state[fqn], uncut.state[fqn], largest).values()
            )
            rounded = [key for key, s in largest.items() if s.dtype == torch.bfloat16]
            assert bool(rounded) == case.halved
            for key in rounded:
                assert torch.equal(run.state[fqn][key], uncut.state[fqn][key]), (fqn, key)
    assert cuts == 9 * 4 * rounds
    assert empty > 0
    assert worst <= 1.0, worst
    assert worst_state <= 1.0, worst_state
    figures.append(
        f"virtual ranks | {name} {str(dtype)[6:]} | {cuts} cuts of 2 to 8 ranks, {STEPS} steps | "
        f"{worst:.2g} of the layout tolerance, state {worst_state:.2g}"
    )


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reductions_do_not_grow_with_the_tensors(name: str, ranks: int) -> None:
    """Two of them, but for what the case itself says."""
    case = OPTIMIZERS[name].on(Roles(widths={"p0": 2.0}, embedding="^p1$"))
    for tensors in (1, 10, 300):
        params = {f"p{i}": torch.randn(5) if i % 2 else torch.randn(3, 4) for i in range(tensors)}
        grads = [{fqn: torch.randn_like(p) for fqn, p in params.items()} for _ in range(2)]
        run = run_virtual(case.face, params, ranks, grads, losses=[1.0, 0.9], **case.arguments)
        assert run.reductions == [case.reductions] * 2


def test_cuts_that_do_not_tile_are_refused() -> None:
    shards = [TensorShard.interval("w", (4, 4), 0, 9), TensorShard.interval("w", (4, 4), 8, 16)]
    with pytest.raises(ValueError, match=r"'w'.*exactly once"):
        run_virtual(
            pylo_dist.AdafacLO, {"w": torch.zeros(4, 4)}, {"w": shards}, [], weights=SMALL_FC
        )


def test_empty_tensors_have_no_state() -> None:
    params = {"w": torch.ones(3, 4), "empty": torch.ones(0, 4)}
    grads = [{fqn: torch.ones_like(p) for fqn, p in params.items()}]
    run = run_virtual(pylo_dist.AdafacLO, params, 2, grads, weights=SMALL_FC)
    assert run.state["w"]
    assert not run.state["empty"]
