"""AdamW's compiled passes: means as on the PyTorch path to the bit, parameters to the rounding of a
square root, and one result on every cut and instruction set; the operators. They serve Celo-Adam,
and of CELO2 and ELO_CELO2 the tensors that no network moves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pylo_dist.maths import compiled
from support.adamw_checks import (
    CASES,
    LENGTHS,
    check_near,
    check_state,
    long_problem,
    same_bits,
)
from support.kernels import across_32_bits, random_cuts, random_problem, run
from support.virtual import SETTINGS

pytestmark = pytest.mark.skipif(bool(compiled.library("cpu")), reason=compiled.library("cpu"))


@pytest.fixture
def choose() -> Iterator[Callable[[str], None]]:
    """Of the instruction sets one for this test."""

    def chosen(name: str) -> None:
        try:
            torch.ops.pylo_dist.instruction_set(name)
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])

    yield chosen
    torch.ops.pylo_dist.instruction_set("auto")


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_one_step_everywhere(
    instruction_set: str, choose: Callable[[str], None], figures: list[str]
) -> None:
    moved = 0
    for label, (name, settings) in CASES.items():
        rng = random.Random(label)
        problem = random_problem(rng, steps=2)
        cuts = random_cuts(rng, problem[0], rng.choice([2, 3]))
        oracle = run(name, problem, kernels=False, **settings)
        usual = run(name, problem, **settings)
        choose(instruction_set)
        ours = run(name, problem, cuts, **settings)
        torch.ops.pylo_dist.instruction_set("auto")
        assert any(o._lineup.batches[0].cache["adamw"][1] for o in ours.optimizers)
        same_bits(ours, usual)
        check_state(ours, oracle)
        moved += check_near(ours, oracle, problem)
    assert moved > 4_000
    figures.append(f"kernels | {instruction_set}, AdamW | {moved} elements, means bit-equal")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_parameters_of_16_bits(dtype: torch.dtype) -> None:
    """Means are those of the PyTorch path; the value is rounded to nearest, and may be the next one
    where the update is at a tie.
    """
    params, grads, losses = random_problem(random.Random(3))
    half = {fqn: p.to(dtype) for fqn, p in params.items()}
    some = [
        {k: None if g is None else g.clamp(-100.0, 100.0).to(dtype) for k, g in step.items()}
        for step in grads
    ]
    name, settings = CASES["CeloAdam"]
    oracle = run(name, (half, some, losses), kernels=False, **settings)
    ours = run(name, (half, some, losses), 2, **settings)
    check_state(ours, oracle)
    differ = sum(int((ours.params[fqn] != p).sum()) for fqn, p in oracle.params.items())
    assert differ <= 1e-3 * sum(p.numel() for p in params.values())
    assert all(p.dtype == dtype for p in ours.params.values())


def test_threads_and_long_tensors() -> None:
    """Several parts of a tensor, with a tail; the sums of `stats()` too."""
    name, problem = "CeloAdam_halved", long_problem(LENGTHS)
    oracle, one = run(name, problem, kernels=False), run(name, problem)
    torch.set_num_threads(2)
    try:
        two = run(name, problem)
    finally:
        torch.set_num_threads(1)
    same_bits(two, one)
    check_state(one, oracle)
    assert check_near(one, oracle, problem) > 50_000
    for mine, other, theirs in zip(
        *(r.optimizers[0].stats().values() for r in (one, two, oracle)), strict=True
    ):
        for key, value in theirs.items():
            assert float(mine[key]) == float(other[key])
            assert float(mine[key]) == pytest.approx(float(value), rel=1e-5), key


def test_elements_beyond_32_bits_are_rounded_alike() -> None:
    """A piece across the place where the upper word of an element's number changes."""
    ours, wanted = across_32_bits("CeloAdam_halved")
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours[key], wanted[key])
        assert bool((ours[key] != 0).all())


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    """And NaN that is let through makes its tensor NaN, and no other."""
    params, grads, losses = long_problem((100, 70))
    bad = [dict(grads[0])]
    bad[0]["t0"] = grads[0]["t0"].clone()  # type: ignore[union-attr]
    bad[0]["t0"][5] = float("nan")  # type: ignore[index]
    skipped = run("CeloAdam", (params, bad, losses[:1]), nonfinite="skip")
    assert all(torch.equal(skipped.params[fqn], p) for fqn, p in params.items())
    assert all(not s.any() for state in skipped.state.values() for s in state.values())
    allowed = run("CeloAdam", (params, bad, losses[:1]), nonfinite="allow")
    assert allowed.params["t0"].isnan().nonzero().tolist() == [[5]]
    assert allowed.params["t1"].isfinite().all()


class Recorder(TorchDispatchMode):
    """Records the calls of AdamW's operators, with copies of their arguments, and counts the others
    that are no views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pylo_dist" and func._schema.name.split("::")[1] in (
            "square_sums",
            "adamw_pass",
        ):
            copies = torch.utils._pytree.tree_map(
                lambda x: x.clone() if isinstance(x, Tensor) else x, args
            )
            assert func._schema.name not in self.calls
            self.calls[func._schema.name.split("::")[1]] = func, copies
        elif func.namespace == "aten":
            self.others += not func.is_view
        return func(*args, **(kwargs or {}))


def recorded(name: str, tensors: int) -> Recorder:
    """Of the second of two steps."""
    params = [torch.nn.Parameter(torch.randn(5 + i % 3)) for i in range(tensors)]
    optimizer = SETTINGS[name].build([(f"t{i}", p) for i, p in enumerate(params)])
    for step in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        recorder = Recorder()
        if step:
            with recorder:
                optimizer.step(torch.tensor(1.0))
        else:
            optimizer.step(torch.tensor(1.0))
    return recorder


def test_one_call_for_any_number_of_tensors() -> None:
    few, many = recorded("CeloAdam", 10), recorded("CeloAdam", 60)
    assert set(few.calls) == set(many.calls) == {"square_sums", "adamw_pass"}
    assert many.others - few.others <= 50, (few.others, many.others)


def test_opcheck() -> None:
    for func, args in recorded("CeloAdam_halved", 3).calls.values():
        torch.library.opcheck(func, args)


def test_operators_refuse_what_they_cannot_read() -> None:
    func, args = recorded("CeloAdam_halved", 3).calls["adamw_pass"]
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=True))
    freed = [g.clone() for g in given["grads"]]
    for grad in freed:
        grad.untyped_storage().resize_(0)
    for changed, said in (
        ({"active": [0, 1, 99]}, "no item 99"),
        ({"grads": given["grads"][:-1]}, "grads has 2 tensors, wanted 3"),
        ({"grads": [g.double() for g in given["grads"]]}, "dtype without a kernel"),
        ({"grads": [g[:1] for g in given["grads"]]}, "elements"),
        ({"grads": freed}, "was freed"),
        ({"means": [m.float() for m in given["means"]]}, "a mean has the wrong dtype"),
        ({"rounding": []}, "a mean has the wrong dtype"),
        ({"rounding": given["rounding"][:1]}, "rounding has 1 tensors"),
        ({"rounding": [0 * given["rounding"][0], given["rounding"][1]]}, "runs of no element"),
        ({"rule": given["rule"][:-1]}, "rule has 6 numbers, wanted 7"),
        ({"numbers": given["numbers"][:2]}, "numbers has 10 elements, wanted 15"),
    ):
        with pytest.raises(RuntimeError, match=said):
            func(*{**given, **changed}.values())
