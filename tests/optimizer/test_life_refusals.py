"""What is refused of a parameter's life, on all ranks and in one process; and states of partly
frozen models, which go from layout to layout by name.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pylo_dist
from pylo_dist.testing import largest_changes, layout_error
from support.ranks import run_ranks
from support.sharded_model import SETTINGS, whole

Params = dict[str, nn.Parameter]


class Net(nn.Module):
    """Sizes that two ranks cannot halve; `late` is frozen at first where a life says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.late, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.late(torch.tanh(self.first(x)))))
        return result


def _set(params: Params, prefix: str, trainable: bool) -> None:
    for name, param in params.items():
        if name.startswith(prefix):
            param.requires_grad_(trainable)


def apart(wanted: list[dict[str, Tensor]], got: list[dict[str, Tensor]]) -> float:
    """In units of the layout tolerance."""
    return max(layout_error(got[-1], wanted[-1], largest_changes(wanted)).values())


def refused(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, pylo_dist.PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank: int) -> dict[str, tuple[str, bool]]:
    """What each rank hears, and whether its parameters are as they were."""
    cls, kwargs = SETTINGS["AdafacLO"].face, dict(SETTINGS["AdafacLO"].arguments)
    found = {}

    def backward(model: nn.Module) -> None:
        model(torch.ones(2, 5)).square().mean().backward()

    def values(model: nn.Module) -> dict[str, Tensor]:
        return {name: whole(p).clone() for name, p in model.named_parameters()}

    def note(name: str, model: nn.Module, optimizer: Any) -> None:
        before = values(model)
        message = refused(optimizer.step)
        after = values(model)
        found[name] = message, all(torch.equal(before[n], after[n]) for n in before)

    for form in ("module", "named", "list"):
        model = Net()
        _set(dict(model.named_parameters()), "late", False)
        given: Any = {
            "module": model,
            "named": model.named_parameters(),
            "list": list(model.parameters()),
        }[form]
        zero = pylo_dist.ZeroOptimizer(given, cls, **kwargs)
        _set(dict(model.named_parameters()), "late", True)
        backward(model)
        note(f"unfrozen, {form}", model, zero)
    model = Net()
    fully_shard(model)
    sharded = cls(model.named_parameters(), **kwargs)
    if rank == 1:  # on one rank alone: the other must hear of it
        sharded.param_groups[0]["params"][0] = nn.Parameter(torch.ones(40))
    backward(model)
    note("flattened on one rank", model, sharded)
    model = Net()
    fully_shard(model)
    sharded = cls(model.named_parameters(), **kwargs)
    sharded.load_state_dict(sharded.state_dict())
    if rank == 1:
        sharded.param_groups[0]["params"][0] = nn.Parameter(torch.ones(40))
    backward(model)
    note("flattened on one rank after loading", model, sharded)
    model = Net()
    _set(dict(model.named_parameters()), "late", False)
    fully_shard(model)
    sharded = cls(model.named_parameters(), **kwargs)
    _set(dict(model.named_parameters()), "late", True)
    backward(model)
    _set(dict(model.named_parameters()), "late", False)
    note("gradient of a frozen one", model, sharded)
    model = Net()
    _set(dict(model.named_parameters()), "late", False)
    wrappers = [DistributedDataParallel(model)]
    optimizer = cls(model.named_parameters(), **kwargs)
    _set(dict(model.named_parameters()), "late", True)
    backward(wrappers[0])
    note("not averaged", model, optimizer)
    wrappers.append(DistributedDataParallel(model))  # beside the one before
    optimizer.zero_grad()
    backward(wrappers[1])
    found["wrapped again"] = refused(optimizer.step), True
    return found


def crossings() -> dict[str, bool]:
    """Whether a partly frozen model goes on alike after its state went from layout to layout."""
    cls, kwargs = SETTINGS["AdafacLO"].face, dict(SETTINGS["AdafacLO"].arguments)
    results = {}

    def build(form: str) -> tuple[nn.Module, Any]:
        model = Net()
        _set(dict(model.named_parameters()), "late", False)
        named = list(model.named_parameters())
        if form == "zero":
            return model, pylo_dist.ZeroOptimizer(model, cls, **kwargs)
        if form == "fsdp2":
            fully_shard(model)
            named = list(model.named_parameters())
        if form == "trainable":
            named = [(name, p) for name, p in named if p.requires_grad]
        return model, cls(named, **kwargs)

    def advance(model: nn.Module, optimizer: Any, step: int) -> None:
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()

    forms = ("all", "trainable", "zero", "fsdp2")
    for source in forms:
        model, optimizer = build(source)
        advance(model, optimizer, 0)
        state = copy.deepcopy(pylo_dist.full_state_dict(optimizer, rank0_only=False))
        values = {name: whole(p).clone() for name, p in model.named_parameters()}
        advance(model, optimizer, 1)
        wanted = {name: whole(p).clone() for name, p in model.named_parameters()}
        for target in forms:
            other, loaded = build(target)
            loaded.load_state_dict(state)
            with torch.no_grad():
                for name, param in other.named_parameters():
                    if hasattr(param, "device_mesh"):
                        from torch.distributed.tensor import distribute_tensor

                        value = distribute_tensor(values[name], param.device_mesh, param.placements)
                        param.copy_(value)
                    else:
                        param.copy_(values[name])
            advance(other, loaded, 1)
            got = {name: whole(p).clone() for name, p in other.named_parameters()}
            results[f"{source} -> {target}"] = apart([values, wanted], [values, got]) <= 1.0
    return results


def ranks_main(rank: int, world: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = {"refusals": refusals(rank), "crossings": crossings()}
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(2, ranks_main)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unfrozen, module", "'late.weight' was frozen.*add_param_group"),
        ("unfrozen, named", "'late.weight' was frozen.*add_param_group"),
        ("unfrozen, list", r"'group0\.2' was frozen.*add_param_group"),
        ("flattened on one rank", "'first.weight' of shape .*exchanged.*pylo_dist.deepspeed"),
        (
            "flattened on one rank after loading",
            "'first.weight' of shape .*exchanged.*pylo_dist.deepspeed",
        ),
        ("gradient of a frozen one", "'late.weight' has a gradient, and has been frozen"),
        ("not averaged", "'late.weight' was frozen when DistributedDataParallel"),
    ],
)
def test_what_cannot_be_served_is_refused_on_all_ranks(
    results: list[dict[str, Any]], what: str, message: str
) -> None:
    import re

    told = [result["refusals"][what] for result in results]
    assert all(unchanged for _, unchanged in told)
    assert any(re.search(message, text) for text, _ in told), told
    assert not any(text == "nothing" for text, _ in told), told


def test_a_model_may_be_wrapped_again(results: list[dict[str, Any]]) -> None:
    assert [result["refusals"]["wrapped again"][0] for result in results] == ["nothing"] * 2


def test_state_of_partly_frozen_models_is_matched_by_name(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert len(result["crossings"]) == 16
        assert all(result["crossings"].values()), result["crossings"]


# -------------------------------------------------------------------------------------- one process


def adafac(params: Any) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO(params, weights="demo", process_group=False)


def test_a_gradient_is_stepped_whatever_requires_grad_says() -> None:
    frozen, other = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    frozen.requires_grad_(False)  # from the start
    optimizer = adafac([frozen, other])
    frozen.grad, other.grad = torch.ones(3, 4), torch.ones(3, 4)
    optimizer.step()
    assert torch.equal(frozen, other)
    assert not torch.equal(other, torch.ones(3, 4))


def test_switching_builds_no_other_engine() -> None:
    model = Net()
    optimizer = adafac(model.named_parameters())
    engine = optimizer._ready()
    engine.captured = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            _set(dict(model.named_parameters()), "late", step % 2 == 0)
            optimizer.zero_grad()
            model(torch.ones(2, 5)).sum().backward()
            optimizer.step()
    assert optimizer._lineup.engine is engine


@pytest.mark.parametrize(
    ("exchange", "message"),
    [
        (
            lambda group: group.update(params=[nn.Parameter(torch.ones(16))]),
            r"'w' of shape \(3, 4\) was exchanged.*held 2 tensors and holds 1.*"
            r'import pylo_dist\.deepspeed.*"type": "AdafacLO"',
        ),
        (
            lambda group: group["params"].__setitem__(0, nn.Parameter(torch.ones(12))),
            r"'w' of shape \(3, 4\) was exchanged.*shape \(12,\)",
        ),
        (
            lambda group: group["params"].__setitem__(0, nn.Parameter(torch.ones(4, 3))),
            r"'w' of shape \(3, 4\) was exchanged.*shape \(4, 3\)",
        ),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_another_geometry_is_refused(
    exchange: Callable[[dict[str, Any]], None], message: str, steps: int
) -> None:
    w, b = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
    optimizer = adafac([("w", w), ("b", b)])
    for _ in range(steps):
        w.grad, b.grad = torch.ones(3, 4), torch.ones(4)
        optimizer.step()
    exchange(optimizer.param_groups[0])
    values = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    now = optimizer.param_groups[0]["params"]
    assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))


def test_a_tensor_of_the_same_shape_is_refused_where_deepspeed_exchanges_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its stage 0 does in bfloat16, and then takes a step of zeros."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.delitem(sys.modules, "pylo_dist.deepspeed", raising=False)
    optimizer = adafac([("w", nn.Parameter(torch.ones(3, 4)))])
    clone = nn.Parameter(torch.ones(3, 4))
    clone.grad = torch.zeros(3, 4)
    optimizer.param_groups[0]["params"][0] = clone
    with pytest.raises(ValueError, match=r"'w' was exchanged.*import pylo_dist\.deepspeed"):
        optimizer.step()
    assert int(optimizer.param_groups[0]["step"]) == 0


def test_a_group_put_in_by_hand_is_refused() -> None:
    w = nn.Parameter(torch.ones(3, 4))
    optimizer = adafac([w])
    optimizer.param_groups.append({"params": [nn.Parameter(torch.ones(2))]})
    w.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="group 1 was put into param_groups by hand"):
        optimizer.step()


def test_empty_groups_go_with_names_and_without() -> None:
    for named in (True, False):
        pairs = list(Net().named_parameters())
        params: list[Any] = pairs if named else [p for _, p in pairs]
        for groups in ([[], params], [params, []], [[], [], params]):
            optimizer = adafac([{"params": list(group)} for group in groups])
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert all(("param_names" in g) == named for g in optimizer.param_groups)


@pytest.mark.parametrize("names", [("none", "all"), ("all", "none")])
def test_an_empty_group_goes_through_torchs_functions(names: tuple[str, str]) -> None:
    """They lose its entries, and with them what VeLO keeps of the run."""
    runs = []
    for _ in range(2):
        model = Net()
        params = {"none": [], "all": list(model.named_parameters())}
        case = SETTINGS["VeLO_clipped"]
        groups = [{"params": params[names[0]]}, {"params": params[names[1]], "lr": 0.5}]
        runs.append((model, case.build(groups, process_group=False)))
    for step in range(4):
        for model, optimizer in runs if step > 1 else runs[:1]:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 5)).square().mean()
            loss.backward()
            optimizer.step(loss.detach())
        if step == 1:
            (model, optimizer), (other, loaded) = runs
            other.load_state_dict(model.state_dict())
            loaded.extend(1000)
            set_optimizer_state_dict(other, loaded, get_optimizer_state_dict(model, optimizer))
    (model, optimizer), (other, loaded) = runs
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for key in ("step", "num_steps", "loss_means", "lr"):
        ours, theirs = ([torch.as_tensor(g[key]) for g in o.param_groups] for _, o in runs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), key


@pytest.mark.parametrize("full", [False, True])
def test_state_of_frozen_parameters_is_not_lost_in_torchs_functions(full: bool) -> None:
    """torch passes over them, so that they would begin anew once they are unfrozen."""
    options = StateDictOptions(full_state_dict=full)
    model, other = Net(), Net()
    optimizer, loaded = adafac(model.named_parameters()), adafac(other.named_parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer, options=options)
    for source in (model, other):
        _set(dict(source.named_parameters()), "late", False)
    with pytest.raises(ValueError, match=r"'late.weight', which is frozen, was left out"):
        set_optimizer_state_dict(other, loaded, state, options=options)
    assert not any(bool(entry["momentum"].any()) for entry in loaded.state.values())
    _set(dict(other.named_parameters()), "late", True)
    set_optimizer_state_dict(other, loaded, state, options=options)
    for ours, theirs in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_of_a_state_survive_in_an_optimizer_without() -> None:
    named, bare = adafac(Net().named_parameters()), adafac(Net().parameters())
    bare.load_state_dict(named.state_dict())
    names = [name for name, _ in Net().named_parameters()]
    assert bare.state_dict()["param_groups"][0]["param_names"] == names


def test_trained_state_that_finds_no_place_is_refused() -> None:
    trained, model = adafac(Net().named_parameters()), Net()
    partly = adafac([(n, p) for n, p in model.named_parameters() if "late" not in n])
    with pytest.raises(ValueError, match=r"groups of \[6\].*\[4\].*'late.weight' is in the state"):
        partly.load_state_dict(trained.state_dict())
    with pytest.raises(ValueError, match=r"groups of \[4\].*\[6\].*'late.weight' is in the opt"):
        trained.load_state_dict(partly.state_dict())
