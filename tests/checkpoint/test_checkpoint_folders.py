"""Checkpoint folders of one process: what is damaged or of something else is refused before
anything changes.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import pylo_dist
from pylo_dist import checkpoint
from pylo_dist.checkpoint import CheckpointError
from pylo_dist.checkpoint import folder as checkpoint_folder
from support.layouts import (
    KINDS,
    MORE,
    PLAIN,
    STEPS,
    Model,
    Run,
    differing,
    flat_state,
    fresh,
    run_differences,
    snapshot,
)
from support.optimizers import small_fc
from support.pickles import Loud


def contents_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": model,
        "optimizer": optimizer,
        "run": {"seen": torch.tensor([3, 4]), "name": "x"},
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VeLO checkpoint of one process, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("saved") / "good"
    run = Run(PLAIN, "VeLO", None)
    run.advance(STEPS)
    checkpoint.save(folder, contents_of(run.model, run.optimizer), meta={"step": STEPS})
    return folder


def refused(folder: Path, run: Run, message: str, **contents: Any) -> None:
    before = copy.deepcopy(snapshot(run))
    contents = {**contents_of(run.model, run.optimizer), **contents}
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder, contents)
    assert not differing(snapshot(run), before)
    assert contents["run"]["seen"].tolist() == [3, 4]


def damaged(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def test_a_folder_loads_and_says_what_it_was(saved: Path) -> None:
    run, other = Run(PLAIN, "VeLO", None), fresh()
    run.advance(STEPS)
    other.taken = STEPS
    template = contents_of(other.model, other.optimizer)
    template["run"] = {"seen": torch.zeros(2, dtype=torch.int64), "name": ""}
    entries, meta = checkpoint.load(saved, template)
    assert entries["run"]["seen"].tolist() == [3, 4]
    assert entries["run"]["name"] == "x"
    assert template["run"]["seen"].tolist() == [0, 0]  # a template is not written
    assert meta == {"step": STEPS} == checkpoint.verify(saved)
    assert checkpoint.published(saved.parent) == [saved]
    assert checkpoint.published(saved.parent / "nowhere") == []
    assert not list(saved.parent.glob(".*"))
    assert not run_differences(run, other, MORE)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_by_name(
    saved: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder, pick = damaged(saved, tmp_path), random.Random(f"{name} {damage}")
    path = folder / name
    data = path.read_bytes()
    for _ in range(5 if damage == "flip" else 1):
        at = pick.randrange(len(data))
        path.write_bytes(
            data[:at]
            if damage == "truncate"
            else data[:at] + bytes([data[at] ^ (1 << pick.randrange(8))]) + data[at + 1 :]
        )
        if damage == "remove":
            path.unlink()
        refused(folder, fresh(), re.escape(name))


def test_nothing_is_unpickled_before_its_checksum_matched(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    folder = damaged(saved, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Loud()) + b"x")
    refused(folder, fresh(), "metadata")
    assert not Loud.read


def other_weights() -> dict[str, Tensor]:
    changed = KINDS["VeLO"].arguments["weights"]
    return {name: t + (1e-6 if name == "step_size.bias" else 0.0) for name, t in changed.items()}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fresh("AdafacLO"), "state_rule 'velo', this optimizer 'small_fc'"),
        (lambda: fresh("AdamW"), "group 0 of 'optimizer' has state_rule 'velo'"),
        (
            lambda: fresh(weights=other_weights()),
            "state_weights .*give the optimizer the weights it was saved with",
        ),
        (
            lambda: wider(),
            r"'model.wide' is torch.float32 of shape \(5, 16\), wanted torch.float32 of \(5, 17\)",
        ),
        (lambda: renamed(), "'wide' in the place of 'conv'"),
        (lambda: shorter(), "groups of \\[8\\] parameters, this optimizer groups of \\[7\\]"),
        (lambda: doubled(), "wanted torch.float64"),
    ],
    ids=["rule", "torch's optimizer", "weights", "shape", "name", "fewer", "dtype"],
)
def test_what_belongs_to_something_else_is_refused(
    saved: Path, build: Callable[[], Run], message: str
) -> None:
    refused(saved, build(), message)


def rebuilt(run: Run) -> Run:
    run.optimizer = KINDS["VeLO"].build(run.model.trainable(), process_group=False)
    return run


def wider() -> Run:
    run = fresh()
    run.model.wide = nn.Parameter(torch.zeros(5, 17))
    return rebuilt(run)


def renamed() -> Run:
    run = fresh()
    run.model.other = run.model.wide
    del run.model.wide
    return rebuilt(run)


def shorter() -> Run:
    run = fresh()
    run.model.wide.requires_grad_(False)
    return rebuilt(run)


def doubled() -> Run:
    run = fresh()
    run.model.double()
    return rebuilt(run)


def test_entries_that_may_be_missing_are_left_out(saved: Path) -> None:
    run = fresh()
    more = {"rng": {"7": torch.zeros(2)}, **contents_of(run.model, run.optimizer)}
    refused(saved, run, r"has no 'rng.7'", rng=more["rng"])
    entries, _ = checkpoint.load(saved, more, optional=("rng",))
    assert entries["rng"] == {}


def test_a_save_that_was_ended_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh()
    contents = {"model": run.model, "optimizer": run.optimizer}

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "_sync", ended)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "a", contents)
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / "a", contents)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    checkpoint.verify(tmp_path / "a")
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save(tmp_path / "a", contents)


def test_a_saved_folder_cannot_be_written_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        checkpoint.save(tmp_path / "file" / "a", {"x": {"n": 1}})
    with pytest.raises((TypeError, ValueError), match=r"JSON|serializable"):
        checkpoint.save(tmp_path / "a", {"x": {"n": 1}}, meta={"step": torch.ones(1)})


def parts(tensor: Tensor) -> Tensor:
    """Rows 0, 1, 3 and 4 of (5, 3) as those of a whole (4, 3); the one between is padding."""
    places = {"global_offsets": ((0, 0), (2, 0)), "local_offsets": ((0, 0), (3, 0))}
    for name, value in {"global_shape": (4, 3), **places, "local_sizes": ((2, 3),) * 2}.items():
        setattr(tensor, name, value)
    return tensor


@pytest.mark.skipif(
    not hasattr(dcp, "CheckpointableTensor"), reason="torch before 2.15 knows no such tensors"
)
def test_tensors_marked_as_parts_are_saved_and_loaded_as_such(tmp_path: Path) -> None:
    whole, rows = torch.arange(12.0).view(4, 3), [0, 1, 3, 4]

    def state(value: float) -> dict[str, Any]:
        layer = nn.Linear(3, 5)
        parts(nn.init.constant_(layer.weight, value))
        layer.register_buffer("mean", parts(torch.full((5, 3), value)))
        return {"model": layer, "run": {"mean": parts(torch.full((5, 3), value))}}

    saved, loaded = state(0.0), state(7.0)
    for tensor in (saved["model"].weight.data, saved["model"].mean, saved["run"]["mean"]):
        tensor[rows] = whole
    checkpoint.save(tmp_path / "parts", saved)
    read, _ = checkpoint.load(tmp_path / "parts", loaded)
    assert read["run"]["mean"].global_shape == (4, 3)
    for tensor in (loaded["model"].weight, loaded["model"].mean, read["run"]["mean"]):
        assert torch.equal(tensor[rows], whole)
    plain = nn.Linear(3, 4)
    plain.bias = nn.Parameter(torch.zeros(5))
    plain.register_buffer("mean", torch.zeros(4, 3))
    checkpoint.load(tmp_path / "parts", {"model": plain})
    assert torch.equal(plain.weight, whole)
    assert torch.equal(plain.mean, whole)


def test_optimizers_of_parts_of_tensors_are_refused(tmp_path: Path) -> None:
    """The attributes say nothing of other ranks, whose parts a learned step would need."""
    layer = nn.Linear(3, 5)
    parts(layer.weight)
    message = r"of shape \(5, 3\).* is a part of a tensor of shape \(4, 3\)"
    with pytest.raises(ValueError, match="'weight' " + message.replace("is a", "that it is a")):
        pylo_dist.AdafacLO(layer.named_parameters(), weights=small_fc())
    with pytest.raises(ValueError, match="'weight' of shape"):
        pylo_dist.ZeroOptimizer(layer, torch.optim.AdamW)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "x", {"optimizer": torch.optim.AdamW(layer.parameters())})
    layer.weight.global_shape = (5, 3)  # all of it
    pylo_dist.AdafacLO(layer.named_parameters(), weights=small_fc())


def test_schedulers_may_be_part_of_it(tmp_path: Path) -> None:
    """A scheduler adds `initial_lr` to the groups; a tensor as rate is loaded where there was a
    number.
    """
    run, other = fresh("AdafacLO", lr=torch.tensor(0.5)), fresh("AdafacLO")
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    run.advance(2)
    scheduler.step()
    checkpoint.save(
        tmp_path / "a", {"model": run.model, "optimizer": run.optimizer, "scheduler": scheduler}
    )
    other.taken = 2
    late = torch.optim.lr_scheduler.StepLR(other.optimizer, 1, 0.1)
    checkpoint.load(
        tmp_path / "a", {"model": other.model, "optimizer": other.optimizer, "scheduler": late}
    )
    assert isinstance(other.optimizer.param_groups[0]["lr"], Tensor)
    assert late.gamma == 0.5
    assert not run_differences(run, other, MORE)


def test_mulo_and_frozen_parameters_in_a_folder(tmp_path: Path) -> None:
    """Nested settings, and state of a parameter that was frozen before the optimizer was built
    again.
    """
    run, other = Model(), Model(1)
    mults = {"wide": 4.0, "square": 2.0}
    optimizers = [
        pylo_dist.MuLO(run.trainable(), weights=small_fc(), width_mults=mults, process_group=False)
    ]
    for _, p in run.trainable():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    checkpoint.save(tmp_path / "a", {"model": run, "optimizer": optimizers[0]})
    named = other.trainable()
    other.wide.requires_grad_(False)
    optimizers.append(
        pylo_dist.MuLO(named, weights=small_fc(), width_mults=mults, process_group=False)
    )
    checkpoint.load(tmp_path / "a", {"model": other, "optimizer": optimizers[1]})
    assert not differing(*(flat_state(pylo_dist.full_state_dict(o)) for o in optimizers))
    assert optimizers[1].state[other.wide]


def test_torch_optimizers_under_zero_match_parameters_by_name(tmp_path: Path) -> None:
    """A frozen parameter may be on one side alone; one in the place of another is refused."""

    def zero(model: nn.Module, **given: Any) -> Any:
        return pylo_dist.ZeroOptimizer(given.get("named", model), torch.optim.AdamW, lr=0.01)

    def step(model: Model, optimizer: Any, value: float) -> None:
        for _, p in model.trainable():
            p.grad = torch.full_like(p, value)
        optimizer.step()
        optimizer.zero_grad()

    run, other, swapped = Model(), Model(1), Model(1)
    for model in (run, other, swapped):
        model.wide.requires_grad_(False)
    whole = torch.optim.AdamW(run.named_parameters(), lr=0.01)  # with the frozen ones
    step(run, whole, 0.5)
    checkpoint.save(tmp_path / "a", {"model": run, "optimizer": whole})
    optimizer = zero(other)  # without
    checkpoint.load(tmp_path / "a", {"model": other, "optimizer": optimizer})
    for model, own in ((run, whole), (other, optimizer)):
        step(model, own, 0.25)
    wanted = dict(run.named_parameters())
    assert all(torch.equal(p, wanted[fqn]) for fqn, p in other.named_parameters())
    checkpoint.save(tmp_path / "b", {"model": other, "optimizer": optimizer})
    names = {"row": "bias", "bias": "row"}  # in each other's place
    named = [(names.get(fqn, fqn), p) for fqn, p in swapped.trainable()]
    late = zero(swapped, named=named)
    with pytest.raises(ValueError, match="'row' in the place of 'bias'"):
        late.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="'row' in the place of 'bias'"):
        checkpoint.load(tmp_path / "b", {"model": swapped, "optimizer": late})
