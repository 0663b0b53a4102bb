"""Groups, settings and views of an optimizer, for all of them by the example of AdafacLO. What each
has to keep by itself: tests/contracts.
"""

from __future__ import annotations

import copy
import time
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn

import pylo_dist
from pylo_dist import comm
from pylo_dist.layouts.plain import collect
from pylo_dist.optimizer.engine import Engine
from pylo_dist.optimizer.settings import arguments_of
from support.optimizer_cases import (
    SHAPES,
    adafac,
    after,
    build,
    everything,
    make_params,
    same,
    set_gradients,
    train,
    values,
)
from support.optimizers import small_fc
from support.own_rule import Tide, tide_weights

# ------------------------------------------------------------------------------------------- groups


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


@pytest.mark.parametrize("kind", [set, frozenset, WeakSet])
@pytest.mark.parametrize("optimizer_class", [pylo_dist.AdafacLO, torch.optim.AdamW])
def test_parameters_without_an_order_are_refused(kind: type[Any], optimizer_class: Any) -> None:
    """Processes would number, name and place them differently; torch itself asks of groups only."""
    params = [param for _, param in make_params()]
    message, learned = "in a list, in the model's order", optimizer_class is pylo_dist.AdafacLO
    kwargs = {"weights": small_fc()} if learned else {}
    late = {"params": kind(params[1:])}
    for given in (kind(params), [{"params": params[:1]}, late]):
        with pytest.raises(TypeError, match=message):
            pylo_dist.ZeroOptimizer(given, optimizer_class, **kwargs)
        if learned:
            with pytest.raises(TypeError, match=message):
                optimizer_class(given, **kwargs)
    optimizer = pylo_dist.ZeroOptimizer(params[:1], optimizer_class, **kwargs)
    with pytest.raises(TypeError, match=f'"params" of group 1 are in a {kind.__name__}, .*a list'):
        optimizer.add_param_group(late)
    if learned:
        plain = optimizer_class(params[:1], **kwargs)
        with pytest.raises(TypeError, match='"params" of group 1'):
            plain.add_param_group(late)
    ordered = dict(make_params())  # a dict's views have its order
    for view in (ordered.values(), ordered.items()):
        pylo_dist.ZeroOptimizer(view, optimizer_class, **kwargs)


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


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "CELO2"])
def test_an_optimizer_around_ours_may_copy_the_groups(name: str) -> None:
    """Wrappers put dicts and lists of their own, with the same parameters, in the place of ours."""

    def after_three(copies: bool) -> dict[str, torch.Tensor]:
        named = make_params()
        halves = [{"params": named[:2]}, {"params": named[2:], "lr": 0.5}]
        optimizer = build(name, named, halves)
        for step in range(3):
            if copies:
                groups = [{**g, "params": list(g["params"])} for g in optimizer.param_groups]
                optimizer.param_groups = groups
            train(optimizer, named, step, step + 1)
        assert [int(group["step"]) for group in optimizer.param_groups] == [3, 3]
        return values(named)

    assert same(after_three(True), after_three(False))


@pytest.mark.parametrize("mode", ["foreach", "fused", "capturable", "differentiable", "maximize"])
def test_modes_of_torch_optimizers_are_refused(mode: str) -> None:
    named = make_params()
    with pytest.raises(ValueError, match=f"{mode}=True in a parameter group"):
        adafac([{"params": named, mode: True}])
    with pytest.raises(TypeError, match=mode):
        adafac(named, **{mode: True})
    adafac([{"params": named, mode: False}])


@pytest.mark.parametrize("name", ["AdafacLO", "CELO2", "VeLO"])
def test_arguments_that_no_group_has_are_refused_in_one(name: str) -> None:
    """They would be kept in it, and read by nobody."""
    named = make_params()
    optimizer = build(name, named, [{"params": named[:2]}])
    served = {*optimizer.defaults, *optimizer.group_keys, "state_seed"}
    elsewhere = {*arguments_of(type(optimizer))} - served
    assert {"state_dtype", "weights", "nonfinite", "process_group", "precision"} <= elsewhere
    for key in sorted(elsewhere):
        with pytest.raises(ValueError, match=f"{key}=.* in a parameter group: .*{name}"):
            optimizer.add_param_group({"params": named[2:], key: None})
    with pytest.raises(ValueError, match="state_dtype='bfloat16' in a parameter group"):
        build(name, named, [{"params": named, "state_dtype": "bfloat16"}])
    assert len(optimizer.param_groups) == 1
    further = dict(optimizer.param_groups[0])
    optimizer.add_param_group({**further, "params": named[2:], "param_names": None, "tag": "mine"})
    # as of wrappers that write into every group what they give the constructor
    build(name, named, [{"params": named, "nonfinite": "skip"}], nonfinite="skip")


def test_parameters_on_two_devices_step_in_lock_step() -> None:
    """One rule drives a batch per device, their phases interleaved; nothing may pass from one to
    the other. Both batches are on the CPU here, made by two optimizers that share the rule."""
    named, alone = make_params(), make_params()
    first, second = adafac(named[:2], lr=0.5), adafac(named[2:])
    train(second, named[2:], 0, 1)  # another step count
    set_gradients(named, 1)
    second._lineup.rule = first.rule
    second._lineup.retire()
    for optimizer in (first, second):
        optimizer._ready()
        for member in optimizer._lineup.members:
            member.item.param = collect(member.binding, member.param)
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


def test_what_counts_as_finite_follows_the_bound_of_now() -> None:
    """A square beyond float32 fits no state, and a clipped gradient has none."""
    named = make_params()
    optimizer = adafac(named)
    group = optimizer.param_groups[0]
    train(optimizer, named, 0, 1)
    for bound in (None, 1.0, None):
        group["max_grad_norm"] = bound
        set_gradients(named, 1)
        named[0][1].grad.view(-1)[0] = 1e25  # type: ignore[union-attr]
        before = values(named)
        if bound is None:
            with pytest.raises(pylo_dist.NonFiniteGradientError, match=named[0][0]):
                optimizer.step()
            assert same(values(named), before)
        else:
            optimizer.step()
            assert not same(values(named), before)


def test_values_put_elsewhere_between_steps_are_moved_there() -> None:
    named, twins = make_params(), make_params()
    optimizer, twin = adafac(named), adafac(twins)
    for step in range(3):
        train(optimizer, named, step, step + 1)
        train(twin, twins, step, step + 1)
        for _, param in named:
            param.data = param.data.clone()
    assert same(values(named), values(twins))


# -------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("size", [4, 81])
def test_gradients_exchanged_for_others_are_refused(size: int) -> None:
    """In steps like most, of which tensors are looked at in lists."""
    params = [nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(3))]
    optimizer = pylo_dist.AdafacLO(params, weights="demo")
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    params[0].grad.data = torch.ones(size)  # type: ignore[union-attr]
    before = params[1].detach().clone()
    with pytest.raises(ValueError, match=f"gradient of 'group0.0' has {size} elements"):
        optimizer.step()
    assert torch.equal(params[1], before)


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


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": "norm"}, "clip='norm': wanted one of 'global', 'per_tensor'"),
        ({"nonfinite": None}, "nonfinite=None: wanted one of 'error', 'skip', 'allow'"),
        ({"precision": "fp16"}, "precision='fp16': wanted one of 'highest', 'high', 'medium'"),
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
            r"initial_momentum_decays=\(0.9,\): wanted 3 numbers in \[0, 1\)",
        ),
        ({"initial_rms_decays": ("a",)}, r"initial_rms_decays=\('a',\): wanted 1 number in"),
        ({"state_dtype": "float16"}, "state_dtype='float16': wanted 'float32' .* or 'bfloat16'"),
        ({"state_dtype": torch.float64}, "state_dtype=torch.float64: wanted 'float32'"),
        ({"state_dtype": 16}, "state_dtype=16: wanted 'float32'"),
        ({"state_seed": -1}, "state_seed=-1: wanted an int >= 0"),
        ({"state_seed": 0.5}, "state_seed=0.5: wanted an int >= 0"),
        ({"state_seed": True}, "state_seed=True: wanted an int >= 0"),
        ({"state_dtype": "bfloat16", "state_seed": 2**53}, "state_seed=9007199254740992: wanted"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adafac(make_params(), **settings)


def test_state_that_cannot_be_halved_is_refused() -> None:
    double = [("w", nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)))]
    with pytest.raises(ValueError, match=r"state_dtype='bfloat16': 'w' is torch.float64, and so"):
        adafac(double, state_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"the rule 'tide' says of no state that it may be rounde"):
        Tide(make_params(), weights=tide_weights(), state_dtype=torch.bfloat16)
    optimizer = adafac(make_params(), state_dtype="bfloat16")
    more = {"params": [("more", nn.Parameter(torch.zeros(2)))], "state_seed": "a"}
    with pytest.raises(ValueError, match="state_seed='a': wanted an int >= 0"):
        optimizer.add_param_group(more)
    assert len(optimizer.param_groups) == 1


def test_halved_state_is_reported() -> None:
    """A matrix of 3 x 7: 4 means of 2 bytes in place of 4, and the factors as they are."""
    whole, halved = adafac(make_params()), adafac(make_params(), state_dtype="bfloat16")
    rows = [{row["fqn"]: row["state_bytes"] for row in o.report()} for o in (whole, halved)]
    assert rows[0]["wide"] - rows[1]["wide"] == 4 * 21 * 2
    assert rows[1]["wide"] == 4 * 21 * 2 + 3 * (3 + 7) * 4
    assert rows[1]["bias"] == 5 * (4 * 2 + 3 * 4)
    assert "state in bfloat16 (seed 0)" in str(halved.report())
    assert "bfloat16" not in str(whole.report())


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
