"""DTensor layouts on real gloo processes equal one process: FSDP2, HSDP, tensor parallel, their
products, and DDP.

Background: support/sharded_model.py makes gradients exact in any order of summation, so that what
is compared is the arithmetic of the step alone. Sums go over all ranks that hold a copy, so that
copies must agree to the bit.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from pylo_dist.layouts.dtensor import _shard_at
from pylo_dist.testing import largest_changes, layout_error
from support.collectives import Collectives
from support.dtensors import build, local
from support.ranks import run_ranks
from support.sharded_model import (
    STEPS,
    Gradients,
    Net,
    backward,
    loss_of,
    mean_gradients,
    rules,
    set_gradients,
    snapshot,
    trainable,
    unsharded,
    whole,
)


def layouts(world: int) -> list[str]:
    """Shard(k) on 2 and 3 ranks, the meshes of two axes on 4."""
    return ["fsdp2", "tp", "ddp", *(["hsdp", "tp_fsdp2"] if world == 4 else ["shard_k"])]


class Fake:
    """A DTensor's layout, without its mesh's processes."""

    def __init__(
        self, shape: tuple[int, ...], sizes: tuple[int, ...], placements: list[Any]
    ) -> None:
        self.shape, self.placements, self.device_mesh, self.sizes = shape, placements, self, sizes

    def size(self, axis: int) -> int:
        return self.sizes[axis]


def test_geometry_of_three_axes() -> None:
    """HSDP over FSDP2 over TP needs eight ranks; where their elements lie does not."""
    whole = torch.arange(11 * 6).view(11, 6)
    for tp_dim, placements in (
        (0, [Replicate(), _StridedShard(0, split_factor=3), Shard(0)]),
        (1, [Replicate(), Shard(0), Shard(1)]),
    ):
        for dp, tp in itertools.product(range(2), range(3)):
            # TP first, in chunks of ceil(11 / 3)
            column = whole.tensor_split(3, 1)[tp] if tp_dim == 1 else whole.split(4)[tp]
            rows = column.split(-(-len(column) // 2))
            wanted = rows[dp].flatten() if dp < len(rows) else whole.new_empty(0)
            for copy in range(2):
                shard = _shard_at("w", Fake((11, 6), (2, 2, 3), placements), (copy, dp, tp))
                assert torch.equal(shard.indices(), wanted), (placements, dp, tp)
    for placements in (
        [Shard(1), Shard(2)],
        [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)],
    ):
        with pytest.raises(ValueError, match=r"'w'.*(cut on dimensions \[1, 2\]|cut in strides)"):
            _shard_at("w", Fake((4, 4, 4), (2, 2), placements), (0, 0))


def train(layout: str, world: int, names: list[str]) -> dict[str, Any]:
    """Every rule from the same start, on the gradients of the same real backward passes."""
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
    optimizer_class, kwargs = rules()[name]
    optimizer = optimizer_class(trainable(model), **kwargs)
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
    return {
        "ranks": ranks,
        "params": snapshot(model),
        "local": {fqn: local(p).clone() for fqn, p in model.named_parameters()},
        "where": {fqn: where(optimizer, p) for fqn, p in trainable(model)},
        "state": state,
        "calls": calls.counts,
        "norm": float(optimizer.grad_norm),
        "report": str(optimizer.report()),
        "run": {
            k: v.clone() for k, v in optimizer.param_groups[0].items() if k.startswith("loss_")
        },
    }


def where(optimizer: Any, param: Tensor) -> tuple[int, ...]:
    shard = optimizer._bindings[param].shard
    return shard.start, shard.numel, shard.run, shard.pitch


def exact_ranks(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for layout in layouts(world):
        results |= train(layout, world, names)
    return results


@pytest.mark.parametrize("world", [2, 3, 4])
def test_layouts_equal_one_process(world: int, figures: list[str]) -> None:
    results = run_ranks(world, exact_ranks, list(rules()))
    wanted: dict[tuple[str, int], Any] = {}
    gradients: dict[int, Gradients] = {}
    for key in results[0]:
        layout, name = key.split("/")
        ranks = results[0][key]["ranks"]
        if (name, ranks) not in wanted:
            optimizer_class, kwargs = rules()[name]
            gradients[ranks] = gradients.get(ranks) or mean_gradients(ranks)
            wanted[name, ranks] = unsharded(ranks, gradients[ranks], optimizer_class, **kwargs)
        history, reference, model = wanted[name, ranks]
        mine = [result[key] for result in results]
        for fqn, tensor in mine[0]["params"].items():
            assert all(torch.equal(tensor, other["params"][fqn]) for other in mine), (key, fqn)
        held: dict[Any, Tensor] = {}  # ranks that hold the same elements hold the same bits
        for other in mine:
            for fqn, place in other["where"].items():
                assert torch.equal(
                    held.setdefault((fqn, place), other["local"][fqn]), other["local"][fqn]
                ), (key, fqn)
        # Newton-Schulz amplifies the last bits of what it is given
        errors = layout_error(
            mine[0]["params"],
            history[-1],
            largest_changes(history),
            5e-5 if "celo2" in name else None,
        )
        assert max(errors.values()) <= 1.0, (key, errors)
        assert torch.equal(mine[0]["params"]["own.unused"], history[0]["own.unused"])
        assert torch.equal(
            mine[0]["params"]["blocks.0.odd.unused"], history[0]["blocks.0.odd.unused"]
        )
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
        for other in mine:
            assert other["norm"] == pytest.approx(float(reference.grad_norm), rel=1e-9)
            for field, tensor in (
                (k, v) for k, v in reference.param_groups[0].items() if k.startswith("loss_")
            ):
                torch.testing.assert_close(other["run"][field], tensor, rtol=1e-12, atol=0)
        calls = ", ".join(f"{count} {kind}" for kind, count in sorted(mine[0]["calls"].items()))
        figures.append(
            f"layouts | {layout} on {world} | {name}: {max(errors.values()):.2g} of the layout "
            f"tolerance, state {worst_state:.2g}; collectives per step: {calls or 'none'}"
        )
