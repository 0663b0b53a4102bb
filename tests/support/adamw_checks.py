"""What AdamW's compiled passes are held to, on a CPU and on an emulated GPU."""

from __future__ import annotations

from typing import Any

import torch

from pylo_dist.testing import VirtualRun
from support.kernels import Problem

EPS = torch.finfo(torch.float32).eps
# whatever a constant of the pass comes from: clipping, decay of either kind, a counter of a group's
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "CeloAdam": ("CeloAdam", {"lr": 50.0}),
    "CeloAdam, clipped and decayed": (
        "CeloAdam",
        {"max_grad_norm": 0.5, "weight_decay": 1e-3, "lr": torch.tensor(5.0)},
    ),
    "CeloAdam_halved": ("CeloAdam_halved", {"lr": 50.0}),
    "CELO2_halved": ("CELO2_halved", {"adam_weight_decay": 0.1}),
    "ELO_CELO2": ("ELO_CELO2", {"weight_decay": 0.01}),
}
LENGTHS = (66_001, 7, 1)


def long_problem(lengths: tuple[int, ...], steps: int = 2) -> Problem:
    generator = torch.Generator().manual_seed(0)
    params = {f"t{i}": torch.randn(n, generator=generator) for i, n in enumerate(lengths)}
    grads: Any = [
        {fqn: torch.randn(p.shape, generator=generator) for fqn, p in params.items()}
        for _ in range(steps)
    ]
    return params, grads, [1.0] * steps


def moved_by_adamw(run: VirtualRun) -> list[str]:
    return [fqn for fqn, state in run.state.items() if "exp_avg" in state]


def same_bits(ours: VirtualRun, other: VirtualRun) -> None:
    for fqn in moved_by_adamw(other):
        assert torch.equal(ours.params[fqn], other.params[fqn]), fqn
        for key, value in other.state[fqn].items():
            assert torch.equal(ours.state[fqn][key], value), (fqn, key)


def check_state(ours: VirtualRun, oracle: VirtualRun) -> None:
    """Means are made of products and sums that are rounded one by one: the same bits."""
    for fqn in moved_by_adamw(oracle):
        for key, value in oracle.state[fqn].items():
            assert torch.equal(ours.state[fqn][key], value), (fqn, key)


def check_near(ours: VirtualRun, oracle: VirtualRun, problem: Problem) -> int:
    """Parameters, of which torch's square root on a CPU is not always the nearest number: to two
    units of the update and one of the parameter in every step. Gives how many elements moved.
    """
    moved, params = 0, problem[0]
    for fqn in moved_by_adamw(oracle):
        before, bound = params[fqn], torch.zeros_like(params[fqn])
        for mine, theirs in zip(ours.history, oracle.history, strict=True):
            larger = torch.maximum(before.abs(), theirs[fqn].abs())
            bound += EPS * (2.0 * (theirs[fqn] - before).abs() + larger)
            assert ((mine[fqn] - theirs[fqn]).abs() <= bound).all(), fqn
            before = theirs[fqn]
        moved += int((oracle.params[fqn] != params[fqn]).sum())
    return moved
