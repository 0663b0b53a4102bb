"""Real mup models, with its MuReadout, under MuLO: what `set_base_shapes` leaves on parameters is
there in every layout, in the forward pass too, and a step is that of one process.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pylo_dist
from pylo_dist.adapters.attributes import attributes_of, hand_on
from support.ranks import run_ranks

mup = pytest.importorskip("mup", reason="no mup: launch/setup.sh installs it, alone")

STEPS = 4


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2)
        )
        self.readout = mup.MuReadout(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.readout(x)
        return out


def shaped() -> Net:
    torch.manual_seed(0)
    model = Net(16)
    mup.set_base_shapes(model, Net(4), delta=Net(8))
    return model


def train(model: nn.Module, optimizer: Any, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    for step in range(STEPS):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        model(x[rank::world]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def in_all_layouts(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in (1, 2):
        model = shaped()
        zero = pylo_dist.ZeroOptimizer(model, pylo_dist.MuLO, stage=stage, weights="demo")
        found[f"zero{stage}"] = train(model, zero, rank, world)
    meshes: dict[str, Any] = {
        "fsdp2": None,
        "hsdp": init_device_mesh("cpu", (1, world), mesh_dim_names=("copies", "shards")),
    }
    for name, mesh in meshes.items():
        sharded, optimizer = pylo_dist.shard(shaped(), pylo_dist.MuLO, mesh=mesh, weights="demo")
        assert all(hasattr(p, "infshape") for p in sharded.parameters())
        found[name] = train(sharded, optimizer, rank, world)
    found["refused"] = []
    for name, by_hand in (("by hand", fully_shard), ("tensor parallel", parallel)):
        model = shaped()
        mults = pylo_dist.width_mults(model)
        attributes = attributes_of(model)
        by_hand(model)
        try:
            pylo_dist.MuLO(model.named_parameters(), weights="demo")
        except ValueError as error:
            found["refused"].append(str(error))
        hand_on(model, attributes)  # for the model's own MuReadout, which reads them as well
        optimizer = pylo_dist.MuLO(model.named_parameters(), weights="demo", width_mults=mults)
        own = (rank, world) if name == "by hand" else (0, 1)
        found[name] = train(model, optimizer, *own)
    torch.manual_seed(0)
    model = Net(16)
    parallel(model)  # mup reads the shapes of DTensors, which are those of the whole
    mup.set_base_shapes(model, Net(4), delta=Net(8))
    found["shapes after tensor parallel"] = train(
        model, pylo_dist.MuLO(model.named_parameters(), weights="demo")
    )
    return found


def parallel(model: Net) -> None:
    """Every second matrix by columns and by rows, over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    plan: dict[str, Any] = {"inner": ColwiseParallel(), "blocks.0.0": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    rest = {"blocks.1.0": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, mesh, rest)


def test_mup_models_train_in_every_layout() -> None:
    whole = shaped()
    wanted = train(whole, pylo_dist.MuLO(whole.named_parameters(), weights="demo"))
    for found in run_ranks(2, in_all_layouts):
        by_fsdp, by_tp = found.pop("refused")
        for refused in (by_fsdp, by_tp):
            assert "'inner.weight' has no infshape" in refused
            assert "fully_shard, parallelize_module" in refused
            assert "pylo_dist.width_mults(model)" in refused
        tp = {"tensor parallel", "shapes after tensor parallel"}
        assert set(found) == {"zero1", "zero2", "fsdp2", "hsdp", "by hand"} | tp
        for layout, params in found.items():
            for name, tensor in params.items():
                # gradients of half the samples each are averaged: they differ in their last bits
                torch.testing.assert_close(
                    tensor, wanted[name], rtol=1e-4, atol=1e-6, msg=f"{layout}: {name}"
                )


def test_a_copy_that_lost_the_shapes_is_told_so() -> None:
    copied = copy.deepcopy(shaped())
    with pytest.raises(ValueError, match=r"copy\.deepcopy and load_state_dict\(assign=True\) do"):
        pylo_dist.MuLO(copied.named_parameters(), weights="demo")
    mults = pylo_dist.width_mults(shaped())
    optimizer = pylo_dist.MuLO(copied.named_parameters(), weights="demo", width_mults=mults)
    assert optimizer.param_groups[0]["width_mults"] == mults


def test_attributes_are_handed_on_once_and_private_ones_are_not() -> None:
    model = nn.Linear(2, 2)
    model.weight.kind, model.weight._secret = "matrix", 1  # type: ignore[assignment]
    own = attributes_of(model)
    assert own == {"weight": {"kind": "matrix"}}
    model.weight = nn.Parameter(torch.zeros(2, 2))
    hand_on(model, own)
    assert model.weight.kind == "matrix"
    model.weight = nn.Parameter(torch.zeros(2, 2))
    model(torch.zeros(1, 2))  # as FSDP2 puts another in its place
    assert model.weight.kind == "matrix"
