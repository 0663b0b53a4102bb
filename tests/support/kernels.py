"""Random problems, runs on virtual ranks and error measures: what the compiled passes are compared
by, on a CPU and on a GPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pylo_dist.core.pieces import bind_shard
from pylo_dist.core.shards import TensorShard
from pylo_dist.maths import compiled
from pylo_dist.testing import VirtualGroup, VirtualRun, run_virtual
from support.virtual import SETTINGS, random_shards

TENSORS = 10  # of a random problem
GRAD_SCALES = (1e-30, 1e-12, 1e-3, 1.0, 30.0)


def random_shape(rng: random.Random) -> tuple[int, ...]:
    """0 to 5 dims and at most some 4000 elements; long and short last dims, ones, equal sizes."""
    shape: list[int] = []
    for _ in range(rng.choice([0, 1, 1, 2, 2, 2, 3, 4, 5])):
        size = rng.choice([1, 2, 3, 5, 5, 16, 33, 64, 100, 130])
        shape.append(size if math.prod(shape) * size <= 4000 else rng.choice([1, 2, 3]))
    rng.shuffle(shape)
    return tuple(shape)


Problem = tuple[dict[str, Tensor], list[dict[str, Tensor | None]], list[float]]


def random_problem(rng: random.Random, steps: int = 3) -> Problem:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = {f"t{i}": random_shape(rng) for i in range(TENSORS)}
    params = {fqn: (0.1 * normal(shape)).float() for fqn, shape in shapes.items()}
    scales = {fqn: rng.choice(GRAD_SCALES) for fqn in shapes}
    grads: list[dict[str, Tensor | None]] = [
        {fqn: (scales[fqn] * normal(shape)).float() for fqn, shape in shapes.items()}
        for _ in range(steps)
    ]
    grads[-1]["t0"] = None
    return params, grads, [2.0 / (t + 1) for t in range(steps)]


def run(
    name: str, problem: Problem, cuts: Any = 1, kernels: bool = True, **kwargs: Any
) -> VirtualRun:
    setting, (params, grads, losses) = SETTINGS[name], problem
    with compiled.use_kernels(kernels):
        return run_virtual(
            setting.face,
            params,
            cuts,
            grads,
            losses=losses,
            **{**setting.arguments, **kwargs},
        )


def in_float64(problem: Problem) -> Problem:
    params, grads, losses = problem
    wide: list[dict[str, Tensor | None]] = [
        {k: None if g is None else g.double() for k, g in step.items()} for step in grads
    ]
    return {fqn: p.double() for fqn, p in params.items()}, wide, losses


def relative(got: Tensor, wanted: Tensor, scale: Tensor | None = None) -> float:
    """L2 error over the norm of `scale` (default: of what was wanted)."""
    norm = float((wanted if scale is None else scale).double().norm())
    return (
        float((got.double() - wanted.double()).norm()) / norm
        if norm
        else float((got != wanted).any())
    )


def random_cuts(rng: random.Random, params: Mapping[str, Tensor], ranks: int) -> dict[str, Any]:
    return {fqn: random_shards(rng, fqn, tuple(p.shape), ranks) for fqn, p in params.items()}


# Beside 2x the PyTorch path's own error an error of some roundings is no fault: that of one run on
# one small tensor can be zero.
FLOOR = 16 * torch.finfo(torch.float32).eps


def across_32_bits(name: str) -> list[dict[str, Tensor]]:
    """The state of a piece of a tensor of 2^33 elements, across the place where the upper word of
    an element's number changes, after three steps: with kernels and without.
    """
    numel, start, size = 1 << 33, (1 << 32) - 70, 200
    peers = [
        TensorShard.interval("w", (numel,), start, start + size),
        TensorShard.interval("w", (numel,), start + size, numel),
    ]
    ends = []
    for kernels in (True, False):
        param = torch.nn.Parameter(torch.ones(size))
        bind_shard(param, peers, 0, VirtualGroup(2))
        optimizer = SETTINGS[name].build([("w", param)])
        with compiled.use_kernels(kernels):
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                param.grad = torch.randn(size, generator=generator)
                optimizer.set_loss(1.0)
                for _ in optimizer.phases():  # the sums of this rank alone
                    pass
        ends.append(optimizer.state[param])
    return ends
