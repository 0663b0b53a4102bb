"""Checks of the CUDA passes that tests/maths/test_fibers.py makes on a CPU and
tests/maths/test_gpu.py on a GPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pylo_dist.core.pieces import bind_shard
from pylo_dist.core.rule import Batch
from pylo_dist.core.shards import TensorShard
from pylo_dist.maths import compiled
from pylo_dist.maths.rounding import Roundings
from pylo_dist.testing import VirtualGroup, VirtualRun
from support.kernels import FLOOR, Problem, in_float64, random_cuts, random_problem, relative, run
from support.virtual import SETTINGS

EPS = torch.finfo(torch.float32).eps
LIMITS = {"highest": 2.0, "high": 4.0}  # times the float32 PyTorch path's own error
MEDIUM = 2e-3  # relative L2 of an update in float16


def on(problem: Problem, device: str) -> Problem:
    params, grads, losses = problem
    there: list[dict[str, Tensor | None]] = [
        {k: None if g is None else g.to(device) for k, g in step.items()} for step in grads
    ]
    return {fqn: p.to(device) for fqn, p in params.items()}, there, losses


SMALL = [
    (40, 72),
    (33, 20),
    (20, 16),
    (5, 150),
    (2, 6, 36),
    (2, 3, 9, 12),
    (33, 33),
    (8, 4, 3, 3),
    (40,),
    (),
]
LARGE = [
    (170, 296),
    (296, 33),
    (40, 16),
    (17, 300),
    (3, 20, 136),
    (2, 3, 18, 20),
    (165, 165),
    (16, 8, 3, 3),
    (4000,),
    (),
]


def matrix_problem(rng: random.Random, device: str, steps: int = 2) -> Problem:
    """Shapes for the tensor-core path and its edges: short and long runs, either factor along them,
    small tensors.
    """
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    shapes = {f"t{i}": shape for i, shape in enumerate(SMALL if device == "cpu" else LARGE)}

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float()

    params = {fqn: 0.01 * normal(shape) for fqn, shape in shapes.items()}
    grads: list[dict[str, Tensor | None]] = [
        {fqn: normal(shape) for fqn, shape in shapes.items()} for _ in range(steps)
    ]
    return params, grads, [2.0 / (t + 1) for t in range(steps)]


def check_rule(
    name: str, precision: str, problem: Problem, device: str, cuts: Any, **kwargs: Any
) -> tuple[float, float]:
    """Errors against float64 of every parameter and state; gives the largest of the PyTorch path
    and of the kernels.
    """
    params = problem[0]
    truth = run(name, in_float64(problem), **kwargs)
    oracle = run(name, problem, kernels=False, **kwargs)
    ours = run(name, on(problem, device), cuts, precision=precision, **kwargs)
    worst = [0.0, 0.0]
    for fqn, p in params.items():
        if p.numel() == 0:
            continue
        moved = truth.params[fqn] - p.double()
        # the parameters themselves are stored to half a unit of theirs
        floor = FLOOR + float(EPS * p.double().norm() / moved.norm())
        own, error = (
            relative(r.params[fqn].cpu(), truth.params[fqn], moved) for r in (oracle, ours)
        )
        bound = own + MEDIUM if precision == "medium" else LIMITS[precision] * own
        assert error <= bound + floor, (fqn, tuple(p.shape), own, error)
        worst = [max(worst[0], own), max(worst[1], error)]
        for key, wanted in truth.state[fqn].items():
            own, error = (relative(r.state[fqn][key].cpu(), wanted) for r in (oracle, ours))
            assert error <= 2 * own + FLOOR, (fqn, key, tuple(p.shape), own, error)
    return worst[0], worst[1]


def check_random(
    name: str, precision: str, device: str, seed: int, ranks: int
) -> tuple[float, float]:
    rng = random.Random(f"{name} {seed}")
    problem = random_problem(rng) if seed % 2 else matrix_problem(rng, device)
    return check_rule(name, precision, problem, device, random_cuts(rng, problem[0], ranks))


def hold_gradients(batch: Batch, params: Iterable[Tensor]) -> None:
    """Give a batch of these whole parameters their gradients, which a step lets go at its end."""
    for item, p in zip(batch.items, params, strict=True):
        item.param.grad = p.grad


def same_bits(a: VirtualRun, b: VirtualRun) -> None:
    for fqn, p in a.params.items():
        assert torch.equal(p, b.params[fqn]), fqn
        for key, value in a.state[fqn].items():
            assert torch.equal(value, b.state[fqn][key]), (fqn, key)


def check_two_runs(name: str, precision: str, device: str) -> None:
    """The same bits again."""
    problem = on(matrix_problem(random.Random(7), device), device)
    same_bits(
        run(name, problem, 2, precision=precision), run(name, problem, 2, precision=precision)
    )


def check_nan(precision: str, device: str) -> None:
    """A NaN that is let through makes its tensor NaN, and no other; a step that is passed over
    changes nothing.
    """
    params, grads, losses = matrix_problem(random.Random(8), device, steps=1)
    grads[0]["t0"][5, 7] = float("nan")  # type: ignore[index]
    problem = on((params, grads, losses), device)
    setting = SETTINGS["AdafacLO"]
    named = {fqn: torch.nn.Parameter(p.clone()) for fqn, p in problem[0].items()}
    optimizer = setting.build(list(named.items()), precision=precision, nonfinite="allow")
    for fqn, p in named.items():
        p.grad = problem[1][0][fqn]
    optimizer.step()
    assert named["t0"].isnan().all()
    assert all(p.isfinite().all() for fqn, p in named.items() if fqn != "t0")
    skipped = run("AdafacLO", problem, 2, precision=precision, nonfinite="skip")
    for fqn, p in params.items():
        assert torch.equal(skipped.params[fqn].cpu(), p), fqn
        assert all(not value.any() for value in skipped.state[fqn].values()), fqn


def check_extremes(precision: str, device: str) -> None:
    """Gradients from 1e-30 to what float32 can square, and one number among zeros: finite, and as
    the PyTorch path.
    """
    params = {f"t{i}": 0.01 * torch.randn(20, 40) for i in range(5)}
    scales = (0.0, 1e-30, 1e-12, 1e12, 1e18)
    grad = {fqn: torch.randn(20, 40) * scale for fqn, scale in zip(params, scales, strict=True)}
    grad["t0"][3, 4] = 2.0
    problem: Problem = (params, [dict(grad)], [1.0])
    truth, oracle = run("AdafacLO", in_float64(problem)), run("AdafacLO", problem, kernels=False)
    ours = run("AdafacLO", on(problem, device), 3, precision=precision)
    for fqn, p in params.items():
        assert ours.params[fqn].isfinite().all(), fqn
        moved = truth.params[fqn] - p.double()
        own, error = (
            relative(r.params[fqn].cpu(), truth.params[fqn], moved) for r in (oracle, ours)
        )
        bound = own + MEDIUM if precision == "medium" else LIMITS[precision] * own
        assert error <= bound + FLOOR + float(EPS * p.norm() / moved.norm()), (fqn, own, error)


def check_dtype(precision: str, device: str, dtype: torch.dtype, name: str = "AdafacLO") -> None:
    """Parameters and gradients of 16 bits: the state is that of their float32 copies, the value the
    rounded one.
    """
    params, grads, losses = matrix_problem(random.Random(9), device, steps=1)
    half = {fqn: p.to(dtype) for fqn, p in params.items()}
    half_grads: list[dict[str, Tensor | None]] = [
        {fqn: g.to(dtype) for fqn, g in step.items() if g is not None} for step in grads
    ]
    wide: Problem = (
        {fqn: p.float() for fqn, p in half.items()},
        [{fqn: None if g is None else g.float() for fqn, g in step.items()} for step in half_grads],
        losses,
    )
    got = run(name, on((half, half_grads, losses), device), 3, precision=precision)
    want = run(name, on(wide, device), 3, precision=precision)
    for fqn in params:
        assert torch.equal(got.params[fqn], want.params[fqn].to(dtype)), fqn
        for key, value in want.state[fqn].items():
            assert torch.equal(got.state[fqn][key], value), (fqn, key)


HALVED = ("AdafacLO_halved", "VeLO_halved", "CELO2_halved")
# How far parameters may be from those of the PyTorch path, of which the means are the same; CELO2's
# Newton-Schulz drives small singular values towards 1, and with them errors.
NEAR = {"highest": 1e-4, "high": 1e-4, "medium": MEDIUM}


def bits(x: Tensor) -> Tensor:
    """Of bfloat16 numbers, so that a NaN is what it is."""
    assert x.dtype == torch.bfloat16
    return x.cpu().view(torch.int16)


def check_halved(name: str, precision: str, problem: Problem, device: str, cuts: Any) -> int:
    """Means that the kernels store in bfloat16, on any cut, have the bits of those that the PyTorch
    path stores on a CPU; the parameters are near. Gives how many were compared.
    """
    oracle = run(name, problem, kernels=False)
    ours = run(name, on(problem, device), cuts, precision=precision)
    assert all(o._lineup.batches[0].cache["kernels"] for o in ours.optimizers)
    compared = 0
    for fqn, p in problem[0].items():
        for key in oracle.state[fqn].keys() & {"momentum", "rms"}:
            got, wanted = bits(ours.state[fqn][key]), bits(oracle.state[fqn][key])
            assert torch.equal(got, wanted), (name, fqn, key)
            compared += got.numel()
        if p.numel():
            share = 1e-3 if name == "CELO2_halved" else NEAR[precision]
            far = relative(ours.params[fqn].cpu(), oracle.params[fqn], oracle.params[fqn] - p)
            assert far <= share, (name, fqn, far)
    return compared


def check_extreme_means(precision: str, device: str) -> None:
    """Gradients that leave NaN, inf and large numbers in the means: the PyTorch path's bits."""
    params, grads, losses = matrix_problem(random.Random(10), device, steps=2)
    grads[0]["t0"][5, 7] = float("nan")  # type: ignore[index]
    grads[0]["t1"][2] = float("-inf")  # type: ignore[index]
    grads[1]["t2"][:, 3:] = 3e38  # type: ignore[index]
    ends = []
    for kernels, there in ((False, "cpu"), (True, device)):
        problem = on((params, grads, losses), there)
        named = {fqn: torch.nn.Parameter(p.clone()) for fqn, p in problem[0].items()}
        optimizer = SETTINGS["AdafacLO_halved"].build(
            list(named.items()), precision=precision, nonfinite="allow"
        )
        for step in problem[1]:
            for fqn, p in named.items():
                p.grad = step[fqn]
            with compiled.use_kernels(kernels):
                optimizer.step()
        ends.append({fqn: optimizer.state[p] for fqn, p in named.items()})
    oracle, ours = ends
    for fqn in params:
        for key in ("momentum", "rms"):
            assert torch.equal(bits(ours[fqn][key]), bits(oracle[fqn][key])), (fqn, key)


def check_beyond_32_bits(shape: tuple[int, ...], device: str) -> None:
    """A piece of a tensor that is large, across the element whose number has another upper word:
    pass C alone, which needs no factors for the means, stores those of the PyTorch path on a CPU.
    """
    border, before, size = 1 << 32, 150, 400
    peers = [
        TensorShard.interval("w", shape, border - before, border - before + size),
        TensorShard.interval("w", shape, border - before + size, math.prod(shape)),
    ]
    ends = []
    for kernels, there in ((False, "cpu"), (True, device)):
        param = torch.nn.Parameter(torch.ones(size, device=there))
        bind_shard(param, peers, 0, VirtualGroup(2))
        optimizer = SETTINGS["AdafacLO_halved"].build([("w", param)])
        param.grad = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(there)
        if kernels:
            rule, batch = optimizer._ready().work[0]
            hold_gradients(batch, [param])
            rule.prepare(batch, None)
            how = rule.updates(batch), "high", [], Roundings(batch.device)
            rule.kernels(batch).update_pass(batch, [0], *how)
        else:
            with compiled.use_kernels(False):
                for _ in optimizer.phases():  # the sums of this rank alone
                    pass
        ends.append([bits(optimizer.state[param][key]) for key in ("momentum", "rms")])
    assert all(map(torch.equal, *ends))
    assert all(bool((x != 0).all()) for x in ends[0])
