"""The reference path against golden: numbers of the public JAX reference (google/learned_optimization, AdafacMLPLOpt).

golden/small_fc_f64 was made under x64 with float32 time features, golden/small_fc_f32 as shipped, small_fc_big_f32 likewise on
larger tensors (state at the end only). Shapes: (7,5) (5,7) (6,6) (13,) () (1,9) (3,4,5) (4,3,3,2) (2,2,6,7).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import GOLDEN, small_fc_tensors
from torch import Tensor

import pylo_dist


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def num_tensors(file: dict[str, np.ndarray]) -> int:
    return sum(key.endswith(".p0") for key in file)


def run(
    file: dict[str, np.ndarray], dtype: torch.dtype, each_step: Callable[[int, list[Tensor], list[dict[str, Tensor]]], None]
) -> None:
    """Run AdafacLO on the golden gradients and show parameters and state after every step."""
    params = [torch.nn.Parameter(torch.tensor(file[f"t{i}.p0"]).to(dtype)) for i in range(num_tensors(file))]
    # the golden runs used PyLO's decay offsets, which are what a mapping without stored decays implies
    optimizer = pylo_dist.AdafacLO(params, weights=small_fc_tensors(file))
    for t in range(file["t0.g"].shape[0]):
        for i, param in enumerate(params):
            param.grad = torch.tensor(file[f"t{i}.g"][t]).to(dtype)
        optimizer.step()
        each_step(t, [p.detach() for p in params], [optimizer.state[p] for p in params])


def golden_state(file: dict[str, np.ndarray], i: int, t: int | None) -> dict[str, Tensor]:
    """The state of tensor i after step t (None: the last) with our names and axes: decays first."""

    def get(key: str) -> Tensor:
        return torch.tensor(file[f"t{i}.{key}"][t] if t is not None else file[f"t{i}.{key}_last"])

    names = (
        {"momentum": "mom", "row": "vrow", "col": "vcol"}
        if len(file[f"t{i}.shape"]) >= 2
        else {"momentum": "mom", "diag": "vdiag"}
    )
    return {**{ours: get(theirs).movedim(-1, 0) for ours, theirs in names.items()}, "rms": get("rms").squeeze(-1)}


def relative(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 difference; 0 for two zero tensors."""
    norm = float(wanted.double().norm())
    difference = float((got.double() - wanted.double()).norm())
    return difference / norm if norm else difference


def updates(file: dict[str, np.ndarray], i: int) -> Tensor:
    """(T, *shape) float64 updates of tensor i."""
    p = torch.tensor(file[f"t{i}.p"]).double()
    return p - torch.cat([torch.tensor(file[f"t{i}.p0"]).double()[None], p[:-1]])


def test_float64_updates_and_state(figures: list[str]) -> None:
    # float32 time features in the reference leave about 5e-8; the 0-d tensor's features are signs, so its outputs cancel
    file = load("small_fc_f64")
    worst: dict[int, float] = {}
    worst_state = 0.0
    before = [torch.tensor(file[f"t{i}.p0"]).double() for i in range(9)]

    def check(t: int, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        nonlocal worst_state
        for i, param in enumerate(params):
            error = relative(param - before[i], updates(file, i)[t])
            assert error <= (1e-5 if param.dim() == 0 else 1e-6), (i, t, error)
            worst[i] = max(worst.get(i, 0.0), error)
            before[i] = param.clone()
            for name, wanted in golden_state(file, i, t).items():
                assert states[i][name].shape == wanted.shape
                error = relative(states[i][name], wanted)
                assert error <= 1e-6, (i, t, name, error)
                worst_state = max(worst_state, error)

    run(file, torch.float64, check)
    assert len(worst) == 9
    zero_dim = worst.pop(4)
    figures.append(f"parity small_fc_f64: update {max(worst.values()):.1e} (0-d {zero_dim:.1e}), state {worst_state:.1e}")


def test_float32_within_the_references_own_error(figures: list[str]) -> None:
    file, exact = load("small_fc_f32"), load("small_fc_f64")
    before = [torch.tensor(file[f"t{i}.p0"]) for i in range(9)]
    errors = torch.zeros(9)

    def check(t: int, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        for i, param in enumerate(params):
            errors[i] = max(float(errors[i]), relative(param.double() - before[i].double(), updates(file, i)[t]))
            before[i] = param.clone()

    run(file, torch.float32, check)
    lines = []
    for i in range(9):
        own = max(relative(updates(file, i)[t], updates(exact, i)[t]) for t in range(12))
        lines.append(f"{float(errors[i]) / max(2 * own, 2e-6):.2f}")
        assert float(errors[i]) <= max(2 * own, 2e-6), (i, float(errors[i]), own)
    figures.append(f"parity small_fc_f32: update {float(errors.max()):.1e}; share of the bound per tensor {' '.join(lines)}")


def test_float32_on_larger_tensors(figures: list[str]) -> None:
    """Parameters every step and state at the end.

    Bounds: an update of the f32 reference is itself off by up to 2e-5 relative (measured f32 against f64), so a parameter may be
    by that share of the largest step taken so far, times the steps. The reference takes 1 - decay in float32, off by 3e-8 /
    (1 - decay), which all state of that decay inherits as a factor: with decays up to 0.99946, 6e-5 relative.
    """
    file = load("small_fc_big_f32")
    n, steps = num_tensors(file), file["t0.g"].shape[0]
    worst, worst_state = 0.0, 0.0

    def check(t: int, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        nonlocal worst, worst_state
        for i, param in enumerate(params):
            largest = updates(file, i)[: t + 1].abs().amax()
            ulp = torch.finfo(torch.float32).eps * float(param.abs().max())
            error = float((param.double() - torch.tensor(file[f"t{i}.p"][t]).double()).abs().max())
            assert error <= 2e-5 * float(largest) * (t + 1) + ulp, (i, t, error, float(largest))
            worst = max(worst, error)
            if t == steps - 1:
                for name, wanted in golden_state(file, i, None).items():
                    error = relative(states[i][name], wanted)
                    assert error <= 6e-5, (i, name, error)
                    worst_state = max(worst_state, error)

    run(file, torch.float32, check)
    assert n == 5
    figures.append(f"parity small_fc_big_f32: parameters {worst:.1e} absolute, final state {worst_state:.1e} relative")


@pytest.mark.parametrize("name", ["small_fc_f32", "small_fc_f64"])
def test_factored_dims_are_those_of_golden(name: str) -> None:
    from pylo_dist.shards import factored_dims

    file = load(name)
    for i in range(num_tensors(file)):
        wanted = tuple(int(d) for d in file[f"t{i}.d1d0"])
        assert (factored_dims(tuple(int(s) for s in file[f"t{i}.shape"])) or (-1, -1)) == wanted
