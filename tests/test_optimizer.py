"""AdafacLO keeps the contract of a torch optimizer.

Background: training code, schedulers and checkpoints were written for torch.optim; every habit they rely on is one test here.
One process, whole tensors. Unless a test says otherwise results are compared to the bit: both sides are the same arithmetic.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist
from pylo_dist import comm, engine, ops, reference
from pylo_dist.adapters.plain import collect
from pylo_dist.engine import Engine
from pylo_dist.testing import layout_error
from pylo_dist.weights import SMALL_FC

SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "bias": (5,), "wide": (3, 7), "square": (4, 4), "conv": (5, 2, 3, 3)}
Named = list[tuple[str, nn.Parameter]]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in SMALL_FC.shapes.items()}


def adafac(params: Any, **kwargs: Any) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO(params, weights=weights(), **kwargs)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_params(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> Named:
    return [(fqn, nn.Parameter(0.1 * normal(shape, i, dtype))) for i, (fqn, shape) in enumerate(shapes.items())]


def set_gradients(named: Named, step: int) -> None:
    for i, (_, param) in enumerate(named):
        param.grad = 0.01 * normal(tuple(param.shape), 1000 * (step + 1) + i, param.dtype)


def train(optimizer: torch.optim.Optimizer, named: Named, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(named, step)
        optimizer.step()


def values(named: Named) -> dict[str, Tensor]:
    return {fqn: param.detach().clone(memory_format=torch.contiguous_format) for fqn, param in named}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[fqn], b[fqn]) for fqn in a)


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor a step may write: parameters, state, step counts."""
    found: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        found[f"{i}.step"] = group["step"].clone()
        for j, param in enumerate(group["params"]):
            found[f"{i}.{j}"] = param.detach().clone()
            found.update({f"{i}.{j}.{name}": t.clone() for name, t in optimizer.state.get(param, {}).items()})
    return found


def after(steps: int, **kwargs: Any) -> dict[str, Tensor]:
    """The parameters after `steps` plain steps."""
    named = make_params()
    train(adafac(named, **kwargs), named, 0, steps)
    return values(named)


# ------------------------------------------------------------------------------------------------ step


def test_closure_runs_under_enable_grad_and_its_loss_is_returned() -> None:
    param, other = (nn.Parameter(normal((3, 4), 0)) for _ in range(2))
    optimizer, plain = adafac([param]), adafac([other])
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():  # as some training loops call it
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    other.square().sum().backward()
    plain.step()
    assert torch.equal(param, other)
    assert not torch.equal(param, normal((3, 4), 0))


def test_a_tensor_in_first_place_is_the_loss() -> None:
    wanted = after(1)
    loss = torch.tensor(2.5)
    calls: list[Callable[[pylo_dist.AdafacLO], Any]] = [lambda o: o.step(loss), lambda o: o.step(loss=loss)]
    for call in calls:
        named = make_params()
        set_gradients(named, 0)
        assert call(adafac(named)) is loss
        assert same(values(named), wanted)
    named = make_params()
    set_gradients(named, 0)
    optimizer = adafac(named)
    optimizer.set_loss(loss)
    assert optimizer.step() is None
    assert same(values(named), wanted)


def test_step_and_state_hooks_run() -> None:
    named = make_params()
    optimizer = adafac(named)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {**state, "seen": calls.append("load pre")})
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    train(optimizer, named, 0, 1)
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["step pre", "step post", "state pre", "load pre", "load post"]


def test_zero_grad_both_ways() -> None:
    named = make_params()
    optimizer = adafac(named)
    set_gradients(named, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for _, p in named)
    optimizer.zero_grad()
    assert all(p.grad is None for _, p in named)


def test_callers_under_no_grad() -> None:
    named = make_params()
    optimizer = adafac(named)
    with torch.no_grad():
        train(optimizer, named, 0, 2)
    assert same(values(named), after(2))
    assert all(p.requires_grad and p.is_leaf for _, p in named)
    assert not any(t.requires_grad for state in optimizer.state.values() for t in state.values())


def test_grad_scaler_unscales_and_skips() -> None:
    """The scale is a power of two, so scaling is exact; an overflow is the scaler's to see, before the optimizer is called."""
    named, plain = make_params(), make_params()
    optimizer, wanted = adafac(named), adafac(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 0.5):
        for params in (named, plain):
            for _, param in params:
                param.grad = None
        scaler.scale(factor * sum(p.square().sum() for _, p in named)).backward()
        before = everything(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == float("inf"):
            assert same(everything(optimizer), before)
            continue
        (factor * sum(p.square().sum() for _, p in plain)).backward()
        wanted.step()
        assert same(everything(optimizer), everything(wanted))


# ------------------------------------------------------------------------------------------- schedules


def test_schedulers_set_the_step_size() -> None:
    named, other = make_params(), make_params()
    optimizer, by_hand = adafac(named, lr=0.5), adafac(other, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    for step in range(3):
        by_hand.param_groups[0]["lr"] = 0.5 / (1 + step)
        train(optimizer, named, step, step + 1)
        train(by_hand, other, step, step + 1)
        scheduler.step()
        assert same(values(named), values(other))
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_one_cycle() -> None:
    named = make_params()
    optimizer = adafac(named, lr=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=4, cycle_momentum=False)
    rates = []
    for step in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        train(optimizer, named, step, step + 1)
        scheduler.step() if step < 3 else None
    assert rates[0] < rates[1]
    assert rates[-1] < 1e-4
    assert not same(values(named), after(4, lr=0.5))


@pytest.mark.parametrize("tensor_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_is_a_float_lr(tensor_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """To the bit: the step size is taken in float64 either way; the schedule's rate is rounded to the tensor's dtype first."""
    results = []
    for as_tensor in (True, False):
        named = make_params({**SHAPES, **{f"scalar{i}": () for i in range(16)}}, dtype)  # where torch promotes like a tensor
        rate = torch.tensor(0.3, dtype=tensor_dtype)
        optimizer = adafac(named, lr=rate.clone() if as_tensor else float(rate), weight_decay=0.3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)  # exact in any dtype
        for step in range(3):
            train(optimizer, named, step, step + 1)
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == as_tensor
        results.append(values(named))
    assert same(*results)


# -------------------------------------------------------------------------------------------- groups


def test_groups_have_their_own_settings() -> None:
    settings = [{"lr": 0.5}, {"weight_decay": 0.1}, {"max_grad_norm": 0.01}, {"step_mult": 0.02, "exp_mult": 0.1}, {}]
    named, alone = make_params(), make_params()
    grouped = adafac([{"params": [entry], **s} for entry, s in zip(named, settings, strict=True)], clip="per_tensor")
    train(grouped, named, 0, 3)
    single = [adafac([entry], clip="per_tensor", **s) for entry, s in zip(alone, settings, strict=True)]
    for step in range(3):
        set_gradients(alone, step)
        for optimizer in single:
            optimizer.step()
    assert same(values(named), values(alone))
    assert not any(torch.equal(a, b) for a, b in list(zip(values(named).values(), after(3).values(), strict=True))[:4])


def test_add_param_group_later() -> None:
    named, alone = make_params(), make_params()
    optimizer = adafac(named[:3])
    train(optimizer, named[:3], 0, 2)
    optimizer.add_param_group({"params": named[3:], "lr": 0.25})
    assert all(name in optimizer.state[named[3][1]] for name in ("momentum", "rms", "row", "col"))
    train(optimizer, named, 2, 4)
    first, second = adafac(alone[:3]), adafac(alone[3:], lr=0.25)
    for step in range(4):
        set_gradients(alone, step)
        first.step()
        second.step() if step >= 2 else None
    assert same(values(named), values(alone))
    assert [int(group["step"]) for group in optimizer.param_groups] == [4, 2]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [("bad", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))]}, "'bad' is torch.int64"),
        ({"params": [("new", nn.Parameter(torch.zeros(3)))], "lr": -1.0}, "lr=-1.0"),
        ({"params": [("new", nn.Parameter(torch.zeros(3)))], "foreach": True}, "foreach=True"),
        ({"params": [("new", nn.Parameter(torch.zeros(3)))], "max_grad_norm": 0}, "max_grad_norm=0"),
    ],
)
def test_a_bad_group_leaves_the_optimizer_unchanged(group: dict[str, Any], message: str) -> None:
    named = make_params()
    optimizer = adafac(named)
    train(optimizer, named, 0, 1)
    before, keys = everything(optimizer), set(group)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert set(group) == keys
    assert same(everything(optimizer), before)
    assert len(optimizer.state) == len(named)
    assert len(optimizer.report()) == len(named)
    train(optimizer, named, 1, 3)
    assert same(values(named), after(3))


def test_duplicates_are_refused_by_name(recwarn: pytest.WarningsRecorder) -> None:
    named = make_params()
    with pytest.raises(ValueError, match="'again' is in the same group twice"):
        adafac([*named, ("again", named[1][1])])
    optimizer = adafac(named)
    with pytest.raises(ValueError, match="'square' is already in parameter group 0"):
        optimizer.add_param_group({"params": [named[3]]})
    with pytest.raises(ValueError, match="'bias' is already in parameter group 0"):
        adafac([{"params": named[:2]}, {"params": named[1:]}])
    unnamed = [p for _, p in named]
    with pytest.raises(ValueError, match=r"'group1\.0' is already in parameter group 0"):
        adafac([{"params": unnamed}, {"params": unnamed[:1]}])
    assert not recwarn.list


def test_groups_given_once_serve_two_optimizers() -> None:
    """The dicts a caller passes are copied: a second optimizer must not share or inherit the step count of the first."""
    named = make_params()
    groups = [{"params": named[:2], "lr": 0.5}, {"params": named[2:]}]
    first = adafac(groups)
    train(first, named, 0, 2)
    second = adafac(groups)
    assert [int(group["step"]) for group in second.param_groups] == [0, 0]
    train(second, named, 0, 1)
    assert [int(group["step"]) for group in first.param_groups] == [2, 2]


@pytest.mark.parametrize("mode", ["foreach", "fused", "capturable", "differentiable", "maximize"])
def test_modes_of_torch_optimizers_are_refused(mode: str) -> None:
    named = make_params()
    with pytest.raises(ValueError, match=f"{mode}=True in a parameter group"):
        adafac([{"params": named, mode: True}])
    with pytest.raises(TypeError, match=mode):
        adafac(named, **{mode: True})
    adafac([{"params": named, mode: False}])


def test_parameters_on_two_devices_step_in_lock_step() -> None:
    """One rule drives a batch per device, their phases interleaved; nothing may pass from one to the other. Both batches are on
    the CPU here, made by two optimizers that share the rule."""
    named, alone = make_params(), make_params()
    first, second = adafac(named[:2], lr=0.5), adafac(named[2:])
    train(second, named[2:], 0, 1)  # another step count
    set_gradients(named, 1)
    second.rule = first.rule
    second._forget_engine()
    for optimizer in (first, second):
        optimizer._ready()
        for param, item in optimizer._engine_params:
            item.param = collect(optimizer._bindings[param], param)
    comm.serve(Engine([*first._ready().work, *second._ready().work], "error", "global").phases())
    third, fourth = adafac(alone[:2], lr=0.5), adafac(alone[2:])
    train(fourth, alone[2:], 0, 1)
    set_gradients(alone, 1)
    third.step()
    fourth.step()
    assert same(values(named), values(alone))


def test_clipping_may_be_switched_off() -> None:
    """What a group says now counts: no trace of an earlier bound."""
    named = make_params()
    optimizer = adafac(named, max_grad_norm=1e-3)
    train(optimizer, named, 0, 1)  # clipped
    fresh, fresh_named = copy.deepcopy((optimizer, named))  # never clipped itself
    still, still_named = copy.deepcopy((optimizer, named))
    optimizer.param_groups[0]["max_grad_norm"] = fresh.param_groups[0]["max_grad_norm"] = None
    train(optimizer, named, 1, 2)
    train(fresh, fresh_named, 1, 2)
    train(still, still_named, 1, 2)
    assert same(everything(optimizer), everything(fresh))
    assert not same(values(named), values(still_named))


# ------------------------------------------------------------------------------------ copies and files


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_to_the_bit(way: str) -> None:
    named = make_params()
    optimizer = adafac(named, lr=0.5, clip="per_tensor", max_grad_norm=0.05, precision="highest", process_group=False)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # replaces optimizer.step, which no copy may carry
    train(optimizer, named, 0, 2)
    pair = (optimizer, named)
    twin, twin_named = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert same(everything(twin), everything(optimizer))
    assert not {p.data_ptr() for _, p in twin_named} & {p.data_ptr() for _, p in named}
    train(optimizer, named, 2, 4)
    assert not same(values(twin_named), values(named))  # it has memory of its own
    train(twin, twin_named, 2, 4)
    assert same(everything(twin), everything(optimizer))
    assert str(twin.report()) == str(optimizer.report())
    assert (twin.precision, twin.process_group) == ("highest", False)
    optimizer.load_state_dict(twin.state_dict())
    twin.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))]})
    assert twin.param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_equal_to_the_bit(dtype: torch.dtype) -> None:
    named = make_params(dtype=dtype)
    optimizer = adafac(named, lr=torch.tensor(0.5), weight_decay=0.01)
    train(optimizer, named, 0, 3)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": values(named)}, file)
    train(optimizer, named, 3, 6)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [(fqn, nn.Parameter(saved["params"][fqn])) for fqn in SHAPES]
    fresh = adafac(resumed)
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.param_groups[0]["weight_decay"] == 0.01
    train(fresh, resumed, 3, 6)
    assert same(everything(fresh), everything(optimizer))


def test_named_and_unnamed_state_load_into_each_other() -> None:
    named = make_params()
    optimizer = adafac(named)
    train(optimizer, named, 0, 2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(SHAPES)
    assert [row["fqn"] for row in optimizer.report()] == list(SHAPES)
    bare = make_params()
    unnamed = adafac([p for _, p in bare])
    assert [row["fqn"] for row in unnamed.report()] == [f"group0.{j}" for j in range(len(SHAPES))]
    unnamed.load_state_dict(optimizer.state_dict())
    again = adafac(make_params())
    again.load_state_dict(unnamed.state_dict())
    for a, b in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert same(a, b)


def test_half_precision_parameters_keep_float32_state() -> None:
    """torch's load_state_dict casts state to the parameter's dtype; bfloat16 would make 1001 of it 1000."""
    for dtype in (torch.bfloat16, torch.float16):
        optimizer = adafac(make_params(dtype=dtype))
        for state in optimizer.state.values():
            for tensor in state.values():
                assert tensor.dtype == torch.float32
                tensor.fill_(1001.0)
        loaded = adafac(make_params(dtype=dtype))
        loaded.load_state_dict(optimizer.state_dict())
        for state in loaded.state.values():
            assert all(t.dtype == torch.float32 and bool((t == 1001.0).all()) for t in state.values())


def test_float64_parameters_have_float64_state() -> None:
    optimizer = adafac(make_params(dtype=torch.float64))
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float64}
    loaded = adafac(make_params(dtype=torch.float64))
    loaded.load_state_dict(optimizer.state_dict())
    assert {t.dtype for state in loaded.state.values() for t in state.values()} == {torch.float64}


def test_state_shapes() -> None:
    named = make_params()
    optimizer = adafac(named)
    shapes = {fqn: {name: tuple(t.shape) for name, t in optimizer.state[p].items()} for fqn, p in named}
    assert shapes == {
        "scalar": {"momentum": (3,), "rms": (), "diag": (3,)},
        "bias": {"momentum": (3, 5), "rms": (5,), "diag": (3, 5)},
        "wide": {"momentum": (3, 3, 7), "rms": (3, 7), "row": (3, 3), "col": (3, 7)},
        "square": {"momentum": (3, 4, 4), "rms": (4, 4), "row": (3, 4), "col": (3, 4)},
        "conv": {"momentum": (3, 5, 2, 3, 3), "rms": (5, 2, 3, 3), "row": (3, 2, 3, 3), "col": (3, 5, 2, 3)},
    }


def test_loaded_state_shares_no_memory() -> None:
    named, other = make_params(), make_params()
    optimizer, loaded = adafac(named, lr=torch.tensor(0.5)), adafac(other)
    train(optimizer, named, 0, 1)
    given = optimizer.state_dict()
    loaded.load_state_dict(given)
    kept = copy.deepcopy(given)
    train(loaded, other, 0, 2)
    loaded.param_groups[0]["lr"].fill_(9.0)
    for i, entry in kept["state"].items():
        assert same(entry, given["state"][i])
    assert int(given["param_groups"][0]["step"]) == 1
    assert float(given["param_groups"][0]["lr"]) == 0.5


def _drop(state: dict[str, Any]) -> None:
    del state["state"][2]["row"]


def _drop_all(state: dict[str, Any]) -> None:
    del state["state"][2]


def _misshape(state: dict[str, Any]) -> None:
    state["state"][2]["momentum"] = torch.zeros(3, 7, 3)


def _no_tensor(state: dict[str, Any]) -> None:
    state["state"][2]["momentum"] = 5


def _fewer(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def _more_groups(state: dict[str, Any]) -> None:
    state["param_groups"].append({**state["param_groups"][0], "params": []})


def _no_step(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["step"]


def _no_lr(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["lr"]


def _no_groups(state: dict[str, Any]) -> None:
    del state["param_groups"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"'row' of 'wide': found nothing, wanted shape \(3, 3\)"),
        (_drop_all, "'momentum' of 'wide': found nothing"),
        (_misshape, r"'momentum' of 'wide': found shape \(3, 7, 3\), wanted shape \(3, 3, 7\)"),
        (_no_tensor, "'momentum' of 'wide': found int"),
        (_fewer, r"groups of \[4\] parameters, this optimizer groups of \[5\]"),
        (_more_groups, r"groups of \[5, 0\] parameters"),
        (_no_step, "group 0 of the state has no 'step'"),
        (_no_lr, "group 0 of the state has no 'lr'"),
        (_no_groups, "'param_groups'"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(damage: Callable[[Any], None], message: str) -> None:
    named, other = make_params(), make_params()
    optimizer, donor = adafac(named), adafac(other, lr=0.5)
    train(optimizer, named, 0, 1)
    train(donor, other, 0, 2)
    state = copy.deepcopy(donor.state_dict())
    damage(state)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(everything(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1.0
    train(optimizer, named, 1, 3)
    assert same(values(named), after(3))


def test_a_number_as_step_count_loads() -> None:
    named = make_params()
    optimizer = adafac(named)
    train(optimizer, named, 0, 2)
    state = optimizer.state_dict()
    state["param_groups"][0]["step"] = 2
    fresh = adafac([(fqn, nn.Parameter(p.detach().clone())) for fqn, p in named])
    fresh.load_state_dict(state)
    set_gradients([(fqn, p) for fqn, p in zip(SHAPES, fresh.param_groups[0]["params"], strict=True)], 2)
    fresh.step()
    train(optimizer, named, 2, 3)
    assert same(everything(fresh), everything(optimizer))


def test_state_that_was_replaced_counts() -> None:
    """`optimizer.state[p][name] = tensor` and clearing the state are habits of torch users."""
    named, other = make_params(), make_params()
    optimizer, donor = adafac(named), adafac(other)
    train(donor, other, 0, 2)
    for (_, a), (_, b) in zip(named, other, strict=True):
        a.data.copy_(b)
        optimizer.state[a] = {name: t.clone() for name, t in donor.state[b].items()}
    optimizer.param_groups[0]["step"].fill_(2)
    train(optimizer, named, 2, 3)
    train(donor, other, 2, 3)
    assert same(everything(optimizer), everything(donor))
    optimizer.state.clear()
    fresh = adafac(other)
    optimizer.param_groups[0]["step"].zero_()
    train(optimizer, named, 0, 1)
    train(fresh, other, 0, 1)
    assert same(everything(optimizer), everything(fresh))


# ----------------------------------------------------------------------------------- which parameters


def test_none_gradients_are_skipped_and_the_step_counts() -> None:
    named = make_params()
    optimizer = adafac(named, max_grad_norm=0.05)
    train(optimizer, named, 0, 1)
    before = everything(optimizer)
    set_gradients(named, 1)
    named[2][1].grad = None
    optimizer.step()
    now = everything(optimizer)
    assert int(now.pop("0.step")) == int(before.pop("0.step")) + 1
    still = {key for key in now if torch.equal(now[key], before[key])}
    assert still == {"0.2", "0.2.momentum", "0.2.rms", "0.2.row", "0.2.col"}
    optimizer.zero_grad()
    optimizer.step()
    assert int(optimizer.param_groups[0]["step"]) == 3
    assert same({k: v for k, v in everything(optimizer).items() if k != "0.step"}, now)


def test_frozen_parameters_have_no_state_until_they_are_unfrozen() -> None:
    named = make_params()
    frozen = named[2][1].requires_grad_(False)
    value = frozen.detach().clone()
    optimizer = adafac(named)
    train(optimizer, named[:2] + named[3:], 0, 2)
    assert torch.equal(frozen, value)
    assert frozen not in optimizer.state
    assert sorted(optimizer.state_dict()["state"]) == [0, 1, 3, 4]
    again = adafac([(fqn, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)) for fqn, p in named])
    again.load_state_dict(optimizer.state_dict())
    assert sorted(again.state_dict()["state"]) == [0, 1, 3, 4]

    frozen.requires_grad_(True)
    others = {fqn: p.detach().clone() for fqn, p in named if p is not frozen}
    train(optimizer, named, 2, 3)
    alone = nn.Parameter(value.clone())
    single = adafac([alone])
    single.param_groups[0]["step"].fill_(2)
    alone.grad = frozen.grad
    single.step()
    assert torch.equal(frozen, alone)
    assert same(dict(optimizer.state[frozen]), dict(single.state[alone]))
    assert not any(torch.equal(p, others[fqn]) for fqn, p in named if p is not frozen)

    frozen.requires_grad_(False)
    value = frozen.detach().clone()
    train(optimizer, named[:2] + named[3:], 3, 4)
    assert torch.equal(frozen, value)


def test_tied_parameters_are_one() -> None:
    embedding = nn.Embedding(6, 4)
    head = nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    optimizer = adafac(model.named_parameters())
    assert len(optimizer.report()) == 1
    model(torch.tensor([1, 2])).square().sum().backward()
    alone = nn.Parameter(embedding.weight.detach().clone())
    assert embedding.weight.grad is not None
    alone.grad = embedding.weight.grad.clone()
    optimizer.step()
    adafac([alone]).step()
    assert torch.equal(head.weight, alone)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (1, 9), (9, 1), (4, 4), (3, 4, 5), (4, 3, 3, 2), (2, 3, 2, 3, 2), (0, 5), (0,)], ids=str
)
def test_every_shape_moves_and_resumes(shape: tuple[int, ...]) -> None:
    named = make_params({"p": shape, "beside": (3, 7)})
    optimizer = adafac(named, max_grad_norm=1.0)
    before = values(named)
    train(optimizer, named, 0, 2)
    moved = {fqn: bool((p != before[fqn]).all()) for fqn, p in named}
    assert moved == {"p": True, "beside": True}
    assert all(bool(p.isfinite().all()) for _, p in named)
    if not named[0][1].numel():
        assert named[0][1] not in optimizer.state
    fresh = adafac([(fqn, nn.Parameter(p.detach().clone())) for fqn, p in named])
    fresh.load_state_dict(optimizer.state_dict())
    assert same(everything(fresh), everything(optimizer))


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _every_second(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77.0, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _corner(x: Tensor) -> Tensor:
    wide = torch.full([size + 2 for size in x.shape], 77.0, dtype=x.dtype)
    inner = wide[tuple(slice(1, size + 1) for size in x.shape)]
    inner.copy_(x)
    return inner


@pytest.mark.parametrize("gradients", ["like", "contiguous", "odd"])
@pytest.mark.parametrize("layout", [_transposed, _channels_last, _every_second, _corner])
def test_memory_layout_does_not_matter(layout: Callable[[Tensor], Tensor], gradients: str) -> None:
    """Parameters and gradients laid out in any way equal their contiguous copies, and memory between their elements is kept."""
    shapes: dict[str, tuple[int, ...]] = {"vector": (5,), "matrix": (3, 7), "conv": (4, 3, 2, 2), "rank3": (2, 3, 4)}
    plain = make_params(shapes)
    odd = [(fqn, nn.Parameter(layout(p.detach().clone()))) for fqn, p in plain]
    assert layout is _channels_last or not all(p.is_contiguous() for _, p in odd)
    optimizer, wanted = adafac(odd, weight_decay=0.1, max_grad_norm=0.1), adafac(plain, weight_decay=0.1, max_grad_norm=0.1)
    for step in range(2):
        set_gradients(plain, step)
        for (_, a), (_, b) in zip(odd, plain, strict=True):
            assert b.grad is not None
            if gradients == "like":
                a.grad = layout(b.grad)
            else:
                a.grad = b.grad.clone() if gradients == "contiguous" else _every_second(b.grad)
        wanted.step()
        optimizer.step()
    assert same(values(odd), values(plain))
    for (_, a), (_, b) in zip(odd, plain, strict=True):
        assert same(dict(optimizer.state[a]), dict(wanted.state[b]))
        assert all(t.is_contiguous() for t in optimizer.state[a].values())
        if layout in (_every_second, _corner):
            memory = torch.as_strided(a.detach(), (a.untyped_storage().nbytes() // 4,), (1,), 0)
            assert int((memory == 77.0).sum()) == memory.numel() - a.numel()


def test_expanded_gradients() -> None:
    named, other = make_params({"vector": (5,), "matrix": (3, 7)}), make_params({"vector": (5,), "matrix": (3, 7)})
    for (_, a), (_, b) in zip(named, other, strict=True):
        a.grad = torch.tensor(0.5).expand(a.shape)
        b.grad = torch.full(b.shape, 0.5)
    adafac(named).step()
    adafac(other).step()
    assert same(values(named), values(other))


def test_sparse_gradients_are_refused_by_name_before_anything_changes() -> None:
    embedding = nn.Embedding(6, 4, sparse=True)
    first = nn.Parameter(torch.ones(3))
    optimizer = adafac([("first", first), ("wte.weight", embedding.weight)])
    first.grad = torch.ones(3)
    embedding(torch.tensor([1])).sum().backward()
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"'wte.weight' has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert same(everything(optimizer), before)
    with pytest.raises(ValueError, match=r"'wte.weight' has a sparse gradient"):
        optimizer.step(lambda: torch.tensor(0.0))
    assert embedding.weight.grad is not None
    embedding.weight.grad = embedding.weight.grad.to_dense()
    optimizer.step()
    assert int(optimizer.param_groups[0]["step"]) == 1


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (nn.Parameter(torch.zeros(3, dtype=torch.complex64)), r"'p' is torch.complex64.*view_as_real"),
        (nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False), r"'p' is torch.int32.*floating-point"),
        (nn.Parameter(torch.zeros(3, dtype=torch.bool), requires_grad=False), r"'p' is torch.bool"),
        (nn.Parameter(torch.eye(3).to_sparse()), r"'p' has layout torch.sparse_coo.*dense"),
    ],
    ids=["complex", "integer", "bool", "sparse"],
)
def test_parameters_that_cannot_be_served_are_refused_by_name(param: nn.Parameter, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adafac([("good", nn.Parameter(torch.zeros(2))), ("p", param)])


# -------------------------------------------------------------------------------- non-finite gradients


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize("victim", ["wide", "scalar"])
def test_a_step_that_is_not_taken_leaves_no_trace(value: float, mode: str, victim: str) -> None:
    named = make_params()
    optimizer = adafac(named, nonfinite=mode, max_grad_norm=0.1)
    train(optimizer, named, 0, 1)
    twin, twin_named = copy.deepcopy((optimizer, named))
    before = everything(optimizer)
    set_gradients(named, 7)
    grad = dict(named)[victim].grad
    assert grad is not None
    grad.view(-1)[-1] = value
    if mode == "error":
        with pytest.raises(pylo_dist.NonFiniteGradientError, match=f"gradient of '{victim}' holds inf or NaN.*not taken"):
            optimizer.step()
    else:
        optimizer.step()
    assert same(everything(optimizer), before)
    for row in optimizer.stats().values():
        assert not row["update_ratio"].isnan()
    train(optimizer, named, 1, 3)
    train(twin, twin_named, 1, 3)
    assert same(everything(optimizer), everything(twin))


def test_the_error_names_up_to_five_parameters() -> None:
    named = make_params({f"layer{i}": (2, 3) for i in range(7)})
    optimizer = adafac(named)
    set_gradients(named, 0)
    for _, param in named:
        assert param.grad is not None
        param.grad[0, 0] = float("nan")
    with pytest.raises(pylo_dist.NonFiniteGradientError, match=r"'layer0', .* 'layer4' and 2 more"):
        optimizer.step()


def test_allow_lets_nan_through() -> None:
    named = make_params()
    optimizer = adafac(named, nonfinite="allow")
    train(optimizer, named, 0, 1)
    set_gradients(named, 1)
    grad = named[2][1].grad
    assert grad is not None
    grad[1, 1] = float("nan")
    optimizer.step()
    assert bool(named[2][1].isnan().all())  # through the norms it reaches its whole tensor
    assert all(bool(p.isfinite().all()) for fqn, p in named if fqn != "wide")
    assert int(optimizer.param_groups[0]["step"]) == 2


# ----------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("max_norm", [0.02, 1e-4, 100.0])
@pytest.mark.parametrize("clip", ["global", "per_tensor"])
def test_clipping_equals_torchs_before_an_unclipped_step(clip: str, max_norm: float) -> None:
    """In float64, to 1e-12: the same formula, but the squares are added in another order."""
    named, other = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    clipped, plain = adafac(named, max_grad_norm=max_norm, clip=clip), adafac(other)
    for step in range(3):
        set_gradients(named, step)
        set_gradients(other, step)
        tensors = [p for _, p in other]
        norm = torch.nn.utils.get_total_norm([p.grad for p in tensors if p.grad is not None])
        for part in [tensors] if clip == "global" else [[p] for p in tensors]:
            torch.nn.utils.clip_grad_norm_(part, max_norm)
        clipped.step()
        plain.step()
        torch.testing.assert_close(clipped.grad_norm, norm, rtol=1e-12, atol=0)
        wanted = everything(plain)
        for key, tensor in everything(clipped).items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-12, atol=1e-14)
    assert same(values(named), after_double(3)) == (max_norm == 100.0)


def after_double(steps: int) -> dict[str, Tensor]:
    named = make_params(dtype=torch.float64)
    train(adafac(named), named, 0, steps)
    return values(named)


def test_clipping_leaves_the_gradients_alone() -> None:
    named = make_params()
    optimizer = adafac(named, max_grad_norm=1e-3)
    set_gradients(named, 0)
    before = {fqn: p.grad.clone() for fqn, p in named if p.grad is not None}
    optimizer.step()
    assert same(before, {fqn: p.grad for fqn, p in named if p.grad is not None})


def test_weight_decay_follows_the_step_and_reads_the_new_parameter() -> None:
    named, other = make_params(dtype=torch.float64), make_params(dtype=torch.float64)
    train(adafac(named, lr=0.5, weight_decay=0.2), named, 0, 1)
    train(adafac(other, lr=0.5), other, 0, 1)
    for (_, decayed), (_, plain) in zip(named, other, strict=True):
        # one rounding of the product and one of the difference on either side
        torch.testing.assert_close(decayed.detach(), plain.detach() * (1.0 - 0.5 * 0.2), rtol=1e-15, atol=0)


def test_lr_zero_changes_state_only() -> None:
    named = make_params()
    before = values(named)
    optimizer = adafac(named, lr=0.0, weight_decay=0.5)
    train(optimizer, named, 0, 2)
    assert same(values(named), before)
    assert all(bool(t.any()) for state in optimizer.state.values() for t in state.values())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are made chunk by chunk; where the cuts fall changes only the order of the sums (the layout tolerance)."""
    shapes: dict[str, tuple[int, ...]] = {"matrix": (150, 120), "vector": (17000,), "rank3": (3, 80, 75), "long": (1, 16500)}
    assert all(torch.Size(shape).numel() > reference.CHUNK_CPU for shape in shapes.values())
    results = []
    for size in (reference.CHUNK_CPU, 1 << 20, 777):
        monkeypatch.setattr(reference, "CHUNK_CPU", size)
        named = make_params(shapes)
        optimizer = adafac(named, weight_decay=0.01)
        history = [values(named)]
        for step in range(2):
            train(optimizer, named, step, step + 1)
            history.append(values(named))
        results.append((history, {fqn: dict(optimizer.state[p]) for fqn, p in named}))
    (wanted, wanted_state), *others = results
    changes = {f: torch.stack([(b[f] - a[f]).abs().max() for a, b in pairwise(wanted)]).max() for f in shapes}
    for history, state in others:
        assert max(layout_error(history[-1], wanted[-1], changes).values()) <= 1.0
        for fqn in shapes:
            largest = {name: t.abs().max() for name, t in wanted_state[fqn].items()}
            assert max(layout_error(state[fqn], wanted_state[fqn], largest).values()) <= 1.0, fqn


SCRATCH = """
import resource, torch, pylo_dist
from pylo_dist.weights import SMALL_FC
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tensors = {name: torch.zeros(shape) for name, shape in SMALL_FC.shapes.items()}
small = torch.nn.Parameter(torch.zeros(8, 8))
small.grad = torch.ones(8, 8)
pylo_dist.AdafacLO([small], weights=tensors, max_grad_norm=1.0).step()
p = torch.nn.Parameter(torch.ones(1024, 2048))
p.grad = torch.ones(1024, 2048)
optimizer = pylo_dist.AdafacLO([p], weights=tensors, max_grad_norm=1.0, weight_decay=0.1)
for state in optimizer.state.values():
    for tensor in state.values():
        tensor.fill_(0.5)  # touch it: zeros have no memory yet
before = peak()
optimizer.step()
print(peak() - before)
"""


def test_scratch_stays_bounded(figures: list[str]) -> None:
    """A step on 2 Mi elements: all 39 features of a float32 tensor would be 312 MB. Peak memory of a process of its own."""
    done = subprocess.run([sys.executable, "-c", SCRATCH], capture_output=True, text=True, timeout=120, check=True)
    used = float(done.stdout)
    figures.append(f"scratch of a step on 1024 x 2048 in float32: {used:.0f} MB")
    assert used < 256


def test_scratch_on_a_gpu_is_bounded_by_arithmetic() -> None:
    """Per element of a chunk: 28 features and two hidden layers of 32 in the widest state dtype, the largest float64 copies (15
    rows and their squares), and a dozen single rows."""
    numbers = 28 + 32 + 32 + 2 * 15 + 12
    assert reference.CHUNK_GPU * numbers * 4 <= 256e6
    assert reference.CHUNK_CPU * numbers * 8 <= 256e6


class NoHostReads(TorchDispatchMode):
    """Fails on every operation that would make the host wait for a device, or copy host data to it."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.FORBIDDEN, f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device() -> None:
    named = make_params()
    optimizer = adafac(named, nonfinite="skip", max_grad_norm=0.05, weight_decay=0.1, lr=torch.tensor(0.5))
    train(optimizer, named, 0, 1)  # the first step may bring constants to the device
    set_gradients(named, 1)
    rule_step = type(optimizer.rule).step

    def watched(rule: Any, batch: Any) -> Iterator[Any]:
        generator = rule_step(rule, batch)
        while True:
            with NoHostReads():
                request = next(generator, None)
            if request is None:
                return
            yield request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(optimizer.rule), "step", watched)
        optimizer.step()
        with NoHostReads():
            optimizer.stats()
    assert int(optimizer.param_groups[0]["step"]) == 2
    assert same(values(named), after(2, max_grad_norm=0.05, weight_decay=0.1, lr=0.5))
    with pytest.raises(AssertionError, match="makes the host wait"), NoHostReads():
        bool(torch.ones(1).sum() > 0)


def test_the_judgement_does_not_wait_either() -> None:
    """The engine's own part: presence and bounds are brought to the device when they change."""
    named = make_params()
    optimizer = adafac(named, nonfinite="skip", max_grad_norm=0.05)
    train(optimizer, named, 0, 1)
    set_gradients(named, 1)
    with NoHostReads():
        optimizer.step()
    assert same(values(named), after(2, max_grad_norm=0.05))


@pytest.mark.parametrize("kernels", [True, False])
def test_a_model_made_double_after_its_optimizer_is_refused(kernels: bool) -> None:
    """State is float32 for all other precisions, between which a model may change."""
    model = nn.Linear(3, 2)
    optimizer = adafac(list(model.named_parameters()))
    with ops.use_kernels(kernels):
        for convert in (model.bfloat16, model.float):
            convert()
            model(torch.ones(1, 3, dtype=model.weight.dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.double()
        before = everything(optimizer)
        for _ in range(2):
            model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
            with pytest.raises(
                ValueError, match=r"'weight' is torch.float64 now, and its state torch.float32: call model.double"
            ):
                optimizer.step()
        assert same(everything(optimizer), before)
        model.float()
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


@pytest.fixture
def _host_asks_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: flags of a step are looked at by the next one; on the CPU events and streams do nothing."""
    event = SimpleNamespace(record=lambda *args: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    begin = engine._Outcome.__init__

    def later(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.at_once = False

    monkeypatch.setattr(engine._Outcome, "__init__", later)


@pytest.mark.usefixtures("_host_asks_later")
@pytest.mark.parametrize("by", ["step", "state_dict"])
def test_on_a_gpu_the_next_call_raises(by: str) -> None:
    named = make_params()
    optimizer = adafac(named)
    train(optimizer, named, 0, 1)
    before = everything(optimizer)
    set_gradients(named, 1)
    dict(named)["bias"].grad[0] = math.nan  # type: ignore[index]
    optimizer.step()
    assert same(everything(optimizer), before)
    set_gradients(named, 1)
    with pytest.raises(pylo_dist.NonFiniteGradientError, match="'bias' holds"):
        getattr(optimizer, by)()
    assert same(everything(optimizer), before)
    train(optimizer, named, 1, 3)
    assert same(values(named), after(3))
    optimizer.state_dict()


@pytest.mark.usefixtures("_host_asks_later")
def test_errors_of_replayed_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step does not ask; what went wrong stays on the device until somebody does, through good steps that follow."""
    named = make_params()
    optimizer = adafac(named)
    with monkeypatch.context() as capture:
        capture.setattr(engine, "is_capturing", lambda device: True)
        set_gradients(named, 0)
        with pytest.raises(ValueError, match="before the first one: take one outside"):
            optimizer.step()
    train(optimizer, named, 0, 1)
    with monkeypatch.context() as capture:
        capture.setattr(engine, "is_capturing", lambda device: True)
        set_gradients(named, 1)
        dict(named)["bias"].grad[0] = math.inf  # type: ignore[index]
        optimizer.step()
        train(optimizer, named, 1, 2)
    with pytest.raises(pylo_dist.NonFiniteGradientError, match="'bias' holds"):
        optimizer.state_dict()
    assert same(values(named), after(2))
    train(optimizer, named, 2, 3)
    optimizer.state_dict()
    assert same(values(named), after(3))


# ---------------------------------------------------------------------------------------------- views


def test_report() -> None:
    named = [*make_params(), ("frozen", nn.Parameter(torch.ones(3), requires_grad=False))]
    report = adafac(named).report()
    keys = {"fqn", "shape", "start", "numel", "rule", "dtype", "state_bytes", "group_size", "replicas"}
    assert all(set(row) == keys for row in report)
    rows = {row["fqn"]: row for row in report}
    assert list(rows) == [*SHAPES, "frozen"]
    assert rows["wide"] == {
        "fqn": "wide",
        "shape": (3, 7),
        "start": 0,
        "numel": 21,
        "rule": "small_fc",
        "dtype": "float32",
        "state_bytes": 4 * (4 * 21 + 3 * 3 + 3 * 7),
        "group_size": 1,
        "replicas": 1,
    }
    assert (rows["frozen"]["rule"], rows["frozen"]["state_bytes"]) == ("frozen", 0)
    text = str(report)
    head, *lines = text.splitlines()[1:]
    assert head.split() == ["fqn", "shape", "start", "numel", "rule", "dtype", "state_bytes", "group_size", "replicas"]
    assert [line.split()[0] for line in lines] == [*SHAPES, "frozen", "total:"]
    assert "AdafacLO, weights a mapping (sha256 " in text
    assert report.totals["numel"] == sum(row["numel"] for row in report)
    sharded, replicated = report.totals["sharded_state_bytes"], report.totals["replicated_state_bytes"]
    assert sharded + replicated == sum(row["state_bytes"] for row in report)
    assert f"numel {report.totals['numel']}" in text


def test_stats_update_ratio_and_clip_rate() -> None:
    named = make_params(dtype=torch.float64)
    optimizer = adafac(named, max_grad_norm=0.05, clip="per_tensor")
    clipped = dict.fromkeys(SHAPES, 0)
    for step in range(4):
        before = values(named)
        set_gradients(named, step)
        for fqn, param in named:
            assert param.grad is not None
            clipped[fqn] += float(param.grad.norm()) + 1e-6 > 0.05
        optimizer.step()
        stats = optimizer.stats()
        assert list(stats) == list(SHAPES)
        for fqn, param in named:
            wanted = (param.detach() - before[fqn]).norm() / before[fqn].norm()
            torch.testing.assert_close(stats[fqn]["update_ratio"], wanted, rtol=1e-12, atol=0)
            assert stats[fqn]["update_ratio"].shape == stats[fqn]["clip_rate"].shape == ()
            assert float(stats[fqn]["clip_rate"]) == clipped[fqn] / (step + 1)
    assert 0 < sum(clipped.values()) < 4 * len(SHAPES)


def test_grad_norm_is_that_of_the_raw_gradients() -> None:
    named = make_params()
    optimizer = adafac(named, max_grad_norm=1e-3)
    set_gradients(named, 0)
    optimizer.step()
    wanted = torch.cat([p.grad.flatten().double() for _, p in named if p.grad is not None]).norm()
    torch.testing.assert_close(optimizer.grad_norm, wanted, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": "norm"}, "clip='norm': wanted one of 'global', 'per_tensor'"),
        ({"nonfinite": None}, "nonfinite=None: wanted one of 'error', 'skip', 'allow'"),
        ({"precision": "fp16"}, "precision='fp16': wanted 'highest', 'high' or 'medium'"),
        ({"lr": -0.1}, "lr=-0.1: wanted a finite number >= 0"),
        ({"lr": float("nan")}, "lr=nan: wanted a finite number >= 0"),
        ({"lr": float("inf")}, "lr=inf: wanted a finite number >= 0"),
        ({"lr": "0.1"}, "lr='0.1': wanted a finite number >= 0"),
        ({"lr": None}, "lr=None: wanted a finite number >= 0"),
        ({"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1.\): wanted a finite number >= 0"),
        ({"lr": torch.tensor(float("nan"))}, r"lr=tensor\(nan\): wanted a finite number >= 0"),
        ({"lr": torch.ones(2)}, r"lr=tensor\(\[1., 1.\]\): wanted a finite number >= 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: wanted a finite number >= 0"),
        ({"step_mult": float("nan")}, "step_mult=nan: wanted a finite number >= 0"),
        ({"exp_mult": -1.0}, "exp_mult=-1.0: wanted a finite number >= 0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0: wanted a number > 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan: wanted a number > 0"),
        ({"momentum_decays": (0.1, 0.1)}, r"momentum_decays=\(0.1, 0.1\): wanted 3 finite numbers"),
        ({"rms_decays": (0.1, 0.2)}, r"rms_decays=\(0.1, 0.2\): wanted 1 finite number"),
        ({"rms_decays": 0.1}, "rms_decays=0.1: wanted 1 finite number"),
        ({"adafactor_decays": (0.1, 0.1, float("inf"))}, r"adafactor_decays=\(0.1, 0.1, inf\): wanted 3 finite numbers"),
        ({"initial_momentum_decays": (0.9,)}, r"initial_momentum_decays=\(0.9,\): wanted 3 finite numbers"),
        ({"initial_rms_decays": ("a",)}, r"initial_rms_decays=\('a',\): wanted 1 finite number"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adafac(make_params(), **settings)


def test_arguments_after_params_are_keywords_only() -> None:
    with pytest.raises(TypeError):
        pylo_dist.AdafacLO(make_params(), 0.1)  # type: ignore[misc]
    with pytest.raises(ValueError, match="empty parameter list"):
        adafac([])


def test_construction_is_quick() -> None:
    named = [(f"layer{i}", nn.Parameter(torch.zeros(64, 64))) for i in range(150)]
    start = time.perf_counter()
    optimizer = adafac(named)
    took = time.perf_counter() - start
    assert took < 2.0, took
    assert len(optimizer.state) == 150
