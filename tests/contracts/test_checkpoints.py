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
import torch.distributed.checkpoint as dcp
from torch import nn

from pylo_dist import checkpoint
from support.optimizer_cases import EVERY, Named, build, everything, make_params, same, train
from support.optimizers import OPTIMIZERS, VARIANTS

# rates are large here, so that settings show
pytestmark = pytest.mark.filterwarnings("ignore:weight_decay=")
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
HALVED = [name for name, case in VARIANTS.items() if case.halved]
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
    goes_on(name, way, tmp_path, dtype)


@pytest.mark.parametrize("name", HALVED)
@pytest.mark.parametrize("way", [copied, pickled, through_a_file, through_a_folder])
def test_halved_state_resumes_bit_equal(
    name: str, way: Callable[[str, Pair, Path], Pair], tmp_path: Path
) -> None:
    """The seed goes along: it is that of the state, and not the constructor's."""
    twin = goes_on(name, way, tmp_path, state_seed=2**40 + 3)
    assert twin.param_groups[0]["state_seed"] == 2**40 + 3


def goes_on(
    name: str,
    way: Callable[[str, Pair, Path], Pair],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """A run and what came this way of it take the same steps; the latter."""
    named = make_params(EVERY, dtype)
    group = {"params": named, "weight_decay": 0.25, **settings}
    optimizer = build(name, named, [group], lr=torch.tensor(0.5), nonfinite="skip")
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    train(optimizer, named, 0, 3)
    twin, twin_named = way(name, (optimizer, named), folder)
    assert same(everything(twin), everything(optimizer))
    assert twin.param_groups[0]["weight_decay"] == 0.25
    train(optimizer, named, 3, 5)
    assert not same(everything(twin), everything(optimizer))  # it has memory of its own
    train(twin, twin_named, 3, 5)
    assert same(everything(twin), everything(optimizer))
    assert str(twin.report()) == str(optimizer.report())
    return twin


@pytest.mark.parametrize("name", HALVED)
@pytest.mark.parametrize("way", [through_a_file, through_a_folder])
def test_state_loads_into_any_dtype(
    name: str,
    way: Callable[[str, Pair, Path], Pair],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """float32 is rounded to nearest, bfloat16 is as it was; both say so in one line, and go on as
    what they are now.
    """
    whole, named = name.removesuffix("_halved"), make_params(EVERY)
    optimizer = build(whole, named)
    train(optimizer, named, 0, 3)
    halved, halved_named = way(name, (optimizer, named), tmp_path / "wide")
    widened, widened_named = way(whole, (halved, halved_named), tmp_path / "half")
    said = [record.getMessage() for record in caplog.records if "was saved in" in record.message]
    assert [" ".join(line.split()[:10]) for line in said] == [
        "state was saved in torch.float32 and is kept in torch.bfloat16,",
        "state was saved in torch.bfloat16 and is kept in torch.float32,",
    ]
    for before, half, wide in zip(
        *(o.state.values() for o in (optimizer, halved, widened)), strict=True
    ):
        rounded = [key for key, tensor in half.items() if tensor.dtype == torch.bfloat16]
        assert rounded
        for key, tensor in before.items():
            kept = tensor.to(torch.bfloat16) if key in rounded else tensor
            assert torch.equal(half[key], kept), key
            assert torch.equal(wide[key], kept.float()), key
    assert [o.param_groups[0].get("state_seed") for o in (halved, widened)] == [7, None]
    for taken, its in ((halved, halved_named), (widened, widened_named)):
        train(taken, its, 3, 4)
        assert int(taken.param_groups[0]["step"]) == 4


def test_float32_state_that_torch_reads_itself_has_no_seed_to_ask_for(tmp_path: Path) -> None:
    """docs/checkpoints.md has the way around; everything else goes on being asked for."""
    named = make_params(EVERY)
    optimizer, halved = build("AdafacLO", named), build("AdafacLO_halved", make_params(EVERY))
    train(optimizer, named, 0, 3)

    def save(saved: Any, folder: str) -> None:
        contents = {"optimizer": saved.state_dict()}
        dcp.save(contents, checkpoint_id=tmp_path / folder, no_dist=True)

    def read(state: dict[str, Any], folder: str) -> None:
        dcp.load({"optimizer": state}, checkpoint_id=tmp_path / folder, no_dist=True)

    save(optimizer, "wide")
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key .*0\.state_seed"):
        read(halved.state_dict(), "wide")
    state = halved.state_dict()
    for group in state["param_groups"]:
        group.pop("state_seed")
    read(state, "wide")
    halved.load_state_dict(state)
    assert halved.param_groups[0]["state_seed"] == 7
    assert int(halved.param_groups[0]["step"]) == 3
    for before, half in zip(optimizer.state.values(), halved.state.values(), strict=True):
        assert {key: t.to(half[key].dtype).tolist() for key, t in before.items()} == {
            key: t.tolist() for key, t in half.items()
        }
    save(halved, "half")
    state = optimizer.state_dict()  # the other way round as it is
    read(state, "half")
    optimizer.load_state_dict(state)
    assert "state_seed" not in optimizer.param_groups[0]


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
