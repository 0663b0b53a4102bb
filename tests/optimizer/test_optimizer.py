"""AdafacLO keeps the contract of a torch optimizer.

Background: training code, schedulers and checkpoints were written for torch.optim; every habit they
rely on is one test here. One process, whole tensors. Unless a test says otherwise results are
compared to the bit: both sides are the same arithmetic.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from pylo_dist import comm
from pylo_dist.layouts.plain import collect
from pylo_dist.optimizer.engine import Engine
from support.optimizer_cases import (
    SHAPES,
    adafac,
    after,
    everything,
    make_params,
    normal,
    same,
    set_gradients,
    train,
    values,
)

# --------------------------------------------------------------------------------------------- step


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
    calls: list[Callable[[pylo_dist.AdafacLO], Any]] = [
        lambda o: o.step(loss),
        lambda o: o.step(loss=loss),
    ]
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
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: {**state, "seen": calls.append("load pre")}
    )
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
    """The scale is a power of two, so scaling is exact; an overflow is the scaler's to see, before
    the optimizer is called.
    """
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


# ---------------------------------------------------------------------------------------- schedules


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
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.5, total_steps=4, cycle_momentum=False
    )
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
    """To the bit: the step size is taken in float64 either way; the schedule's rate is rounded to
    the tensor's dtype first.
    """
    results = []
    for as_tensor in (True, False):
        # where torch promotes like a tensor
        named = make_params({**SHAPES, **{f"scalar{i}": () for i in range(16)}}, dtype)
        rate = torch.tensor(0.3, dtype=tensor_dtype)
        optimizer = adafac(named, lr=rate.clone() if as_tensor else float(rate), weight_decay=0.3)
        # exact in any dtype
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            train(optimizer, named, step, step + 1)
            scheduler.step()
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == as_tensor
        results.append(values(named))
    assert same(*results)


# ------------------------------------------------------------------------------------------- groups


def test_groups_have_their_own_settings() -> None:
    settings = [
        {"lr": 0.5},
        {"weight_decay": 0.1},
        {"max_grad_norm": 0.01},
        {"step_mult": 0.02, "exp_mult": 0.1},
        {},
    ]
    named, alone = make_params(), make_params()
    grouped = adafac(
        [{"params": [entry], **s} for entry, s in zip(named, settings, strict=True)],
        clip="per_tensor",
    )
    train(grouped, named, 0, 3)
    single = [
        adafac([entry], clip="per_tensor", **s) for entry, s in zip(alone, settings, strict=True)
    ]
    for step in range(3):
        set_gradients(alone, step)
        for optimizer in single:
            optimizer.step()
    assert same(values(named), values(alone))
    assert not any(
        torch.equal(a, b)
        for a, b in list(zip(values(named).values(), after(3).values(), strict=True))[:4]
    )


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
        (
            {
                "params": [
                    ("bad", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))
                ]
            },
            "'bad' is torch.int64",
        ),
        ({"params": [("new", nn.Parameter(torch.zeros(3)))], "lr": -1.0}, "lr=-1.0"),
        ({"params": [("new", nn.Parameter(torch.zeros(3)))], "foreach": True}, "foreach=True"),
        (
            {"params": [("new", nn.Parameter(torch.zeros(3)))], "max_grad_norm": 0},
            "max_grad_norm=0",
        ),
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
    """The dicts a caller passes are copied: a second optimizer must not share or inherit the step
    count of the first.
    """
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
    """One rule drives a batch per device, their phases interleaved; nothing may pass from one to
    the other. Both batches are on the CPU here, made by two optimizers that share the rule."""
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


# -------------------------------------------------------------------------------------------- views


def test_report() -> None:
    named = [*make_params(), ("frozen", nn.Parameter(torch.ones(3), requires_grad=False))]
    report = adafac(named).report()
    keys = {
        "fqn",
        "shape",
        "start",
        "numel",
        "rule",
        "dtype",
        "state_bytes",
        "group_size",
        "replicas",
    }
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
    assert head.split() == [
        "fqn",
        "shape",
        "start",
        "numel",
        "rule",
        "dtype",
        "state_bytes",
        "group_size",
        "replicas",
    ]
    assert [line.split()[0] for line in lines] == [*SHAPES, "frozen", "total:"]
    assert "AdafacLO, weights a mapping (sha256 " in text
    assert report.totals["numel"] == sum(row["numel"] for row in report)
    sharded, replicated = (
        report.totals["sharded_state_bytes"],
        report.totals["replicated_state_bytes"],
    )
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


# ----------------------------------------------------------------------------------------- settings


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
        (
            {"adafactor_decays": (0.1, 0.1, float("inf"))},
            r"adafactor_decays=\(0.1, 0.1, inf\): wanted 3 finite numbers",
        ),
        (
            {"initial_momentum_decays": (0.9,)},
            r"initial_momentum_decays=\(0.9,\): wanted 3 finite numbers",
        ),
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
