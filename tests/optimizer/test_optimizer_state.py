"""Copies, files and state of an optimizer, and which parameters it serves. Whole tensors, compared
to the bit.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from support.optimizer_cases import (
    SHAPES,
    adafac,
    after,
    everything,
    make_params,
    same,
    set_gradients,
    train,
    values,
)

# --------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_keep_what_is_no_state(way: str) -> None:
    named = make_params()
    optimizer = adafac(named, lr=0.5, precision="highest", process_group=False)
    pair = (optimizer, named)
    twin, twin_named = (
        copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    assert not {p.data_ptr() for _, p in twin_named} & {p.data_ptr() for _, p in named}
    assert (twin.precision, twin.process_group) == ("highest", False)
    train(twin, twin_named, 0, 2)
    optimizer.load_state_dict(twin.state_dict())
    twin.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))]})
    assert twin.param_groups[1]["lr"] == 0.5


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


def test_state_shapes() -> None:
    named = make_params()
    optimizer = adafac(named)
    shapes = {
        fqn: {name: tuple(t.shape) for name, t in optimizer.state[p].items()} for fqn, p in named
    }
    assert shapes == {
        "scalar": {"momentum": (3,), "rms": (), "diag": (3,)},
        "bias": {"momentum": (3, 5), "rms": (5,), "diag": (3, 5)},
        "wide": {"momentum": (3, 3, 7), "rms": (3, 7), "row": (3, 3), "col": (3, 7)},
        "square": {"momentum": (3, 4, 4), "rms": (4, 4), "row": (3, 4), "col": (3, 4)},
        "conv": {
            "momentum": (3, 5, 2, 3, 3),
            "rms": (5, 2, 3, 3),
            "row": (3, 2, 3, 3),
            "col": (3, 5, 2, 3),
        },
    }


def test_loading_leaves_settings_of_this_process_alone() -> None:
    optimizer = adafac(make_params(), process_group=False)
    optimizer.timeout = 5.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.timeout, optimizer.process_group) == (5.0, False)


def test_hooks_of_users_see_what_was_loaded() -> None:
    """And give what is to be loaded: ours run between theirs."""
    named, other = make_params(), make_params()
    optimizer, donor = adafac(named), adafac(other)
    train(donor, other, 0, 2)
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: donor.state_dict())
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append([dict(s) for s in o.state.values()])
    )
    optimizer.register_state_dict_post_hook(
        lambda _, state: {**state, "names": state["param_groups"][0]["param_names"]}
    )
    optimizer.load_state_dict({})
    assert all(same(a, dict(b)) for a, b in zip(seen[0], donor.state.values(), strict=True))
    assert optimizer.state_dict()["names"] == list(SHAPES)


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


def test_a_copy_looks_at_its_parameters_anew() -> None:
    """What it knew of them by id is of another process, or of a version that knew none."""
    optimizer = adafac(make_params())
    optimizer._params.__dict__.pop("ids")
    again = pickle.loads(pickle.dumps(optimizer))
    assert again._params.ids == []
    for param in again.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    again.step()
    assert again._params.ids == [id(param) for param in again.param_groups[0]["params"]]


def _no_step(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["step"]


def _steps(state: dict[str, Any]) -> None:
    state["param_groups"][0]["step"] = torch.zeros(2)


def _step_text(state: dict[str, Any]) -> None:
    state["param_groups"][0]["step"] = "x"


def _no_lr(state: dict[str, Any]) -> None:
    del state["param_groups"][0]["lr"]


def _lr_text(state: dict[str, Any]) -> None:
    state["param_groups"][0]["lr"] = "x"


def _negative_decay(state: dict[str, Any]) -> None:
    state["param_groups"][0]["weight_decay"] = -1.0


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
        (_steps, r"group 0 of the state has step=tensor\(.*wanted real numbers of shape \(\)"),
        (_step_text, "group 0 of the state has step='x'"),
        (_no_lr, "group 0 of the state has no 'lr'"),
        (_lr_text, "group 0 of the state: lr='x': wanted a finite number"),
        (_negative_decay, "group 0 of the state: weight_decay=-1.0: wanted"),
        (_no_groups, "'param_groups'"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_nothing_changes(
    damage: Callable[[Any], None], message: str
) -> None:
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
    set_gradients(
        [(fqn, p) for fqn, p in zip(SHAPES, fresh.param_groups[0]["params"], strict=True)], 2
    )
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


# --------------------------------------------------------------------------------- which parameters


def test_frozen_parameters_have_no_state_until_they_are_unfrozen() -> None:
    named = make_params()
    frozen = named[2][1].requires_grad_(False)
    value = frozen.detach().clone()
    optimizer = adafac(named)
    train(optimizer, named[:2] + named[3:], 0, 2)
    assert torch.equal(frozen, value)
    assert frozen not in optimizer.state
    assert sorted(optimizer.state_dict()["state"]) == [0, 1, 3, 4]
    again = adafac(
        [(fqn, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)) for fqn, p in named]
    )
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
    frozen.grad = None
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


def test_expanded_gradients() -> None:
    named, other = (
        make_params({"vector": (5,), "matrix": (3, 7)}),
        make_params({"vector": (5,), "matrix": (3, 7)}),
    )
    for (_, a), (_, b) in zip(named, other, strict=True):
        a.grad = torch.tensor(0.5).expand(a.shape)
        b.grad = torch.full(b.shape, 0.5)
    adafac(named).step()
    adafac(other).step()
    assert same(values(named), values(other))


@pytest.mark.parametrize("ones", [False, True], ids=["some", "all"])
def test_gradients_that_are_negated_where_they_are_read(ones: bool) -> None:
    """torch marks them so (`imag` of a conjugate): their memory has the other sign."""
    named, other = make_params(), make_params()
    optimizers = adafac(named), adafac(other)
    for i in range(3):
        set_gradients(named, i)
        set_gradients(other, i)
        for k, (_, param) in enumerate(other):
            if (ones or k == 1) and param.grad is not None:
                param.grad = torch._neg_view(-param.grad)
                assert param.grad.is_neg()
        for optimizer in optimizers:
            optimizer.step()
    assert same(values(named), values(other))


def test_gradients_of_a_precision_that_is_not_served_are_refused_by_name() -> None:
    named = make_params()
    optimizer = adafac(named)
    set_gradients(named, 0)
    before = everything(optimizer)
    (fqn, param), grad = named[1], named[1][1].grad
    assert grad is not None
    param.grad = None
    param.grad_dtype = None  # torch takes any then
    param.grad = grad.double()
    message = f"'{fqn}' has a gradient of torch.float64.*torch.float32"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert same(everything(optimizer), before)
    param.grad = grad.bfloat16()
    optimizer.step()


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
        (
            nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
            r"'p' is torch.complex64.*view_as_real",
        ),
        (
            nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False),
            r"'p' is torch.int32.*floating-point",
        ),
        (nn.Parameter(torch.zeros(3, dtype=torch.bool), requires_grad=False), r"'p' is torch.bool"),
        (nn.Parameter(torch.eye(3).to_sparse()), r"'p' has layout torch.sparse_coo.*dense"),
    ],
    ids=["complex", "integer", "bool", "sparse"],
)
def test_parameters_that_cannot_be_served_are_refused_by_name(
    param: nn.Parameter, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adafac([("good", nn.Parameter(torch.zeros(2))), ("p", param)])
