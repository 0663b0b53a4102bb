"""Every optimizer on real gloo processes equals one process: ZeRO, FSDP2, HSDP, tensor parallel,
their products, and DDP.

Background: support/sharded_model.py makes gradients exact in any order of summation, so that what
is compared is the arithmetic of the step alone. Sums go over all ranks that hold a copy, so that
copies must agree to the bit. One start of the ranks serves all optimizers.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import pylo_dist
from pylo_dist import checkpoint
from pylo_dist.testing import largest_changes, layout_error
from support.collectives import Collectives
from support.dtensors import build, local
from support.ranks import run_ranks
from support.sharded_model import (
    SETTINGS,
    STEPS,
    Gradients,
    Net,
    backward,
    loss_of,
    mean_gradients,
    set_gradients,
    snapshot,
    trainable,
    unsharded,
    whole,
)


def layouts(world: int) -> dict[str, list[str]]:
    """What runs in which layout: ZeRO and Shard(k) on 2 ranks, Shard(k) on 3, the meshes of two
    axes on 4; a rule of a test's own in each of them on the fewest ranks.
    """
    more = {2: ["shard_k", "zero1", "zero2"], 3: ["shard_k"], 4: ["hsdp", "tp_fsdp2"]}
    built_in = [name for name, case in SETTINGS.items() if case.built_in]
    first = {2: ["fsdp2", "tp", "ddp", *more[2]], 3: [], 4: more[4]}[world]
    every = ["fsdp2", "tp", "ddp", *more[world]]
    return {layout: list(SETTINGS) if layout in first else built_in for layout in every}


RUN = ("loss_", "lstm_")  # entries of a group that belong to the run

# test_checkpoint leaves them to others of the same kinds of state
RESUMED = [name for name, case in SETTINGS.items() if case.state_as or case.halved]


def train(layout: str, world: int, names: list[str]) -> dict[str, Any]:
    """Every optimizer from the same start, on the gradients of the same real backward passes."""
    model, called, rank, ranks = build(layout, world)
    initial = {fqn: local(p).clone() for fqn, p in model.named_parameters()}
    gradients = backward(model, called, rank)
    results = {}
    for name in names:
        for fqn, p in model.named_parameters():
            local(p).copy_(initial[fqn])
        results[f"{layout}/{name}"] = steps(model, name, gradients, rank, ranks)
    return results


def steps(model: Net, name: str, gradients: Gradients, rank: int, ranks: int) -> dict[str, Any]:
    optimizer = SETTINGS[name].build(trainable(model))
    calls = Collectives()
    for step, mine in enumerate(gradients):
        set_gradients(model, mine)
        with calls if step == STEPS - 1 else nullcontext():
            optimizer.step(torch.tensor(loss_of(step, rank)))
    state: dict[str, dict[str, Tensor]] = {}
    for fqn, p in trainable(model):
        state[fqn] = {}
        for key, tensor in optimizer.state[p].items():
            field = optimizer.state_fields(p)[key]
            assert isinstance(tensor, DTensor) == (
                isinstance(p, DTensor) and field.replicated is None
            ), (fqn, key)
            assert tuple(tensor.shape) == field.canonical_shape(tuple(p.shape)), (fqn, key)
            state[fqn][key] = whole(tensor)
    where = {fqn: place(optimizer, p) for fqn, p in trainable(model)}
    return {**outcome(model, optimizer, calls), "state": state, "ranks": ranks, "where": where}


def outcome(model: nn.Module, optimizer: Any, calls: Collectives) -> dict[str, Any]:
    """What every layout is compared by, and this rank's own elements."""
    return {
        "params": snapshot(model),
        "local": {fqn: local(p).clone() for fqn, p in model.named_parameters()},
        "calls": calls.counts,
        "norm": float(optimizer.grad_norm),
        "run": {k: v.clone() for k, v in optimizer.param_groups[0].items() if k.startswith(RUN)},
    }


def place(optimizer: Any, param: Tensor) -> tuple[int, ...]:
    shard = next(binding for binding, p in optimizer.layouts() if p is param).shard
    return shard.start, shard.numel, shard.run, shard.pitch


def zero(
    stage: int, name: str, gradients: Gradients, rank: int, world: int, folder: str
) -> dict[str, Any]:
    """The same under ZeroOptimizer: in stage 2 its own hooks see the backward passes."""
    case, model = SETTINGS[name], Net(seed=rank)  # rank 0's numbers are sent to all
    optimizer = pylo_dist.ZeroOptimizer(
        model, case.face, stage=stage, bucket_cap_mb=0.002, **case.arguments
    )
    calls = Collectives()
    for step, mine in enumerate(gradients):
        if stage == 2:
            model(step, rank).backward()
        else:
            set_gradients(model, mine)
        with calls if step == STEPS - 1 else nullcontext():
            optimizer.step(torch.tensor(loss_of(step, rank)))
        optimizer.zero_grad()
    full = pylo_dist.full_state_dict(optimizer, rank0_only=False)
    names = [fqn for group in full["param_groups"] for fqn in group["param_names"]]
    places = [i for group in full["param_groups"] for i in group["params"]]
    state = {fqn: full["state"].get(i, {}) for fqn, i in zip(names, places, strict=True)}
    where = {fqn: (rank,) for fqn, _ in trainable(model)}
    found = {**outcome(model, optimizer, calls), "state": state, "ranks": world, "where": where}
    if stage == 2 and name in RESUMED:
        checkpoint.save(f"{folder}/{name}", {"model": model, "optimizer": optimizer})
    return found


def resumed(name: str, rank: int, world: int, folder: str) -> dict[str, Tensor]:
    """What ZeRO-2 saved, gone on for a step under FSDP2, on the first gradients again."""
    model, called, _, _ = build("fsdp2", world)
    case = SETTINGS[name]
    optimizer = case.build(trainable(model))
    checkpoint.load(f"{folder}/{name}", {"model": model, "optimizer": optimizer})
    if case.halved:  # and in float32 it is the same
        wide = case.build(trainable(model), state_dtype="float32")
        checkpoint.load(f"{folder}/{name}", {"model": model, "optimizer": wide})
        for mine, its in zip(optimizer.state.values(), wide.state.values(), strict=True):
            assert {local(t).dtype for t in its.values()} == {torch.float32}
            assert all(torch.equal(local(t).float(), local(its[key])) for key, t in mine.items())
    called(0, rank).backward()
    optimizer.step(torch.tensor(loss_of(0, rank)))
    return snapshot(model)


def exact_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for layout, names in layouts(world).items():
        if layout.startswith("zero"):
            stage, model = int(layout[-1]), Net()
            mine = backward(model, model, rank)
            for name in names:
                results[f"{layout}/{name}"] = zero(stage, name, mine, rank, world, folder)
        else:
            results |= train(layout, world, names)
    for name in RESUMED if "zero2" in layouts(world) else ():
        results[f"zero2/{name}"]["resumed"] = resumed(name, rank, world, folder)
    return results


@pytest.mark.parametrize("world", [2, 3, 4])
def test_layouts_equal_one_process(world: int, tmp_path: Path, figures: list[str]) -> None:
    results = run_ranks(world, exact_ranks, str(tmp_path))
    wanted: dict[tuple[str, int], Any] = {}
    gradients: dict[int, Gradients] = {}
    for key in results[0]:
        layout, name = key.split("/")
        case, ranks = SETTINGS[name], results[0][key]["ranks"]
        if (name, ranks) not in wanted:
            gradients[ranks] = gradients.get(ranks) or mean_gradients(ranks)
            wanted[name, ranks] = unsharded(ranks, gradients[ranks], case.face, **case.arguments)
        history, reference, model = wanted[name, ranks]
        mine = [result[key] for result in results]
        for fqn, tensor in mine[0]["params"].items():
            assert all(torch.equal(tensor, other["params"][fqn]) for other in mine), (key, fqn)
        held: dict[Any, Tensor] = {}  # ranks that hold the same elements hold the same bits
        for other in mine:
            for fqn, there in other["where"].items():
                assert torch.equal(
                    held.setdefault((fqn, there), other["local"][fqn]), other["local"][fqn]
                ), (key, fqn)
        share, change = case.share(torch.float32), largest_changes(history)
        errors = layout_error(mine[0]["params"], history[-1], change, share)
        assert max(errors.values()) <= 1.0, (key, errors)
        for fqn in ("own.unused", "blocks.0.odd.unused"):
            assert torch.equal(mine[0]["params"][fqn], history[0][fqn])
        assert not torch.equal(mine[0]["params"]["own.sometimes"], history[0]["own.sometimes"])
        worst_state = 0.0
        for fqn, param in trainable(model):
            for field, tensor in reference.state[param].items():
                copies = [other["state"][fqn][field] for other in mine]
                assert all(torch.equal(copy, copies[0]) for copy in copies), (key, fqn, field)
                error = layout_error(
                    {fqn: copies[0]}, {fqn: tensor}, {fqn: tensor.abs().max()}
                ).get(fqn, 0.0)
                worst_state = max(worst_state, error)
                assert error <= 1.0, (key, fqn, field, error)
                assert tensor.dtype == torch.float32 or torch.equal(copies[0], tensor), (key, fqn)
        for other in mine:
            assert other["norm"] == pytest.approx(float(reference.grad_norm), rel=1e-9)
            for field, tensor in (
                (k, v) for k, v in reference.param_groups[0].items() if k.startswith(RUN)
            ):
                torch.testing.assert_close(other["run"][field], tensor, rtol=1e-12, atol=0)
        calls = ", ".join(f"{count} {kind}" for kind, count in sorted(mine[0]["calls"].items()))
        figures.append(
            f"layouts | {layout} on {world} | {name}: {max(errors.values()):.2g} of the layout "
            f"tolerance, state {worst_state:.2g}; collectives per step: {calls or 'none'}"
        )
    for key in (key for key in results[0] if "resumed" in results[0][key]):
        name = key.split("/")[1]
        history, reference, model = wanted[name, world]
        set_gradients(model, gradients[world][0])
        reference.step(torch.tensor(sum(loss_of(0, rank) for rank in range(world)) / world))
        share, change = SETTINGS[name].share(torch.float32), largest_changes(history)
        for result in results:
            errors = layout_error(result[key]["resumed"], snapshot(model), change, share)
            assert max(errors.values()) <= 1.0, (key, errors)
        assert int(reference.param_groups[0]["step"]) == STEPS + 1
