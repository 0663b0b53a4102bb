"""Gradients that arrive before the step, for any rule: one without an early pass is told of them in
vain, one with its own reads each gradient once, and again where it was changed.

Whatever happens to a gradient between its arrival and the step, the step must be the one of a plain
optimizer, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from pylo_dist.core.requests import Request, Sum
from pylo_dist.core.rule import Batch, LearnedRule
from pylo_dist.core.shards import TensorShard
from pylo_dist.core.state import StateField
from pylo_dist.maths.reference import commit, gradient_sums, move
from pylo_dist.weights import Architecture, MetaNetwork, load_weights
from support.streams import early_pass_on_a_cpu

SHAPES = {"matrix": (6, 5), "bias": (5,), "scalar": ()}


class Late(LearnedRule):
    """p <- p - lr m / (1 + |g|), with m a momentum and |g| over the whole tensor; has no early
    pass.
    """

    name = "late"

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        return {"momentum": StateField()}

    def read(self, batch: Batch, a: Sum, i: int) -> None:
        param = batch.items[i].param
        gradient_sums(param.grad, param.shard, None, a.vectors[i][:0], a.audits[i])
        a.vectors[i] += param.grad.double().square().sum()

    def first_sum(self, batch: Batch) -> Sum:
        a = batch.new_sum("A", lambda item: 1, audited=True)
        for i, _ in batch.candidates():
            self.read(batch, a, i)
        return a

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        a = self.first_sum(batch)
        yield a
        for i, item in batch.candidates():
            momentum, norm = item.state["momentum"], (a.vectors[i] * batch.scale[i] ** 2).sqrt()
            g = item.param.grad.to(momentum.dtype) * batch.scale[i].to(momentum.dtype)
            commit(momentum, 0.9 * momentum + 0.1 * g, batch.moves[i])
            old = item.param.value.to(momentum.dtype, copy=True)
            new = old - (item.hyper["lr"] / (1.0 + norm)).to(old.dtype) * momentum
            move(item.param.value, old, new, batch.moves[i], batch.update_squares[i])


class Early(Late):
    """The same rule, which reads gradients as they arrive.

    Attributes:
        calls: the items of every gradient pass, the last of a step being the step's own.
    """

    name = "early"

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def begun(self, batch: Batch) -> Sum:
        a = batch.reused_sum("A", lambda item: 1, audited=True)
        return a if batch.summed else a.zero_()

    def gradient_pass(self, batch: Batch, indices: Iterable[int]) -> None:
        a = self.begun(batch)
        self.calls.append(list(indices))
        for i in self.calls[-1]:
            self.read(batch, a, i)
            batch.summed.add(i)

    def forget_gradient(self, batch: Batch, i: int) -> None:
        a = self.begun(batch)
        a.vectors[i].zero_()
        a.audits[i].zero_()
        batch.summed.discard(i)

    def first_sum(self, batch: Batch) -> Sum:
        self.gradient_pass(batch, [i for i, _ in batch.candidates() if i not in batch.summed])
        return self.begun(batch)


NOTHING = Architecture("nothing", {"unused": (1,)}, decays={})


def face(rule: type[LearnedRule]) -> Any:
    class Face(pylo_dist.LearnedOptimizer):
        def __init__(
            self, params: Any, *, max_grad_norm: float | None = None, **others: Any
        ) -> None:
            network: MetaNetwork = load_weights({"unused": torch.zeros(1)}, NOTHING)
            defaults = {"lr": 0.5, "max_grad_norm": max_grad_norm}
            super().__init__(params, rule(), network, defaults, **others)

    return Face


class BuiltIn(pylo_dist.AdafacLO):
    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, weights="demo", **kwargs)


FACES: dict[str, Any] = {"late": face(Late), "early": face(Early), "built in": BuiltIn}
Named = list[tuple[str, nn.Parameter]]


def parameters() -> Named:
    generator = torch.Generator().manual_seed(0)
    return [
        (fqn, nn.Parameter(torch.randn(shape, generator=generator)))
        for fqn, shape in SHAPES.items()
    ]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


def everything(optimizer: Any) -> list[Tensor]:
    found = []
    for group in optimizer.param_groups:
        found += [group["step"].clone()]
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            found += [param.detach().clone(), *(t.clone() for t in state.values())]
    return found


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(everything(a), everything(b), strict=True))


def bring(named: Named, step: int) -> None:
    for (_, param), grad in zip(named, gradients(step), strict=True):
        param.grad = grad


def _nothing(optimizer: Any, named: Named) -> None:
    pass


def _in_place(optimizer: Any, named: Named) -> None:
    named[0][1].grad.mul_(2.0)


def _replaced(optimizer: Any, named: Named) -> None:
    named[0][1].grad = named[0][1].grad * 3.0


def _gone(optimizer: Any, named: Named) -> None:
    named[1][1].grad = None


def _all_gone(optimizer: Any, named: Named) -> None:
    for _, param in named:
        param.grad = None


def _without_a_trace(optimizer: Any, named: Named) -> None:
    for _, param in named:
        param.grad.data.mul_(0.5)
    optimizer.early.forget()


def _again(optimizer: Any, named: Named) -> None:
    named[2][1].grad.add_(1.0)
    optimizer.early.arrived([named[2][1]])


def _forgotten_and_again(optimizer: Any, named: Named) -> None:
    optimizer.early.forget()
    named[0][1].grad.data.mul_(0.5)
    optimizer.early.arrived([named[0][1]])


def _frozen(optimizer: Any, named: Named) -> None:
    named[0][1].requires_grad_(False)


def _state_replaced(optimizer: Any, named: Named) -> None:
    state = optimizer.state[named[0][1]]
    state.update({name: tensor.clone() for name, tensor in state.items()})


def _loaded(optimizer: Any, named: Named) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _values_moved(optimizer: Any, named: Named) -> None:
    for _, param in named:
        param.data.add_(0.25)


def _memory_replaced(optimizer: Any, named: Named) -> None:
    for _, param in named:
        param.data = param.data + 0.25


def _step_fails(optimizer: Any, named: Named) -> None:
    optimizer.fail_next_step(ValueError("not this one"))
    with pytest.raises(ValueError, match="not this one"):
        optimizer.step()


def _step_is_not_taken(optimizer: Any, named: Named) -> None:
    good, named[0][1].grad = named[0][1].grad, torch.full_like(named[0][1], torch.nan)
    optimizer.early.arrived(param for _, param in named)
    with pytest.raises(pylo_dist.NonFiniteGradientError, match="'matrix'"):
        optimizer.step()
    named[0][1].grad = good


BETWEEN: list[Callable[[Any, Named], None]] = [
    _nothing,
    _in_place,
    _replaced,
    _gone,
    _all_gone,
    _without_a_trace,
    _again,
    _forgotten_and_again,
    _frozen,
    _state_replaced,
    _loaded,
    _values_moved,
    _memory_replaced,
    _step_fails,
    _step_is_not_taken,
]


@pytest.mark.parametrize("clipped", [None, 0.5], ids=["plain", "clipped"])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("name", FACES)
def test_the_step_is_the_plain_one(
    name: str, between: Callable[[Any, Named], None], clipped: float | None
) -> None:
    """Two of three gradients arrive early, something happens, and the step comes; then another."""
    runs = []
    for early in (True, False):
        named = parameters()
        optimizer = FACES[name](named, max_grad_norm=clipped)
        if not early:
            optimizer.early.arrived = lambda params: None  # the same run, of which nobody hears
        for step in range(3):
            bring(named, step)
            optimizer.early.arrived([named[0][1]])
            optimizer.early.arrived(param for _, param in named[2:])
            if step == 1:
                between(optimizer, named)
            optimizer.step()
        runs.append(optimizer)
    assert same(*runs)


def test_parameters_that_are_no_view_may_move_too() -> None:
    """The items of such parameters hold a copy, which may be out of date when the step comes."""
    for build in FACES.values():
        runs = []
        for early in (True, False):
            generator = torch.Generator().manual_seed(0)
            turned = nn.Parameter(torch.randn(5, 6, generator=generator).t())
            assert not turned.is_contiguous()
            optimizer = build([turned])
            for _ in range(2):
                turned.grad = torch.randn(6, 5, generator=generator)
                if early:
                    optimizer.early.arrived([turned])
                turned.data.add_(1.0)
                optimizer.step()
            runs.append(optimizer)
        assert same(*runs)


def test_a_rule_of_its_own_reads_each_gradient_once() -> None:
    named = parameters()
    optimizer = FACES["early"](named)
    calls = optimizer.rule.calls
    for step in range(4):
        bring(named, step)
        calls.clear()
        optimizer.early.arrived([named[1][1]])
        optimizer.early.arrived(param for _, param in named[:1])
        assert calls == [[1], [0]]
        if step == 1:
            named[0][1].grad.add_(1.0)
        if step == 2:
            optimizer.early.forget()
        if step == 3:
            named[1][1].grad.add_(1.0)
            optimizer.early.arrived([named[1][1]])
            assert calls == [[1], [0], [1]]
        optimizer.step()
        assert calls[-1] == {0: [2], 1: [0, 2], 2: [0, 1, 2], 3: [2]}[step]
        assert not optimizer.rule.calls[2 + (step == 3) : -1]


def test_what_is_no_parameter_of_it_is_passed_over() -> None:
    named = parameters()
    optimizer = FACES["early"](named)
    stranger = nn.Parameter(torch.ones(3))
    stranger.grad = torch.ones(3)
    named[1][1].grad = torch.zeros(5).to_sparse()
    optimizer.early.arrived([stranger, named[0][1], named[1][1]])  # the second has no gradient
    assert not any(optimizer.rule.calls)
    with pytest.raises(ValueError, match="'bias' has a sparse gradient"):  # the step says it
        optimizer.step()


def test_nothing_is_kept_of_forgotten_gradients() -> None:
    """Beside the parameter itself nobody holds its gradient, in memory until the next step."""
    for build in FACES.values():
        named = parameters()
        optimizer = build(named)
        for forget in (True, False):
            bring(named, 0)
            optimizer.early.arrived(param for _, param in named)
            optimizer.early.forget() if forget else optimizer.step()
            items = [item for _, batch in optimizer._ready().work for item in batch.items]
            assert all(item.param.grad is None for item in items)
            assert not any(batch.summed for _, batch in optimizer._ready().work)


# --------------------------------------------------------------------------------------- under ZeRO


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _run(name: str, stage: int | None) -> tuple[nn.Module, Any]:
    """Steps whose gradients are left alone, changed with and without a trace, added to, and thrown
    away; `stage` None: without ZeRO.
    """
    model = _net()
    optimizer: Any
    if stage is None:
        optimizer = FACES[name](model.named_parameters())
    else:
        with early_pass_on_a_cpu():
            optimizer = pylo_dist.ZeroOptimizer(
                model, FACES[name], stage=stage, bucket_cap_mb=0.0001
            )
    generator = torch.Generator().manual_seed(5)
    for step in range(6):
        x = torch.randn(4, 5, generator=generator)
        model(x).square().sum().backward()
        if step == 1:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad.mul_(0.5)
        if step == 2:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad.data.mul_(0.5)
        if step == 3:
            model(-x).sum().backward()
        if step == 4:  # the step is skipped
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", FACES)
def test_under_zero_with_overlap_it_is_the_plain_step(name: str, stage: int) -> None:
    (plain, wanted), (sharded, got) = _run(name, None), _run(name, stage)
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b)
    states = (optimizer.state_dict()["state"].values() for optimizer in (wanted, got))
    for mine, its in zip(*states, strict=True):
        assert all(torch.equal(mine[field], its[field]) for field in mine)
    if name == "early":  # step 0 found nothing left to read
        calls = got.inner.rule.calls
        assert sorted(i for call in calls[: calls.index([])] for i in call) == [0, 1, 2, 3]
