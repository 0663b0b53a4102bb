"""Every optimizer against golden, float32 with the compiled passes and without, see
support/golden.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pylo_dist.core.shards import factored_dims
from pylo_dist.maths import compiled
from support.golden import CASES, STEPS, Case, load, relative, run, state, updates

# what reads the loss and the length of the run
RUNS = [name for name in CASES if name.startswith(("velo", "celo_")) or name == "celo"]


def update_bound(shape: tuple[int, ...], name: str) -> float:
    """Bound on the relative L2 error of a float64 update.

    CELO2's references are PyLO's plain classes in float64, without float32 in them.

    The reference's time features and fractions are float32 also under x64, which leaves about 5e-8.
    Features of a 0-d tensor are signs, so the two halves of its output cancel; VeLO's (1, 9) update
    is a small difference as well.
    """
    if shape == ():
        return 1e-5
    return 2e-6 if name.startswith("velo") and shape == (1, 9) else 1e-6


@pytest.mark.parametrize("name", CASES)
def test_float64_updates_and_state(name: str, figures: list[str]) -> None:
    file = load(f"{name}_f64")
    worst, worst_0d, worst_state = 0.0, 0.0, 0.0
    for step in run(CASES[name], file, torch.float64):
        for i, param in enumerate(step.params):
            error = relative(param - step.before[i], updates(file, i)[step.t])
            assert error <= update_bound(tuple(param.shape), name), (i, step.t, error)
            worst, worst_0d = (
                (max(worst, error), worst_0d) if param.dim() else (worst, max(worst_0d, error))
            )
            for key, wanted in state(file, i, step.t).items():
                assert step.states[i][key].shape == wanted.shape
                error = relative(step.states[i][key], wanted)
                assert error <= 1e-6, (i, step.t, key, error)
                worst_state = max(worst_state, error)
    assert step.t == STEPS - 1
    optimizer = type(step.optimizer).__name__
    figures.append(
        f"parity | {optimizer} | {name}_f64 | update {worst:.1e}, 0-d {worst_0d:.1e}, state "
        f"{worst_state:.1e}"
    )


@pytest.fixture(params=[True, False], ids=["kernels", "pytorch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both paths of float32; float64 always takes the PyTorch path."""
    with compiled.use_kernels(request.param):
        yield "kernels" if request.param else "PyTorch"


@pytest.mark.parametrize(
    "name", [name for name in CASES if "velo" not in name and "celo" not in name]
)
def test_float32_within_the_references_own_error(name: str, path: str, figures: list[str]) -> None:
    """Per tensor, the largest over steps within twice what the reference itself loses between
    float64 and float32, or 2e-6.
    """
    file, exact = load(f"{name}_f32"), load(f"{name}_f64")
    errors = [0.0] * 9
    for step in run(CASES[name], file, torch.float32):
        for i, param in enumerate(step.params):
            error = relative(param.double() - step.before[i].double(), updates(file, i)[step.t])
            errors[i] = max(errors[i], error)
    shares = []
    for i, error in enumerate(errors):
        own = max(relative(updates(file, i)[t], updates(exact, i)[t]) for t in range(STEPS))
        shares.append(error / max(2 * own, 2e-6))
        assert shares[-1] <= 1.0, (i, error, own)
    optimizer = type(step.optimizer).__name__
    figures.append(
        f"parity | {optimizer} | {name}_f32, {path} | update {max(errors):.1e}, {max(shares):.2f} "
        "of the bound"
    )


@pytest.mark.parametrize("name", RUNS)
def test_float32_parameters_of_small_updates(name: str, path: str, figures: list[str]) -> None:
    """Updates of VeLO and Celo are 1e-5 of the parameters, so float32 parameters are compared
    themselves.

    7e-7 is what the reference's own float32 run differs from its float64 run by: some units in the
    last place of numbers near 1.
    """
    file = load(f"{name}_f32")
    worst = 0.0
    for step in run(CASES[name], file, torch.float32):
        for i, param in enumerate(step.params):
            error = float((param - torch.tensor(file[f"t{i}.p"][step.t])).abs().max())
            assert error <= 7e-7, (i, step.t, error)
            worst = max(worst, error)
    assert worst <= 7e-7, worst
    optimizer = type(step.optimizer).__name__
    figures.append(f"parity | {optimizer} | {name}_f32, {path} | parameters {worst:.1e} absolute")


@pytest.mark.parametrize("name", [name for name in RUNS if name != "velo_release"])
def test_loss_and_run_are_read_as_by_the_reference(name: str) -> None:
    """What the LSTM is told of loss and progress, and what it answers."""
    file = load(f"{name}_f64")
    for step in run(CASES[name], file, torch.float64):
        group = step.optimizer.param_groups[0]
        torch.testing.assert_close(
            group["loss_means"], torch.tensor(file["loss_means"][step.t]), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(
            group["loss_minima"], torch.tensor(file["loss_min"][step.t]), rtol=1e-12, atol=0
        )
        lr_mult = torch.stack([row["lr_mult"] for row in step.optimizer.stats().values()])
        # float32 fractions reach it through the LSTM
        torch.testing.assert_close(
            lr_mult.double(),
            torch.tensor(file["lr_mult"][step.t]),
            **({"rtol": 2e-6, "atol": 1e-7} if name == "velo_small" else {"rtol": 1e-6, "atol": 0}),
        )
        if name != "velo_small":  # of the run
            for ours, theirs in (("lstm_hidden", "lstm_h"), ("lstm_cell", "lstm_c")):
                wanted = torch.tensor(file[theirs][step.t])
                assert torch.equal(wanted, wanted[:1].expand_as(wanted))
                assert relative(group[ours], wanted[0]) <= 1e-6, (ours, step.t)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("celo")])
def test_float32_runs_take_the_references_step_sizes(name: str, path: str) -> None:
    """1e-5 of them: rows that are alike in the reference differ by 5e-7 there."""
    file = load(f"{name}_f32")
    for step in run(CASES[name], file, torch.float32):
        lr_mult = torch.stack([row["lr_mult"] for row in step.optimizer.stats().values()])
        wanted = torch.tensor(file["lr_mult"][step.t]).double()
        torch.testing.assert_close(lr_mult.double(), wanted, rtol=1e-5, atol=0)


def test_float32_on_larger_tensors(path: str, figures: list[str]) -> None:
    """Parameters every step and state at the end.

    Bounds: an update of the f32 reference is itself off by up to 2e-5 relative (measured f32
    against f64), so a parameter may be by that share of the largest step taken so far, times the
    steps. The reference takes 1 - decay in float32, off by 3e-8 / (1 - decay), which all state of
    that decay inherits as a factor: with decays up to 0.99946, 6e-5 relative.
    """
    file = load("small_fc_big_f32")
    worst, worst_state = 0.0, 0.0
    for step in run(Case("small_fc_big", CASES["small_fc"].build), file, torch.float32):
        for i, param in enumerate(step.params):
            largest = float(updates(file, i)[: step.t + 1].abs().amax())
            ulp = torch.finfo(torch.float32).eps * float(param.abs().max())
            error = float(
                (param.double() - torch.tensor(file[f"t{i}.p"][step.t]).double()).abs().max()
            )
            assert error <= 2e-5 * largest * (step.t + 1) + ulp, (i, step.t, error, largest)
            worst = max(worst, error)
    for i, states in enumerate(step.states):
        for key, wanted in state(file, i, step.t, suffix="_last").items():
            error = relative(states[key], wanted)
            assert error <= 6e-5, (i, key, error)
            worst_state = max(worst_state, error)
    assert len(step.params) == 5
    figures.append(
        f"parity | AdafacLO | small_fc_big_f32, {path} | parameters {worst:.1e} absolute, final "
        f"state {worst_state:.1e}"
    )


@pytest.mark.parametrize("name", CASES)
def test_factored_dims_are_those_of_golden(name: str) -> None:
    file = load(f"{name}_f64")
    for i in range(9):
        wanted = tuple(int(d) for d in file[f"t{i}.d1d0"])
        assert (factored_dims(tuple(int(s) for s in file[f"t{i}.shape"])) or (-1, -1)) == wanted
