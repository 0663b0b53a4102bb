"""Every argument of every constructor with values it was not made for: it trains with them, or an
error says the argument's name.

Background: settings come from JSON, from command lines and from notebooks. A bare error out of the
depths, a step that never ends, or weights full of NaN tell nobody which of twenty settings was
wrong.
"""

from __future__ import annotations

import inspect
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pylo_dist
from pylo_dist.adapters.deepspeed.arguments import probe
from pylo_dist.optimizer.checks import shown
from pylo_dist.optimizer.settings import arguments_of
from support.optimizers import CELO2, Roles, cases

pytestmark = pytest.mark.filterwarnings("ignore")  # odd values are warned of, too


class Silent:
    """An object without a text."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


JSON: list[Any] = [
    None, float("nan"), float("inf"), float("-inf"), -1, 0, 1, 0.5, -0.5, True, False, 10**30,
    10**400, 1e300, 5e-324, "", "x", "1", "a\x00b\n", [], {}, [[]], [None], {"a": {}}, ["x", "y"],
]  # fmt: skip
PYTHON: list[Any] = [
    object(), Silent(), b"x", (), {1: 2}, {2}, 1j, Decimal("0.1"), int, len, 10**5000,
    torch.tensor(0.5), torch.tensor(True), torch.tensor(1 + 2j), torch.ones(3), torch.float32,
    torch.device("meta"), np.float32(0.5), np.int64(1), np.float64("nan"), np.bool_(True),
    np.ones(1),
]  # fmt: skip
IN_SEQUENCES: list[Any] = [None, float("nan"), float("inf"), -1, 1, True, 10**30, 10**400, "x", []]
FOUND = cases(Roles(widths={}, embedding="embedding"), built_in=True)
# weights are read once
CASES = {
    name: (
        case.face,
        {**case.arguments, "weights": case.build(nn.Linear(3, 2).parameters()).weights},
    )
    for name, case in FOUND.items()
}


NAN = "accepted, then NaN"


def variants(default: object) -> Iterator[Any]:
    """The odd values, and for sequences those with one odd entry."""
    yield from (*JSON, *PYTHON)
    if isinstance(default, tuple):
        for odd in IN_SEQUENCES:
            yield [*default[:-1], odd]


@contextmanager
def in_time(seconds: float = 20.0) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def trouble(build: Callable[[nn.Module], Any], key: str) -> str:
    """What is wrong with the answer to a value; "" where it is right."""
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    try:
        optimizer = build(net)
    except (TypeError, ValueError) as error:
        if key not in str(error):
            return f"{type(error).__name__} without the key: {str(error)[:150]}"
        if not all(map(torch.equal, before, net.parameters())):
            return "refused, and a parameter has changed"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    try:
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step(torch.tensor(1.0))
    except Exception as error:
        return f"accepted, then {type(error).__name__}: {str(error)[:150]}"
    return "" if all(bool(p.isfinite().all()) for p in net.parameters()) else NAN


def walk(faces: Iterator[tuple[str, Any, Any]]) -> list[str]:
    """What is wrong, of (argument, value, build)."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, value, build in faces:
            with in_time():
                said = trouble(build, key)
            # e to the power of what a network gives, at a thousand times the factor it has learned
            if said and not (key == "exp_mult" and said == NAN):
                found.append(f"{key} = {shown(value)}: {said}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_faces(name: str) -> None:
    face, arguments = CASES[name]

    def tries() -> Iterator[tuple[str, Any, Any]]:
        for key, default in arguments_of(face).items():
            for value in variants(default):
                given = {**arguments, key: value}
                yield key, value, lambda net, given=given: face(net.parameters(), **given)
        for value in (*JSON, *PYTHON):
            yield "param", value, lambda _, value=value: face(value, **arguments)
            yield "param", value, lambda _, value=value: face([value], **arguments)
            yield "param", value, lambda _, value=value: face([{"params": value}], **arguments)

    wrong = walk(tries())
    assert not wrong, "\n".join(wrong)


def arguments_in(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function takes by name, with the defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def test_zero_optimizer() -> None:
    def tries() -> Iterator[tuple[str, Any, Any]]:
        face, given = CASES["AdafacLO"]
        for key in arguments_in(pylo_dist.ZeroOptimizer):
            # of a bad parameter the error says its name
            said = {"model_or_params": "param"}.get(key, key)
            for value in (*JSON, *PYTHON):

                def build(net: nn.Module, key: str = key, value: Any = value) -> Any:
                    named = {"model_or_params": net, "optimizer_class": face, key: value}
                    return pylo_dist.ZeroOptimizer(**named, **given)

                yield said, value, build
        for value in (*JSON, *PYTHON):
            own = {**given, "weight_decay": value}
            yield "weight_decay", value, lambda net, o=own: pylo_dist.ZeroOptimizer(net, face, **o)

    wrong = walk(tries())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_numpy(name: str) -> None:
    """As torch's optimizers take them, at construction, in a group and set later; what is kept are
    Python's, with the bits of those, which checkpoints can keep.
    """
    face, arguments = CASES[name]
    defaults = arguments_of(face)
    counts = {k: v for k, v in defaults.items() if type(v) is int} | {
        k: v for k, v in arguments.items() if type(v) is int
    }
    rates = {k: 0.5 for k, v in defaults.items() if type(v) is float and k != "exp_mult"}
    if name == "ELO_CELO2":  # which refuses it
        del rates["adam_eps"]

    def trained(number: Any, count: Any, zero: bool) -> Any:
        net = model()
        given = {**arguments, **{k: count(v) for k, v in counts.items()}}
        given |= {k: number(v) for k, v in rates.items()}
        groups = [
            {"params": [("w", net.weight)], "lr": number(0.25)},
            {"params": [("b", net.bias)]},
        ]
        optimizer = (
            pylo_dist.ZeroOptimizer(
                groups,
                face,
                bucket_cap_mb=number(2.5),
                timeout=number(9.0),
                stage=count(1),
                check_replicas_every=count(1),
                **given,
            )
            if zero
            else face(groups, **given)
        )
        for step in range(3):
            optimizer.param_groups[1]["lr"] = number(2.0**-step)
            net(torch.ones(1, 3)).sum().backward()
            optimizer.step(torch.tensor(1.0))
            optimizer.zero_grad()
        return optimizer.state_dict(), [p.detach() for p in net.parameters()]

    for zero in (False, True):
        own, values = trained(float, int, zero)
        for number in (np.float32, np.float16, np.float64):
            state, theirs = trained(number, np.int64, zero)
            assert all(map(torch.equal, values, theirs)), (number, zero)
            for mine, group in zip(own["param_groups"], state["param_groups"], strict=True):
                for key, value in mine.items():
                    assert type(group[key]) is type(value), (key, number, zero)
                    if not isinstance(value, torch.Tensor):
                        assert group[key] == value, (key, number, zero)


def test_shard() -> None:
    """Where the arguments are right it misses the other ranks."""
    wrong = []
    for key in arguments_in(pylo_dist.shard):
        for value in (*JSON, *PYTHON):
            given = {"model": model(), "optimizer_class": pylo_dist.AdafacLO, key: value}
            with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is looked at)
                pylo_dist.shard(**given, weights="demo")
            if key not in str(caught.value) and "is not initialised" not in str(caught.value):
                wrong.append(f"{key} = {shown(value)}: {caught.value}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CASES)
def test_json_of_deepspeed(name: str) -> None:
    face, arguments = CASES[name]
    given = {key: value for key, value in arguments.items() if key != "clip_grad"}
    wrong = []
    for key, default in arguments_of(face).items():
        for value in variants(default):
            try:
                probe(face, {**given, key: value})
            except (TypeError, ValueError) as error:
                if key not in str(error):
                    wrong.append(f"{key} = {shown(value)}: {error}")
    for value in JSON:
        with pytest.raises(ValueError, match="is no parameter of"):
            probe(face, {**given, "learning_rate": value})
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "build",
    [
        lambda given: pylo_dist.CELO2(given, weights=CELO2),
        lambda given: pylo_dist.ZeroOptimizer(given, pylo_dist.CELO2, weights=CELO2),
    ],
    ids=["plain", "zero"],
)
def test_the_result_of_an_operation_is_refused_by_name(build: Any) -> None:
    result = torch.nn.Parameter(torch.ones(3, 4)) * 2
    with pytest.raises(ValueError, match=r"'double' is the result of an operation \(<MulBackward0"):
        build([("double", result)])
