"""Whoever observes a step is told of its phases, in order and one within the other; without an
observer they cost nothing.

Background: the benchmarks of the README divide a step by these phases, so a mark that is lost, or
lies in another place, would change what a figure means without anybody noticing. And the marks
stand in the hot path of every step.
"""

from __future__ import annotations

import ast
import re
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from pylo_dist.core import trace
from pylo_dist.maths import compiled
from support.optimizers import CELO2, small_fc
from support.ranks import run_ranks
from support.streams import early_pass_on_a_cpu

PACKAGE = Path(pylo_dist.__file__).parent


class Heard:
    """Phases as "name(those within)", and the bytes of the buffers."""

    def __init__(self) -> None:
        self.open: list[tuple[str, list[str]]] = [("", [])]
        self.moved: dict[str, int] = {}

    def begin(self, name: str, buffer: Tensor | None) -> None:
        self.open.append((name, []))
        if buffer is not None:
            size = buffer.numel() * buffer.element_size()
            self.moved[name] = self.moved.get(name, 0) + size

    def end(self, name: str) -> None:
        begun, within = self.open.pop()
        assert begun == name
        self.open[-1][1].append(f"{name}({', '.join(within)})" if within else name)

    def taken(self) -> list[str]:
        """The outermost phases since the last call."""
        assert len(self.open) == 1
        found, self.open[0] = self.open[0][1], ("", [])
        return found


def model_of(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def adafac(model: nn.Module, **kwargs: Any) -> pylo_dist.ZeroOptimizer:
    return pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc(), **kwargs)


def observed(rank: int, world: int, overlap: bool, early: bool = False) -> dict[str, Any]:
    """A step and the forward pass after it, with two buckets; `early`: as where work is queued."""
    heard, model = Heard(), model_of(16, 24, 8)
    with early_pass_on_a_cpu() if early else nullcontext():
        optimizer = adafac(model, overlap=overlap, stage=2, bucket_cap_mb=0.0005)
    found: dict[str, Any] = {"buckets": len(optimizer.buckets)}
    with compiled.use_kernels(False):
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        with trace.observe(heard):
            model(torch.ones(2, 16)).sum().backward()
            found["backward"] = heard.taken()
            heard.moved.clear()
            optimizer.step()
            found["step"] = heard.taken()
            model(torch.ones(2, 16))
            found["forward"] = heard.taken()
        optimizer.zero_grad()
        model(torch.ones(2, 16)).sum().backward()
    model.state_dict()
    found["after"], found["moved"] = heard.taken(), heard.moved
    found["bytes"] = sum(bucket.flat.numel() * 4 for bucket in optimizer.buckets)
    return found


INNER = (
    "step: inner("
    "step: A, collective: all_reduce, sums: wait, step: judge, "
    "step: B, collective: all_reduce, sums: wait, step: C(step: prepare))"
)
LAUNCH = "reduce: launch(collective: reduce_scatter)"


@pytest.mark.parametrize("early", [True, False])
def test_phases_of_a_zero_step_in_order(early: bool) -> None:
    gather = "gather: start(collective: all_gather, collective: all_gather)"
    land = f"reduce: land(reduce: wait{', step: early' if early else ''})"
    for found in run_ranks(2, observed, True, early):
        assert found["buckets"] == 2
        # the parameters that the step before had sent arrive in the forward pass
        assert found["backward"] == ["gather: wait", "gather: wait", LAUNCH, LAUNCH, land, land]
        assert found["step"] == [INNER, gather]
        assert found["forward"] == ["gather: wait", "gather: wait"]
        assert found["after"] == []
        assert found["moved"]["collective: all_gather"] == found["bytes"]


def test_phases_without_overlap() -> None:
    gather = ("collective: all_gather",) * 2 + ("gather: wait",) * 2
    for found in run_ranks(2, observed, False):
        assert found["backward"] == []
        land = "reduce: land(reduce: wait)"
        first = [LAUNCH, LAUNCH, land, land]
        assert found["step"] == [*first, INNER, f"gather: start({', '.join(gather)})"]
        assert found["forward"] == []


@pytest.mark.skipif(bool(compiled.library("cpu")), reason="the CPU passes are not built")
def test_compiled_passes_lie_in_the_pass_they_belong_to() -> None:
    heard, model = Heard(), model_of(4, 3)
    optimizer = adafac(model, overlap=False)
    model(torch.ones(2, 4)).sum().backward()
    with trace.observe(heard):
        optimizer.step()
    inner = next(name for name in heard.taken() if name.startswith("step: inner"))
    assert inner == (
        "step: inner("
        "step: A(kernels: gradient_pass), step: judge, step: B(kernels: feature_pass), "
        "step: C(step: prepare, kernels: update_pass))"
    )


def exchanged(rank: int, world: int) -> list[str]:
    """A step of CELO2, whose matrices go to an owner each and come back."""
    heard, model = Heard(), model_of(16, 24, 8)
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.CELO2, weights=CELO2, overlap=False)
    model(torch.ones(2, 16)).sum().backward()
    with trace.observe(heard):
        optimizer.step()
    return [name for name in heard.taken() if name.startswith("step: inner")]


def test_every_phase_of_a_step_has_a_letter_of_its_own() -> None:
    for (inner,) in run_ranks(2, exchanged):
        letters = re.findall(r"step: ([A-Z])\b", inner)
        assert letters == list("ABCDE")[: len(letters)]
        assert inner.count("collective: all_to_all, sums: wait") == 2


def test_an_error_ends_its_phases_and_an_observer_gives_way() -> None:
    outer, inner = Heard(), Heard()
    with trace.observe(outer):
        ends = pytest.raises(ZeroDivisionError)
        with trace.observe(inner), ends, trace.phase("a"), trace.phase("b"):
            raise ZeroDivisionError
        with trace.phase("c"):
            pass
    assert (inner.taken(), outer.taken()) == (["a(b)"], ["c"])


def test_unobserved_phases_are_one_object() -> None:
    """So a mark costs a comparison and two empty calls: no object is made, nothing remembered."""
    assert trace.phase("step: A") is trace.phase("step: B", torch.ones(1))
    calls = []

    @trace.phased("a")
    def marked(x: int) -> int:
        calls.append(x)
        return x + 1

    assert marked(1) == 2
    heard = Heard()
    with trace.observe(heard):
        assert marked(2) == 3
    assert (calls, heard.taken()) == ([1, 2], ["a"])


def test_all_marks_are_documented() -> None:
    assert trace.__doc__ is not None
    kinds = "step|sums|kernels|reduce|gather|collective"
    named = set(re.findall(rf"^    ((?:{kinds}): \w+)", trace.__doc__, re.MULTILINE))
    marks = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) in ("trace.phase", "trace.phased"):
                names = (part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant))
                marks |= {part.value for part in names}
    marks.remove("step: ")  # a rule has as many phases after A as it has requests
    assert marks | {"step: B", "step: C"} == named
