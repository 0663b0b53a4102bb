"""State of every optimizer: copies, files and folders go on to the bit, and belong to nobody else.

One process, whole tensors; between layouts: test_real_ranks.py, tests/checkpoint.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pylo_dist import checkpoint
from support.optimizer_cases import EVERY, Named, build, everything, make_params, same, train
from support.optimizers import OPTIMIZERS

# rates are large here, so that settings show
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
Pair = tuple[Any, Named]


def container(named: Named) -> nn.Module:
    """A module of these parameters."""
    module = nn.Module()
    for fqn, param in named:
        module.register_parameter(fqn, param)
    return module


def copied(name: str, pair: Pair, folder: Path) -> Pair:
    return copy.deepcopy(pair)


def pickled(name: str, pair: Pair, folder: Path) -> Pair:
    return pickle.loads(pickle.dumps(pair))


def through_a_file(name: str, pair: Pair, folder: Path) -> Pair:
    """`torch.save` and `weights_only`, as training scripts have it."""
    optimizer, named = pair
    file = io.BytesIO()
    torch.save({"params": dict(named), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = [(fqn, nn.Parameter(saved["params"][fqn].detach())) for fqn, _ in named]
    loaded = build(name, fresh)
    loaded.load_state_dict(saved["optimizer"])
    return loaded, fresh


def through_a_folder(name: str, pair: Pair, folder: Path) -> Pair:
    optimizer, named = pair
    checkpoint.save(folder / "a", {"model": container(named), "optimizer": optimizer})
    fresh = [(fqn, nn.Parameter(torch.zeros_like(p))) for fqn, p in named]
    loaded = build(name, fresh)
    checkpoint.load(folder / "a", {"model": container(fresh), "optimizer": loaded})
    return loaded, fresh


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", [copied, pickled, through_a_file, through_a_folder])
def test_resume_is_bit_equal(
    name: str, way: Callable[[str, Pair, Path], Pair], dtype: torch.dtype, tmp_path: Path
) -> None:
    """With settings that are not the constructor's, a rate that is a tensor, and a scheduler, which
    puts a function in the place of `optimizer.step` that no copy may carry.
    """
    named = make_params(EVERY, dtype)
    group = {"params": named, "weight_decay": 0.25}
    optimizer = build(name, named, [group], lr=torch.tensor(0.5), nonfinite="skip")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(optimizer, named, 0, 3)
    twin, twin_named = way(name, (optimizer, named), tmp_path)
    assert same(everything(twin), everything(optimizer))
    assert twin.param_groups[0]["weight_decay"] == 0.25
    train(optimizer, named, 3, 5)
    assert not same(everything(twin), everything(optimizer))  # it has memory of its own
    train(twin, twin_named, 3, 5)
    assert same(everything(twin), everything(optimizer))
    assert str(twin.report()) == str(optimizer.report())


@every_optimizer
def test_loaded_state_shares_no_memory(name: str) -> None:
    named, other = make_params(EVERY), make_params(EVERY)
    optimizer, loaded = build(name, named, lr=torch.tensor(0.5)), build(name, other)
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


@every_optimizer
def test_state_of_another_optimizer_is_refused(name: str) -> None:
    """Each of the others', before anything changes."""
    optimizer = build(name, make_params(EVERY))
    before = everything(optimizer)
    for other in OPTIMIZERS.keys() - {name}:
        named = make_params(EVERY)
        donor = build(other, named)
        train(donor, named, 0, 1)
        with pytest.raises(ValueError, match="state"):
            optimizer.load_state_dict(donor.state_dict())
        assert same(everything(optimizer), before), other


@every_optimizer
def test_named_and_unnamed_state_load_into_each_other(name: str) -> None:
    """By position, where parameters have no names."""
    named, unnamed = make_params(EVERY), make_params(EVERY)
    optimizer = build(name, named)
    train(optimizer, named, 0, 2)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(EVERY)
    plain = optimizer.state_dict()
    for group in plain["param_groups"]:
        del group["param_names"]
    loaded = build(name, unnamed)
    loaded.load_state_dict(plain)
    for a, b in zip(loaded.state.values(), optimizer.state.values(), strict=True):
        assert same(dict(a), dict(b))


def test_every_kind_of_state_has_its_stand_in() -> None:
    """What stands for others in tests/checkpoint stands for itself."""
    for case in OPTIMIZERS.values():
        assert not any(OPTIMIZERS[other].state_as for other in case.state_as)
