"""Settings that change over an optimizer's life: every number of every group is checked in each
step, on all ranks or on none.

Background: schedules write into `param_groups` on every rank by itself. A number that is other on
one rank, or none at all, must never become half a step.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import pylo_dist
from pylo_dist import comm
from pylo_dist.adapters.deepspeed.backward import BackwardRecord
from pylo_dist.optimizer import engine, settings
from pylo_dist.optimizer.settings import GroupNumbers
from support import small_gpt
from support.optimizer_cases import (
    adafac,
    after,
    everything,
    make_params,
    same,
    set_gradients,
    train,
    values,
)
from support.optimizers import Roles, cases
from support.ranks import run_ranks

BUILD = {
    name: (case.face, dict(case.arguments))
    for name, case in cases(
        Roles(widths={"matrix": 2.0}, embedding="embedding"), built_in=True
    ).items()
}
# ------------------------------------------------------------------------------------- one process

BAD: list[tuple[str, str, Any]] = [
    ("AdafacLO", "lr", math.nan),
    ("AdafacLO", "lr", "x"),
    ("AdafacLO", "lr", None),
    ("AdafacLO", "lr", torch.tensor(math.inf)),
    ("AdafacLO", "lr", torch.ones(2)),
    ("AdafacLO", "weight_decay", -1.0),
    ("AdafacLO", "exp_mult", math.inf),
    ("AdafacLO", "step_mult", 10**400),
    ("AdafacLO", "max_grad_norm", 0.0),
    ("AdafacLO", "max_grad_norm", "x"),
    ("MuLO", "width_mults", {"bias": math.nan}),
    ("VeLO", "num_steps", "x"),
    ("VeLO", "num_steps", 1),
    ("ELO", "exp_mult", "x"),
    ("CELO2", "adam_lr_mult", None),
    ("CELO2", "adam_weight_decay", math.nan),
    ("CELO2", "rmsmult", None),
    ("ELO_CELO2", "rmsmult", "x"),
]


@pytest.mark.parametrize(("name", "key", "value"), BAD, ids=lambda value: str(value)[:8])
def test_a_number_that_became_bad_is_named_and_nothing_changes(
    name: str, key: str, value: Any
) -> None:
    face, arguments = BUILD[name]
    if name == "MuLO":
        arguments = {**arguments, "width_mults": {}}
    named = make_params()
    optimizer = face([{"params": named[:2]}, {"params": named[2:]}], **arguments)
    group, loss = optimizer.param_groups[1], torch.tensor(1.0)
    set_gradients(named, 0)
    optimizer.step(loss)
    before, good = everything(optimizer), group[key]
    group[key] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"parameter group 1: {key}.*: wanted"):
            optimizer.step(loss)
        assert group[key] is value
    group[key] = good
    assert same(everything(optimizer), before)
    optimizer.step(loss)
    assert int(group["step"]) == 2


def test_what_may_change_may_change() -> None:
    """None where the signature has None, whole numbers for fractions, tensors for floats."""
    named = make_params()
    optimizer = pylo_dist.CELO2(named, **{**BUILD["CELO2"][1], "adam_weight_decay": 0.1})
    for change in (
        {"adam_weight_decay": None},
        {"max_grad_norm": 1.0},
        {"max_grad_norm": None},
        {"lr": torch.tensor(0.01)},
        {"lr": 1},
    ):
        optimizer.param_groups[0].update(change)
        set_gradients(named, 0)
        optimizer.step()
    assert int(optimizer.param_groups[0]["step"]) == 5


def test_a_step_without_other_ranks_adds_nothing_over_ranks() -> None:
    named = make_params()
    optimizer = adafac(named)
    for step in range(2):
        set_gradients(named, step)
        optimizer.param_groups[0]["lr"] = 1.0
        assert list(optimizer.phases()) == []
    assert same(values(named), after(2))


def test_a_tensor_on_a_device_is_judged_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it lies on the CPU and passes for one of a GPU, whose flags the next step looks at."""
    monkeypatch.setattr(settings, "_elsewhere", lambda x: isinstance(x, Tensor) and x.dim() == 0)
    monkeypatch.setattr(settings, "check_device_numbers", lambda group: None)
    begin = engine._PendingErrors.__init__

    def later(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.at_once = False

    monkeypatch.setattr(engine._PendingErrors, "__init__", later)
    named, lr = make_params(), torch.tensor(1.0)
    optimizer = adafac(named, lr=lr)
    train(optimizer, named, 0, 1)
    before = everything(optimizer)
    lr.fill_(math.nan)
    set_gradients(named, 1)
    optimizer.step()
    assert same(values(named), after(1))
    lr.fill_(1.0)
    with pytest.raises(ValueError, match=r"parameter group 0: lr=.*: wanted a finite num"):
        optimizer.step()
    assert same(everything(optimizer), before)
    optimizer.step()
    assert same(values(named), after(2))


# --------------------------------------------------------------------------------------- comparison


def numbers_of(*groups: dict[str, Any]) -> GroupNumbers:
    numbers = GroupNumbers(object, {"lr": 1.0, "decay": 0.0}, (), lambda group: None)
    assert numbers.read(groups, None) is None
    return numbers


@pytest.mark.parametrize("ranks", [2, 3, 4096])
@pytest.mark.parametrize("by_group", [True, False])
def test_sums_tell_any_two_numbers_apart(ranks: int, by_group: bool) -> None:
    """Neighbours in float64, both zeros, and None, however many ranks hold the one and a single one
    the other.
    """
    here = torch.device("cpu")
    base = numbers_of({"lr": 0.1, "decay": 0.0}, {"lr": 3.0, "decay": 1e300})
    alike = base.buffer(here, by_group) * ranks
    assert not bool(base.judge([alike], here))
    for group, key, value in (
        (0, "lr", math.nextafter(0.1, 1.0)),
        (0, "lr", -0.1),
        (1, "lr", None),
        (1, "decay", math.nextafter(1e300, 0.0)),
    ):
        groups = [{"lr": 0.1, "decay": 0.0}, {"lr": 3.0, "decay": 1e300}]
        groups[group][key] = value  # type: ignore[assignment]
        other = GroupNumbers(object, {}, ("lr", "decay"), lambda group: None)
        other.read(groups, None)
        mixed = base.buffer(here, by_group) * (ranks - 1) + other.buffer(here, by_group)
        assert bool(base.judge([mixed], here))
        where = f"parameter group {group}" if by_group else "the parameter groups"
        with pytest.raises(ValueError, match=f"'{key}' of {where} is not the same on all ranks"):
            raise base.error()
        base.forget()


# -------------------------------------------------------------------------------------- real ranks


def layouts() -> dict[str, Any]:
    """By layout: a model with its optimizer, of two groups where that is free."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))

    def halves(net: nn.Module) -> list[dict[str, Any]]:
        named = list(net.named_parameters())
        return [{"params": named[:2]}, {"params": named[2:]}]

    def zero(name: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        net = model()
        face, arguments = BUILD[name]
        return net, pylo_dist.ZeroOptimizer(halves(net), face, **{**arguments, **kwargs})

    def adamw() -> tuple[nn.Module, Any]:
        net = model()
        return net, pylo_dist.ZeroOptimizer(halves(net), torch.optim.AdamW, lr=0.1)

    def fsdp() -> tuple[nn.Module, Any]:
        net = model()
        fully_shard(net)
        face, arguments = BUILD["AdafacLO"]
        return net, face(halves(net), **arguments)

    def ddp() -> tuple[nn.Module, Any]:
        net = DistributedDataParallel(model())
        face, arguments = BUILD["VeLO"]
        return net, face(net.named_parameters(), **arguments)

    return {
        "ZeRO, AdafacLO": lambda: zero("AdafacLO"),
        "ZeRO, MuLO": lambda: zero("MuLO", width_mults={}),
        "ZeRO, VeLO": lambda: zero("VeLO"),
        "ZeRO, CELO2": lambda: zero("CELO2"),
        "ZeRO, AdamW": adamw,
        "FSDP2, AdafacLO": fsdp,
        "DDP, VeLO": ddp,
    }


CHANGES: dict[str, list[tuple[str, Any]]] = {
    "ZeRO, AdafacLO": [
        ("lr", 0.1),
        ("lr", math.nan),
        ("lr", "x"),
        ("max_grad_norm", 1.0),
        ("lr", torch.tensor(0.5)),
        ("weight_decay", 1e-9),
    ],
    "ZeRO, MuLO": [("width_mults", {"0.weight": 2.0, "2.weight": 2.0})],
    "ZeRO, VeLO": [("num_steps", 60), ("num_steps", "x"), ("step_mult", 0.5)],
    "ZeRO, CELO2": [("rmsmult", 2.0), ("adam_lr_mult", None), ("adam_weight_decay", 0.5)],
    "ZeRO, AdamW": [
        ("lr", 0.5),
        ("lr", math.nan),
        ("lr", "x"),
        ("betas", (0.8, 0.999)),
        ("maximize", True),
        ("weight_decay", torch.tensor(0.5)),
    ],
    "FSDP2, AdafacLO": [("lr", 0.1), ("exp_mult", "x")],
    "DDP, VeLO": [("lr", 0.1), ("lr", "x"), ("num_steps", 60)],
}


def change_one_rank(rank: int, world: int) -> dict[str, list[tuple[str, bool]]]:
    """What every change on rank 1 alone is answered with, and whether nothing moved."""
    said: dict[str, list[tuple[str, bool]]] = {}
    for layout, build in layouts().items():
        net, optimizer = build()

        def step(net: nn.Module = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            loss = net(torch.full((2, 4), 1.0 + rank)).square().mean()
            loss.backward()
            optimizer.step(loss.item())  # a number is a loss in every layout

        def now(net: nn.Module = net) -> list[Tensor]:
            tensors = list(net.parameters())
            return [getattr(p, "_local_tensor", p).detach().clone() for p in tensors]

        step()
        for key, value in CHANGES[layout]:
            group = optimizer.param_groups[-1]
            good, before = group[key], now()
            if rank == 1:
                group[key] = value
            try:
                step()
                said.setdefault(layout, []).append(("no error", False))
            except (ValueError, comm.PeerError) as error:
                unmoved = all(map(torch.equal, before, now()))
                text = f"{type(error).__name__}: {error}"
                said.setdefault(layout, []).append((text, unmoved))
            group[key] = good
            step()
        for group in optimizer.param_groups:  # alike on all ranks
            group["lr"] = 0.5
        before = now()
        step()
        assert not all(map(torch.equal, before, now()))
    return said


def test_a_change_on_one_rank_is_refused_on_all() -> None:
    first, second = run_ranks(2, change_one_rank)
    for layout, changes in CHANGES.items():
        index = 0 if layout == "DDP, VeLO" else 1
        for (key, value), here, there in zip(changes, first[layout], second[layout], strict=True):
            assert here[1], (layout, key, here)
            assert there[1], (layout, key, there)
            if value is None or value == "x" or value != value:
                assert there[0].startswith(f"ValueError: parameter group {index}: {key}="), there
                assert here[0].startswith("PeerError: another rank could not take this step"), here
            else:
                wanted = f"ValueError: '{key}' of parameter group {index} is not the same on all"
                assert here[0].startswith(wanted), (layout, here)
                assert there[0].startswith(wanted), (layout, there)


# ----------------------------------------------------------------------------------- AdamW's habits


def caught(build: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        build()
    inside = (str(Path(module.__file__).parent) + "/" for module in (pylo_dist, torch))
    for folder in inside:  # a warning points at the caller's line
        assert not any(record.filename.startswith(folder) for record in records)
    return [f"{record.category.__name__}: {record.message}" for record in records]


def test_an_lr_or_decay_of_adamw_is_warned_of_once() -> None:
    named = make_params()

    def groups(**settings: Any) -> list[dict[str, Any]]:
        return [{"params": named[:2], **settings}, {"params": named[2:], **settings}]

    for build, wanted in (
        (lambda: adafac(named, lr=6e-4), "lr=0.0006"),
        (lambda: adafac(named, lr=torch.tensor(1e-3)), "lr=0.001"),
        (lambda: adafac(groups(lr=6e-4)), "lr=0.0006"),
        (lambda: adafac(named, weight_decay=0.1), "weight_decay=0.1 at lr=1"),
        (lambda: adafac(groups(weight_decay=0.02)), "weight_decay=0.02"),
        (lambda: pylo_dist.VeLO(named, **BUILD["VeLO"][1], lr=0.01), "lr=0.01"),
        (lambda: pylo_dist.MuLO(named, weights="demo", width_mults={}, lr=0.04), "lr=0.04"),
        (lambda: pylo_dist.ELO(named, weights=BUILD["ELO"][1]["weights"], lr=1.0, weight_decay=0.1),
         "weight_decay=0.1"),
        (
            lambda: pylo_dist.ZeroOptimizer(nn.Linear(2, 2), pylo_dist.AdafacLO, weights="demo",
                                            lr=6e-4),
            "lr=0.0006",
        ),
    ):  # fmt: skip
        said = caught(build)
        assert len(said) == 1, said
        assert said[0].startswith(f"LearningRateWarning: {wanted}"), said
    assert issubclass(pylo_dist.LearningRateWarning, UserWarning)


def test_schedules_and_moderate_settings_are_not_warned_of() -> None:
    for name, (face, arguments) in BUILD.items():
        further = {"width_mults": {}} if name == "MuLO" else {}
        assert caught(lambda face=face, a={**arguments, **further}: face(make_params(), **a)) == []
    named = make_params()
    assert caught(lambda: adafac(named, lr=0.05, weight_decay=0.2)) == []

    def warmed_up() -> None:
        optimizer = adafac(named, weight_decay=0.01)
        schedule = LambdaLR(optimizer, lambda step: step / 100)
        for step in range(3):
            set_gradients(named, step)
            optimizer.step()
            schedule.step()
        optimizer.load_state_dict(optimizer.state_dict())

    assert caught(warmed_up) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", pylo_dist.LearningRateWarning)
        adafac(named, lr=6e-4)


def test_one_lr_tensor_in_several_groups_is_warned_of_once() -> None:
    named, lr = make_params(), torch.tensor(0.7)
    thirds = [{"params": named[:1]}, {"params": named[1:2]}, {"params": named[2:]}]
    said = caught(lambda: adafac(thirds, lr=lr))
    assert len(said) == 1
    assert said[0].startswith("UserWarning: several parameter groups share one lr tensor")
    own = [{**third, "lr": lr.clone()} for third in thirds]
    assert caught(lambda: adafac(own, lr=lr)) == []


def test_steps_without_any_gradient_are_warned_of_once() -> None:
    named = make_params()
    for optimizer in (adafac(named), pylo_dist.VeLO(named, **BUILD["VeLO"][1])):
        set_gradients(named, 0)
        named[0][1].grad = None  # one alone may have none
        assert caught(lambda o=optimizer: o.step(1.0)) == []
        optimizer.zero_grad()
        said = caught(lambda o=optimizer: [o.step(1.0) for _ in range(3)])
        assert len(said) == 1
        assert said[0].startswith("NoGradientWarning: a step of "), said
        assert "found no gradient of any parameter, on this rank or those" in said[0]
        assert int(optimizer.param_groups[0]["step"]) == 4


def test_following_the_warnings_trains() -> None:
    """The config of a script written for AdamW is warned of twice, each time with what helps."""
    config = small_gpt.Config()
    with pytest.warns(pylo_dist.LearningRateWarning, match="belongs around 1"):
        kept = small_gpt.train(config)
    config = small_gpt.Config(learning_rate=1.0, min_lr=0.1)
    with pytest.warns(pylo_dist.LearningRateWarning, match=r"0.1 at 6e-4 is 6e-5"):
        decayed = small_gpt.train(config)
    config = small_gpt.Config(learning_rate=1.0, min_lr=0.1, weight_decay=6e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pylo_dist.LearningRateWarning)
        followed = small_gpt.train(config)
    assert followed < min(kept, decayed) - 0.2, (kept, decayed, followed)


# ------------------------------------------------------------------------------------------ losses


def velo_steps(give: Any, wrap: Any = lambda optimizer: optimizer) -> dict[str, Tensor]:
    named = make_params(dtype=torch.float64)
    optimizer = wrap(pylo_dist.VeLO(named, **BUILD["VeLO"][1]))
    for step in range(3):
        set_gradients(named, step)
        give(optimizer, torch.tensor(0.1 + step / 3, dtype=torch.float64))
    return values(named)


GIVEN: dict[str, Any] = {
    "step(loss.item())": lambda optimizer, loss: optimizer.step(loss.item()),
    "step(loss=float)": lambda optimizer, loss: optimizer.step(loss=loss.item()),
    "set_loss(float)": lambda optimizer, loss: (optimizer.set_loss(loss.item()), optimizer.step()),
    "set_loss before a state is loaded": lambda optimizer, loss: (
        optimizer.set_loss(loss.item()),
        optimizer.load_state_dict(optimizer.state_dict()),  # as torchft's manager heals a replica
        optimizer.step(),
    ),
    "closure": lambda optimizer, loss: optimizer.step(loss.item),
    "NumPy": lambda optimizer, loss: optimizer.step(loss.numpy()),
}


@pytest.mark.parametrize("way", GIVEN)
def test_a_number_is_a_loss_as_a_tensor_is(way: str) -> None:
    """In all its 64 bits."""
    assert same(velo_steps(GIVEN[way]), velo_steps(lambda o, loss: o.step(loss)))


@pytest.mark.parametrize(
    "loss", ["x", torch.ones(2), [1.0, 2.0], object()], ids=["text", "vector", "list", "object"]
)
def test_what_is_no_loss_is_refused_by_the_step(loss: Any) -> None:
    named = make_params()
    optimizer = pylo_dist.VeLO(named, **BUILD["VeLO"][1])
    set_gradients(named, 0)
    with pytest.raises(ValueError, match="wanted a scalar"):
        optimizer.step(loss)
    optimizer.step(1.5)
    assert int(optimizer.param_groups[0]["step"]) == 1


def test_deepspeed_is_given_numbers_too() -> None:
    record = BackwardRecord()
    for loss in (1.5, torch.tensor(1.5)):
        record.set_loss(loss)
        assert record.loss == 1.5
        record.forget()


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO"])
def test_torch_compile_leaves_a_step_as_it_is(name: str) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        named = make_params()
        optimizer = BUILD[name][0](named, **BUILD[name][1])
        schedule = LambdaLR(optimizer, lambda step: 0.8**step)

        def step(loss: Tensor, optimizer: Any = optimizer) -> None:
            optimizer.set_loss(loss)
            optimizer.step()

        ways = (optimizer.step, step)
        if compiled:
            ways = tuple(torch.compile(way, backend="eager") for way in ways)
        for number, way in enumerate(ways * 2):
            set_gradients(named, number)
            way(torch.tensor(0.5)) if number % 2 else way(loss=torch.tensor(0.5))
            schedule.step()
        results.append(values(named))
    assert same(*results)
