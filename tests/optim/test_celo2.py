"""CELO2's settings on many equal tensors, which are worked on as one: each gets what it gets alone,
whole and cut anywhere.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import pylo_dist
from pylo_dist.core.shards import TensorShard
from pylo_dist.maths import compiled
from pylo_dist.testing import VirtualRun, largest_changes, layout_error, run_virtual
from support.optimizers import CELO2
from support.virtual import random_shards

COPIES, STEPS, RANKS = 3, 3, 8
# leading dims, the same number of elements in other shapes, a matrix per element, below two dims,
# slender
SHAPES = [(6, 5), (5, 6), (3, 2, 5), (4, 3, 2, 2), (2, 3, 8), (2, 3, 1, 1), (7,), (), (64, 3)]
NO_NS = {"orthogonalize": False}
WAYS: dict[str, dict[str, Any]] = {
    "scaled": {"param_scale_mult": True},
    "scaled, without Newton-Schulz": {
        **NO_NS,
        "param_scale_mult": True,
        "exp_mult": 0.1,
        "weight_decay": 0.1,
        "clip_grad": True,
    },
}
# Newton-Schulz rounds by the number of matrices and of ranks, and lifts small singular values;
# without it the layout tolerance
SHARES = {torch.float32: 5e-5, torch.float64: 1e-12}
Problem = tuple[dict[str, Tensor], list[dict[str, Tensor | None]]]


def problem(dtype: torch.dtype) -> Problem:
    """Tensors of another rms each, so that nobody's pass for another's."""
    generator = torch.Generator().manual_seed(5)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    shapes = {f"{i}.{j}": shape for j in range(COPIES) for i, shape in enumerate(SHAPES)}
    params = {fqn: normal(shape, 0.5 + 0.1 * k) for k, (fqn, shape) in enumerate(shapes.items())}
    grads: list[dict[str, Tensor | None]] = [
        {fqn: normal(shape, 0.1) for fqn, shape in shapes.items()} for _ in range(STEPS)
    ]
    # virtual ranks share all tensors, which move all the same
    grads[1]["0.1"] = grads[2]["3.0"] = None
    return params, grads


def run(
    what: Problem, cuts: Any, kernels: bool = True, faint: float | None = None, **kwargs: Any
) -> VirtualRun:
    """float32 takes the compiled passes where they are built and allowed, float64 plain PyTorch.

    Directions have rms 1 in the end, so that a scale could be wrong and never be seen. The
    network's outputs are multiplied by `faint`, by default so that mean squares are like the 1e-9
    that is added to them (Newton-Schulz leaves small ones small here).
    """
    faint = faint or (1e-7 if kwargs.get("orthogonalize", True) else 1e-4)
    weights = {
        name: faint * w if name in ("dense_w.1", "dense_b.1") else w for name, w in CELO2.items()
    }
    how: dict[str, Any] = {
        "weights": weights,
        "lr": 0.1,
        "ns_eps": 1.0,
        "clip": "per_tensor",
        **kwargs,
    }
    with compiled.use_kernels(kernels):
        return run_virtual(pylo_dist.CELO2, what[0], cuts, what[1], **how)


def errors(
    got: VirtualRun, wanted: VirtualRun, what: Problem, share: float | None
) -> dict[str, float]:
    return layout_error(
        got.params, wanted.params, largest_changes([what[0], *wanted.history]), share
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("way", WAYS)
def test_equal_tensors_move_as_each_alone(way: str, dtype: torch.dtype, figures: list[str]) -> None:
    what, share = problem(dtype), SHARES[dtype] if way == "scaled" else None
    together = run(what, 1, **WAYS[way])
    worst, equal = 0.0, 0
    for fqn, p in what[0].items():
        own: Problem = {fqn: p}, [{fqn: step[fqn]} for step in what[1]]
        alone = run(own, 1, **WAYS[way])
        worst = max(
            worst,
            *errors(
                VirtualRun({fqn: together.params[fqn]}, {}, [], []), alone, own, share
            ).values(),
        )
        equal += int((alone.params[fqn] == together.params[fqn]).sum())
        assert not torch.equal(alone.params[fqn], p), fqn
    assert worst <= 1.0, worst
    elements = sum(p.numel() for p in what[0].values())
    figures.append(
        f"CELO2 {way}, {str(dtype)[6:]} | {COPIES} tensors of a shape: {equal / elements:.1%} of "
        "the bits as alone"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_the_scale_is_the_rms_of_the_whole_tensor(orthogonalize: bool, dtype: torch.dtype) -> None:
    """A step is that many times the one without, but for half of what is not faint: some 1e-7 of
    it.
    """
    what = problem(dtype)
    first: Problem = what[0], what[1][:1]
    for cuts in (1, RANKS):
        how = {
            "faint": 1e-11,
            "lr": 1e3 if orthogonalize else 1e6,
            "adam_lr_mult": 0.0,
            "orthogonalize": orthogonalize,
        }
        plain, scaled = (
            run(first, cuts, param_scale_mult=scaled, **how) for scaled in (False, True)
        )
        for fqn, p in first[0].items():
            moved, wanted = (r.params[fqn].double() - p.double() for r in (scaled, plain))
            wanted *= (p.double().square().mean() + 1e-9).sqrt()
            # the parameters themselves are rounded
            stored = torch.finfo(dtype).eps * p.double().norm()
            assert float((moved - wanted).norm()) <= 1e-6 * float(wanted.norm()) + 2.0 * float(
                stored
            ), fqn
            assert p.dim() < 2 or float(wanted.norm()) > 0.01 * float(p.norm()), fqn


@pytest.mark.parametrize("way", WAYS)
def test_compiled_passes_move_as_plain_pytorch_does(way: str) -> None:
    """With twice plain PyTorch's own error and some roundings, as in test_kernels."""
    what = problem(torch.float32)
    wide: Problem = (
        {fqn: p.double() for fqn, p in what[0].items()},
        [{fqn: None if g is None else g.double() for fqn, g in step.items()} for step in what[1]],
    )
    truth, plain, compiled = (
        run(wide, 1, **WAYS[way]),
        run(what, 1, False, **WAYS[way]),
        run(what, 1, **WAYS[way]),
    )
    eps = torch.finfo(torch.float32).eps
    for fqn, p in what[0].items():
        moved = float((truth.params[fqn] - p.double()).norm())
        own, error = (
            float((r.params[fqn].double() - truth.params[fqn]).norm()) for r in (plain, compiled)
        )
        # Newton-Schulz lifts the last bits of what it is given, some 100 times
        floor = eps * ((100 if way == "scaled" else 16) * moved + float(p.norm()))
        assert error <= 2 * own + floor, (fqn, tuple(p.shape), own, error)


def cut(alike: bool, fqn: str, shape: tuple[int, ...]) -> list[TensorShard]:
    """Tensors of a shape cut alike, or into pieces of one size that begin elsewhere."""
    kind, copy = (int(part) for part in fqn.split("."))
    if alike:
        return random_shards(random.Random(kind), fqn, shape, RANKS)
    numel = math.prod(shape)
    points = [min(numel, max(0, -(-numel // 5) * (rank - copy))) for rank in range(RANKS)]
    return [TensorShard.interval(fqn, shape, a, b) for a, b in pairwise([*points, numel])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("way", WAYS)
def test_eight_virtual_ranks(way: str, dtype: torch.dtype, figures: list[str]) -> None:
    what, share = problem(dtype), SHARES[dtype] if way == "scaled" else None
    uncut, worst = run(what, 1, **WAYS[way]), 0.0
    for alike in (True, False):
        cuts = {fqn: cut(alike, fqn, tuple(p.shape)) for fqn, p in what[0].items()}
        worst = max(worst, *errors(run(what, cuts, **WAYS[way]), uncut, what, share).values())
    assert worst <= 1.0, worst
    figures.append(
        f"CELO2 {way}, {str(dtype)[6:]} | {RANKS} virtual ranks, {COPIES} tensors of a shape: "
        f"{worst:.2g} of the tolerance"
    )


@pytest.mark.parametrize("shape", [(64, 5), (33, 7), (64, 8)])
def test_an_owner_rounds_a_matrix_alike_whatever_else_it_owns(shape: tuple[int, ...]) -> None:
    """To the bit: matrix products round by where a matrix begins in memory."""
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    found = []
    for beside in ((8, 8), (5, 7), (1, 2)):
        tensors = {"large, of the first rank": torch.ones(40, 40), "beside": torch.ones(beside)}
        run = run_virtual(
            pylo_dist.CELO2,
            {**tensors, "it": start},
            2,
            [{**tensors, "it": grad}],
            weights=CELO2,
            lr=0.1,
        )
        assert run.exchanges == [2]
        found.append(run.params["it"])
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "PyTorch"])
def test_groups_and_missing_gradients_of_unshared_tensors(kernels: bool) -> None:
    """Whoever goes together in a step: a tensor moves by its own group's settings, and rests when
    it has no gradient.
    """
    params, grads = problem(torch.float32)
    settings: list[dict[str, Any]] = [{}, {"lr": 0.02, "rmsmult": 0.5, "weight_decay": 0.2}]

    def moved(names: list[str], step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        own = {fqn: torch.nn.Parameter(params[fqn].clone()) for fqn in names}
        groups = [
            {"params": [(fqn, p) for fqn, p in own.items() if int(fqn[-1]) % 2 == i], **settings[i]}
            for i in range(len(settings))
        ]
        optimizer = pylo_dist.CELO2(
            [g for g in groups if g["params"]], weights=CELO2, lr=0.1, orthogonalize=False
        )
        with compiled.use_kernels(kernels):
            for now in grads[: step + 1]:
                for fqn, p in own.items():
                    p.grad = now[fqn]
                optimizer.step()
        ratios = {
            fqn: float(of_tensor["update_ratio"]) for fqn, of_tensor in optimizer.stats().items()
        }
        return {fqn: p.detach() for fqn, p in own.items()}, ratios

    together, ratios = moved(list(params), 2)
    before, _ = moved(list(params), 1)
    assert torch.equal(together["3.0"], before["3.0"])  # no gradient in the last step
    for fqn, p in params.items():
        alone, own_ratios = moved([fqn], 2)
        assert float((together[fqn] - alone[fqn]).abs().max()) <= 1e-5 * float(
            (alone[fqn] - p).abs().max()
        ), fqn
        assert ratios[fqn] == pytest.approx(own_ratios[fqn], rel=1e-4), fqn
        assert ratios[fqn] > 0 or grads[2][fqn] is None, fqn
