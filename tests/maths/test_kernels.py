"""The compiled passes against the PyTorch path, the oracle: errors, bits, cuts, dtypes, extreme
gradients; and the operators.

Rules are run as a whole on virtual ranks, so that tables, passes and sums are tested together.
float64 always takes the PyTorch path.
"""

from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist
from pylo_dist.__main__ import main
from pylo_dist.maths import compiled
from pylo_dist.testing import largest_changes, layout_error, run_virtual
from support import copies
from support.golden import velo_weights
from support.kernels import (
    FLOOR,
    TENSORS,
    Problem,
    across_32_bits,
    in_float64,
    random_cuts,
    random_problem,
    relative,
    run,
)
from support.virtual import COMPILED, SETTINGS, golden_problem

pytestmark = pytest.mark.skipif(bool(compiled.library("cpu")), reason=compiled.library("cpu"))
RUNS_PER_RULE = 6  # of 10 tensors each


@pytest.mark.parametrize("name", COMPILED)
def test_errors_are_those_of_the_pytorch_path(name: str, figures: list[str]) -> None:
    rng = random.Random(name)
    ratios, worst, seen = [], 0.0, 0
    for _ in range(RUNS_PER_RULE):
        problem = random_problem(rng)
        params = problem[0]
        truth = run(name, in_float64(problem))
        oracle = run(name, problem, kernels=False)
        ours = run(name, problem, random_cuts(rng, params, rng.choice([1, 2, 3])))
        squares = [0.0, 0.0]
        for fqn, p in params.items():
            moved = truth.params[fqn] - p.double()
            # the parameters themselves are stored to half a unit of theirs
            floor = (
                FLOOR + float(torch.finfo(torch.float32).eps * p.double().norm() / moved.norm())
                if p.numel()
                else 0.0
            )
            own, error = (relative(r.params[fqn], truth.params[fqn], moved) for r in (oracle, ours))
            assert error <= 2 * own + floor, (fqn, tuple(p.shape), own, error)
            squares[0] += own**2
            squares[1] += error**2
            for key, wanted in truth.state[fqn].items():
                own, error = (relative(r.state[fqn][key], wanted) for r in (oracle, ours))
                assert error <= 2 * own + FLOOR, (fqn, key, tuple(p.shape), own, error)
                worst = max(worst, error)
            seen += 1
        ratios.append(math.sqrt(squares[1] / squares[0]))
    assert seen == RUNS_PER_RULE * TENSORS
    assert sum(ratios) / len(ratios) <= 2.0
    figures.append(
        f"kernels | {name} | {seen} tensors cut at random: {max(ratios):.2f} of the PyTorch path's "
        "error at most"
    )


@pytest.mark.parametrize("name", COMPILED)
def test_eight_virtual_ranks_and_two_runs(name: str, figures: list[str]) -> None:
    """The layout tolerance against the uncut run, and the same bits when the same run is done
    again.
    """
    setting, problem = SETTINGS[name], golden_problem(torch.float32)
    params = problem[0]
    uncut = run(name, problem)
    rng = random.Random(1)
    cuts = random_cuts(rng, params, 8)
    cut, again = run(name, problem, cuts), run(name, problem, cuts)
    for fqn in params:
        assert torch.equal(cut.params[fqn], again.params[fqn])
        assert all(torch.equal(s, again.state[fqn][key]) for key, s in cut.state[fqn].items())
    change = largest_changes([params, *uncut.history])
    share = setting.share(torch.float32)
    assert max(layout_error(cut.params, uncut.params, change, share).values()) <= 1.0
    equal = sum(int((cut.params[fqn] == p).sum()) for fqn, p in uncut.params.items()) / sum(
        p.numel() for p in params.values()
    )
    # Newton-Schulz and its Gram matrix round by layout
    assert equal == 1.0 or setting.exchanges
    figures.append(
        f"kernels | {name} | 8 virtual ranks: {equal:.1%} of the elements bit-equal to the uncut "
        "run after 20 steps"
    )


# names a folder of .safetensors files, which licences keep out of the repository
TRAINED = "PYLO_DIST_TRAINED_WEIGHTS"


def trained_weights() -> dict[str, tuple[str, dict[str, Any]]]:
    """Rule and settings by label: the built-in demo weights, and files whose name begins with that
    of an architecture.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {"demo": ("AdafacLO", {"weights": "demo"})}
    rules = {"small_fc": "AdafacLO", "velo": "VeLO", "celo2": "CELO2_base"}
    for path in (
        sorted(Path(os.environ[TRAINED]).glob("*.safetensors")) if TRAINED in os.environ else ()
    ):
        rule = next((rule for name, rule in rules.items() if path.stem.startswith(name)), None)
        # at this rate an update is no small part of its parameter, whose rounding would hide errors
        if rule is not None:
            found[path.name] = (rule, {"weights": str(path), "lr": 1.0})
    return found


def test_errors_with_trained_weights(figures: list[str]) -> None:
    """Trained numbers are larger than random ones and make features cancel; the same bound holds
    for them.
    """
    for label, (name, settings) in trained_weights().items():
        params, grads, losses = random_problem(random.Random(label), steps=4)
        problem: Problem = (
            params,
            [{k: None if g is None else 1e-2 * g for k, g in step.items()} for step in grads],
            losses,
        )
        truth, oracle, ours = (
            run(name, p, kernels=kernels, **settings)
            for p, kernels in ((in_float64(problem), True), (problem, False), (problem, True))
        )
        squares = [0.0, 0.0]
        for fqn, p in params.items():
            moved = truth.params[fqn] - p.double()
            floor = (
                FLOOR + float(torch.finfo(torch.float32).eps * p.double().norm() / moved.norm())
                if p.numel()
                else 0.0
            )
            own, error = (relative(r.params[fqn], truth.params[fqn], moved) for r in (oracle, ours))
            assert error <= 2 * own + floor, (label, fqn, tuple(p.shape), own, error)
            squares[0] += own**2
            squares[1] += error**2
        own, error = (math.sqrt(square / len(params)) for square in squares)
        assert error <= 2 * own, (label, own, error)
        figures.append(
            f"kernels | trained weights, {label}: relative error {error:.1e}, PyTorch {own:.1e}"
        )
    if "PYLO_DIST_TRAINED_WEIGHTS" not in os.environ:
        figures.append(
            "kernels | trained weights: PYLO_DIST_TRAINED_WEIGHTS names no folder, so the built-in "
            "and golden ones only"
        )


def test_threads_do_not_change_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    params = {
        "w": torch.randn(300, 700, generator=generator),
        "v": torch.randn(50_000, generator=generator),
    }
    grads = [
        {fqn: torch.randn(p.shape, generator=generator) for fqn, p in params.items()}
        for _ in range(2)
    ]
    problem: Problem = params, grads, [1.0, 0.9]  # type: ignore[assignment]
    for name in ("AdafacLO", "VeLO", "VeLO_halved"):
        one = run(name, problem)
        torch.set_num_threads(2)
        try:
            two = run(name, problem)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(one.params[fqn], two.params[fqn]) for fqn in params)
        assert all(
            torch.equal(state, two.state[fqn][key])
            for fqn in params
            for key, state in one.state[fqn].items()
        )
        assert all(not torch.equal(one.params[fqn], params[fqn]) for fqn in params)


@pytest.fixture
def auto() -> Iterator[Callable[[str], str]]:
    yield torch.ops.pylo_dist.instruction_set
    torch.ops.pylo_dist.instruction_set("auto")


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instruction_set: str, auto: Callable[[str], str]) -> None:
    try:
        assert auto(instruction_set) == instruction_set
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    for name in ("AdafacLO", "VeLO", "CELO2_base"):
        problem = random_problem(random.Random(5))
        truth, oracle, ours = (
            run(name, in_float64(problem)),
            run(name, problem, kernels=False),
            run(name, problem),
        )
        for fqn, p in problem[0].items():
            moved = truth.params[fqn] - p.double()
            floor = (
                FLOOR + float(torch.finfo(torch.float32).eps * p.double().norm() / moved.norm())
                if p.numel()
                else 0.0
            )
            own, error = (relative(r.params[fqn], truth.params[fqn], moved) for r in (oracle, ours))
            assert error <= 2 * own + floor, (fqn, tuple(p.shape), own, error)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_halved_state_has_the_same_bits_everywhere(
    instruction_set: str, auto: Callable[[str], str], figures: list[str]
) -> None:
    """Momenta and mean squares of the passes are those of the PyTorch path, on any cut and on every
    instruction set: without fused multiplications too. The parameters are as near as with float32
    state.
    """
    try:
        assert auto(instruction_set) == instruction_set
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    rounded = 0
    for name in ("AdafacLO_halved", "VeLO_halved", "CELO2_halved"):
        rng = random.Random(name)
        problem = random_problem(rng)
        params = problem[0]
        oracle = run(name, problem, kernels=False)
        ours = run(name, problem, random_cuts(rng, params, rng.choice([1, 2, 3])))
        assert all(o._lineup.batches[0].cache["kernels"] for o in ours.optimizers)
        for fqn, p in params.items():
            for key in oracle.state[fqn].keys() & {"momentum", "rms"}:
                state = ours.state[fqn][key]
                assert state.dtype == torch.bfloat16
                assert torch.equal(state, oracle.state[fqn][key]), (name, fqn, key)
                rounded += state.numel()
            if p.numel():
                moved = oracle.params[fqn] - p
                # Newton-Schulz drives small singular values towards 1, and with them errors
                share = 1e-3 if name == "CELO2_halved" else 1e-4
                assert relative(ours.params[fqn], oracle.params[fqn], moved) <= share, (name, fqn)
    assert rounded > 30_000
    figures.append(f"kernels | {instruction_set}, state in bfloat16 | {rounded} means bit-equal")


def test_elements_beyond_32_bits_are_rounded_alike() -> None:
    ours, wanted = (state["momentum"] for state in across_32_bits("AdafacLO_halved"))
    assert torch.equal(ours, wanted)
    assert bool((ours != 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "CELO2_base"])
def test_half_precision_parameters(name: str, dtype: torch.dtype) -> None:
    """State is float32 and follows the PyTorch path closely; a parameter may round the other way
    where the update is at a tie.
    """
    params, grads, losses = random_problem(random.Random(7))
    half: Problem = (
        {fqn: p.to(dtype) for fqn, p in params.items()},
        [
            {k: None if g is None else g.clamp(-100.0, 100.0).to(dtype) for k, g in step.items()}
            for step in grads
        ],
        losses,
    )
    oracle, ours = (
        run(name, half, kernels=False),
        run(name, half, random_cuts(random.Random(0), params, 3)),
    )
    for fqn in params:
        assert ours.params[fqn].dtype == dtype
        got, wanted = ours.params[fqn].float(), oracle.params[fqn].float()
        ulp = torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).tiny
        assert bool(((got - wanted).abs() <= ulp).all()), fqn
        assert float((got != wanted).float().mean()) < 0.05 or got.numel() < 50, fqn
        for key, state in oracle.state[fqn].items():
            assert relative(ours.state[fqn][key], state) <= 1e-5, (fqn, key)


def test_float_conversions_are_torchs() -> None:
    """Every 16-bit number goes through a step that moves nothing as it is, every 16-bit gradient is
    read as torch reads it.
    """
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = every.view(dtype)
        finite = numbers[numbers.isfinite()]
        problem: Problem = ({"p": finite}, [{"p": torch.ones_like(finite)}], [1.0])
        still = run("ELO", problem, lr=0.0, weight_decay=0.0, clip_grad=False)
        assert torch.equal(still.params["p"], finite)
        grads: Problem = ({"p": torch.zeros_like(finite)}, [{"p": finite}], [1.0])
        momentum = run("VeLO", grads).state["p"]["momentum"]
        assert torch.equal(momentum[0], run("VeLO", grads, kernels=False).state["p"]["momentum"][0])


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e10, 1e18, 1e30])
@pytest.mark.parametrize("name", ["AdafacLO_clipped", "ELO", "VeLO", "CELO2_base"])
def test_extreme_gradients(name: str, scale: float) -> None:
    """All of these clip or clamp, so that any float32 gradient leaves finite numbers, the same as
    on the PyTorch path.
    """
    params, grads, losses = random_problem(random.Random(3))
    wild: Problem = (
        params,
        [{k: None if g is None else g.sign() * scale for k, g in step.items()} for step in grads],
        losses,
    )
    how = {"clip_grad": True} if name == "CELO2_base" else {}  # its AdamW clamps nothing
    truth, oracle, ours = (
        run(name, in_float64(wild), **how),
        run(name, wild, kernels=False, **how),
        run(name, wild, **how),
    )
    for fqn, p in params.items():
        assert bool(ours.params[fqn].isfinite().all())
        moved = truth.params[fqn] - p.double()
        floor = (
            FLOOR + float(torch.finfo(torch.float32).eps * p.double().norm() / moved.norm())
            if p.numel()
            else 0.0
        )
        own, error = (relative(r.params[fqn], truth.params[fqn], moved) for r in (oracle, ours))
        assert error <= 2 * own + floor, (fqn, tuple(p.shape), own, error)


@pytest.mark.parametrize("name", ["AdafacLO", "AdafacLO_clipped", "ELO", "VeLO", "CELO2_base"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e25])
def test_nonfinite_gradients(name: str, bad: float) -> None:
    """What is counted, what "skip" leaves, and where "allow" puts NaN are those of the PyTorch
    path.
    """
    params, grads, losses = random_problem(random.Random(11), steps=2)
    victim = max(params, key=lambda fqn: params[fqn].numel())
    broken = grads[0][victim]
    assert broken is not None
    broken.view(-1)[7] = bad
    setting = SETTINGS[name]
    for nonfinite in ("skip", "allow"):
        ends, steps = [], []
        for kernels in (False, True):
            pieces = {fqn: torch.nn.Parameter(p.clone()) for fqn, p in params.items()}
            optimizer = setting.build(pieces.items(), nonfinite=nonfinite)
            with compiled.use_kernels(kernels):
                for step_grads, loss in zip(grads, losses, strict=True):
                    for fqn, p in pieces.items():
                        p.grad = step_grads[fqn]
                    optimizer.step(torch.tensor(loss))
            ends.append(
                {
                    (fqn, key): s
                    for fqn, p in pieces.items()
                    for key, s in {**optimizer.state[p], "p": p.detach()}.items()
                }
            )
            steps.append(int(optimizer.param_groups[0]["step"]))
        assert steps[0] == steps[1]
        for key, wanted in ends[0].items():
            assert torch.equal(ends[1][key].isnan(), wanted.isnan()), key
            assert torch.equal(ends[1][key].isinf(), wanted.isinf()), key
            torch.testing.assert_close(ends[1][key], wanted, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_inf_is_seen_in_16_bits(dtype: torch.dtype, kernels: bool) -> None:
    for max_grad_norm in (None, 1.0):
        param = torch.nn.Parameter(torch.randn(4, 8).to(dtype))
        optimizer = pylo_dist.AdafacLO(
            [param], weights="demo", nonfinite="skip", max_grad_norm=max_grad_norm
        )
        with compiled.use_kernels(kernels):
            for first in (math.inf, 1.0):
                param.grad = torch.randn_like(param)
                param.grad[0, 0] = first
                optimizer.step()
        assert optimizer.param_groups[0]["step"] == 1


def test_tensors_without_a_gradient() -> None:
    """VeLO's LSTM reads their moments too: all tensors follow the PyTorch path, and those at rest
    stay.
    """
    params, grads, losses = random_problem(random.Random(17))
    some: Problem = (
        params,
        [
            {k: None if k in ("t1", "t4") and t else g for k, g in step.items()}
            for t, step in enumerate(grads)
        ],
        losses,
    )
    for cuts in (1, random_cuts(random.Random(2), params, 3)):
        oracle, ours = run("VeLO", some, cuts, kernels=False), run("VeLO", some, cuts)
        for fqn in params:
            torch.testing.assert_close(ours.params[fqn], oracle.params[fqn], rtol=1e-5, atol=1e-7)
            for key, state in oracle.state[fqn].items():
                assert relative(ours.state[fqn][key], state) <= 1e-5, (fqn, key)


def test_zero_gradients() -> None:
    params, grads, losses = random_problem(random.Random(13))
    zero: Problem = (
        params,
        [{fqn: torch.zeros_like(p) for fqn, p in params.items()} for _ in grads],
        losses,
    )
    for name in ("AdafacLO", "VeLO", "CELO2_base"):
        oracle, ours = run(name, zero, kernels=False), run(name, zero)
        for fqn in params:
            assert bool(ours.params[fqn].isfinite().all())
            torch.testing.assert_close(ours.params[fqn], oracle.params[fqn], rtol=2e-6, atol=1e-7)


class Recorder(TorchDispatchMode):
    """Records the calls of this package's operators, with copies of their arguments, and counts all
    others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pylo_dist":
            copies = torch.utils._pytree.tree_map(
                lambda x: x.clone() if isinstance(x, Tensor) else x, args
            )
            self.calls.append((func, copies))
        else:
            self.others += 1
        return func(*args, **(kwargs or {}))


def stepped(tensors: int, name: str = "VeLO", resting: int = 0) -> Recorder:
    """What two steps of an optimizer over this many tensors call, some without a gradient; the
    second one is recorded.
    """
    params = {
        f"p{i}": torch.nn.Parameter(torch.randn(5) if i % 2 else torch.randn(3, 4))
        for i in range(tensors)
    }
    setting = SETTINGS[name]
    optimizer = setting.build(params.items())
    for _ in range(2):
        for p in list(params.values())[resting:]:
            p.grad = torch.randn_like(p)
        with Recorder() as recorder:
            optimizer.step(torch.tensor(1.0))
    return recorder


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "VeLO_halved", "CELO2_base"])
def test_opcheck(name: str) -> None:
    calls = stepped(4, name, resting=1).calls
    names = {func._schema.name.removeprefix("pylo_dist::") for func, _ in calls}
    assert names == {"gradient_pass", "feature_pass", "update_pass"} | (
        {"moment_pass"} if name.startswith("VeLO") else set()
    ) | ({"square_sums", "adamw_pass"} if name == "CELO2_base" else set())
    for func, args in calls:
        torch.library.opcheck(func, args)


def test_one_call_per_pass_for_any_number_of_tensors() -> None:
    few, many = stepped(10), stepped(60)
    assert len(few.calls) == len(many.calls) == 3
    # views of parameters and gradients, and unbind
    assert (many.others - few.others) / 50 <= 14, (few.others, many.others)


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "CELO2_base"])
def test_what_operators_keep_of_a_call_follows_tensors_that_move(name: str) -> None:
    """Beside an optimizer whose operators are given all tensors in every call."""
    runs = []
    for given_all in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator))
            for shape in ((3, 4), (5,), (2, 40), (7,))
        ]
        optimizer = SETTINGS[name].build([(f"p{i}", p) for i, p in enumerate(params)])
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=generator)
                if i == step:  # the first one comes in late
                    p.grad = None
            if step == 2:
                params[1].data = params[1].data.clone()
            if step == 3:
                optimizer.load_state_dict(optimizer.state_dict())
            if step == 4:
                params[2].data = params[2].data.t().clone().t()  # no longer contiguous
            with Recorder() if given_all else nullcontext():
                optimizer.step(torch.tensor(1.0))
        runs.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_operators_refuse_tensors_that_were_never_given() -> None:
    func, args = next((f, a) for f, a in stepped(4).calls if "feature_pass" in str(f))
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=True))
    given["workspace"] = [torch.zeros_like(room) for room in given["workspace"]]
    func(*given.values())  # keeps them
    nothing: dict[str, Any] = {k: [] for k in ("values", "momentum", "rms", "row_or_diag", "col")}
    func(*{**given, **nothing}.values())
    for room in given["workspace"]:
        room.zero_()
    with pytest.raises(RuntimeError, match="never given"):
        func(*{**given, **nothing}.values())


def test_operators_refuse_what_they_cannot_read() -> None:
    func, args = next((f, a) for f, a in stepped(4).calls if "gradient_pass" in str(f))
    items, boxes, active, grads, *rest = args
    freed = [g.clone() for g in grads]
    for grad in freed:
        grad.untyped_storage().resize_(0)
    for wrong, message in (
        ((items[:, 1:].contiguous(), boxes, active, grads), "not made for this library"),
        ((items, boxes, [*active[:-1], 99], grads), "no item 99"),
        ((items, boxes, active, [g.double() for g in grads]), "dtype"),
        ((items, boxes, active, [g[:1] for g in grads]), "elements"),
        ((items, boxes, active, grads[:-1]), "grads"),
        ((items, boxes, active, freed), "was freed"),
    ):
        with pytest.raises(RuntimeError, match=message):
            func(*wrong, *rest)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "CELO2_base"])
def test_gradients_may_be_gathered_before_the_step(name: str, kernels: bool) -> None:
    """In any order, and again for items whose gradient changed: the same bits as in the step."""
    setting = SETTINGS[name]
    shapes = [(40, 70), (130,), (3, 4, 5), ()]
    with compiled.use_kernels(kernels):
        ends = []
        for early in (False, True):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
            optimizer = setting.build(params)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape)
                if early:
                    good, params[2].grad = params[2].grad, params[2].grad + 1.0
                    optimizer.early.arrived([params[2]])
                    optimizer.early.arrived([params[0]])
                    params[2].grad = good
                    optimizer.early.arrived([params[2]])
                optimizer.step(torch.tensor(1.0))
            ends.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_without_the_library_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "library", lambda device_type: "it was not built")
    compiled._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="pylo_dist"):
        problem = golden_problem(torch.float32)
        without = run_virtual(
            pylo_dist.VeLO,
            problem[0],
            1,
            problem[1][:2],
            losses=problem[2][:2],
            **SETTINGS["VeLO"].arguments,
        )
    assert [record.getMessage() for record in caplog.records] == [
        "pure PyTorch path on cpu: it was not built"
    ]
    with compiled.use_kernels(False):
        oracle = run_virtual(
            pylo_dist.VeLO,
            problem[0],
            1,
            problem[1][:2],
            losses=problem[2][:2],
            **SETTINGS["VeLO"].arguments,
        )
    assert all(torch.equal(without.params[fqn], p) for fqn, p in oracle.params.items())


def test_float64_and_foreign_networks_take_the_pytorch_path() -> None:
    for dtype, served in ((torch.float32, True), (torch.float64, False)):
        param = torch.nn.Parameter(torch.randn(4, 5, dtype=dtype))
        optimizer = pylo_dist.VeLO([param], num_steps=10, weights=velo_weights("small"))
        param.grad = torch.randn_like(param)
        optimizer.step(torch.tensor(1.0))
        batch = optimizer._ready().work[0][1]
        assert (batch.cache["kernels"] is not None) == served


def test_doctor_says_what_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    versions, *_, cpu, cuda = capsys.readouterr().out.splitlines()
    assert pylo_dist.__version__ in versions
    assert torch.__version__ in versions
    assert (
        cpu
        == f"cpu: compiled kernels, instruction set {torch.ops.pylo_dist.instruction_set('auto')}"
    )
    assert cuda.startswith("cuda: ")
    assert main(["doctor", "--require", "cpu"]) == 0
    without = cuda.startswith("cuda: plain PyTorch")
    assert main(["doctor", "--require", "cuda"]) == int(without)
    assert ("error: --require cuda: plain PyTorch" in capsys.readouterr().err) == without


def test_cuda_without_a_toolkit_is_an_error_at_once() -> None:
    command = [sys.executable, "setup.py", "--version"]
    wanted = {**os.environ, "PYLO_DIST_CUDA": "1", "CUDA_HOME": "/nonexistent"}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=wanted,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "PYLO_DIST_CUDA=1, but there is no nvcc" in done.stderr


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_copies_into_a_bucket_are_those_of_torch(
    instruction_set: str, auto: Callable[[str], str]
) -> None:
    try:
        auto(instruction_set)
    except RuntimeError:
        pytest.skip(f"this machine has no {instruction_set}")
    copies.check_pairs(torch.ops.pylo_dist.copy_pass, "cpu")
    copies.check_many(torch.ops.pylo_dist.copy_pass, "cpu")


def test_copies_of_many_elements_are_dealt_to_threads() -> None:
    """A row in several jobs: its ends are those of all of them, NaN of any."""
    source = torch.randn(3 << 20)
    source[[5, 2 << 20]] = torch.tensor([9.0, -9.0])
    target, ends = torch.empty_like(source), torch.zeros(2, 2)
    torch.ops.pylo_dist.copy_pass([target], [source], ends)
    assert torch.equal(target, source)
    assert ends[0].tolist() == [-9.0, 9.0]
    source[(2 << 20) + 7] = torch.nan
    torch.ops.pylo_dist.copy_pass([target], [source], ends)
    assert bool(ends[0].isnan().all())


def test_what_cannot_be_copied_is_refused() -> None:
    ends, x = torch.zeros(2, 2), torch.zeros(4, 6)
    for targets, sources, words in (
        ([x], [x, x], "sources has 2 tensors, wanted 1"),
        ([x], [x[:3]], "source 0 has another shape than its target"),
        ([x], [x[0]], "source 0 has another shape than its target"),
        ([x.t()], [x.t()], "a source has neighbours far apart"),
        ([x[:0]], [x[:0]], "target 0 is empty"),
        ([x.double()], [x.double()], "a source has a dtype without a kernel"),
        ([x.view(2, 2, 6)], [x.view(2, 2, 6)], "a source has 3 dims, wanted 1 or 2"),
        ([x, x], [x, x], "ends has 4 elements, wanted 6"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.pylo_dist.copy_pass(targets, sources, ends)


def test_opcheck_of_copies() -> None:
    args = ([torch.empty(3), torch.empty(2, 4)], [torch.ones(3), torch.ones(2, 4)])
    torch.library.opcheck(torch.ops.pylo_dist.copy_pass.default, (*args, torch.zeros(3, 2)))
