"""sharded_model.py's model in every DTensor layout, and under DDP."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from support.sharded_model import Net


def fully_sharded(model: Net, mesh: Any, **kwargs: Any) -> None:
    ignored = model.ignored()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=ignored, **kwargs)
    fully_shard(model, mesh=mesh, ignored_params=ignored, **kwargs)


def tensor_parallel(model: Net, mesh: Any) -> None:
    for block in model.blocks:
        plan = {
            "up": ColwiseParallel(output_layouts=Replicate()),
            "down": RowwiseParallel(input_layouts=Replicate()),
            "sequence": SequenceParallel(),
        }
        parallelize_module(block, mesh, plan)
        block.part = mesh.get_local_rank(), mesh.size()


def by_last_even_dim(param: nn.Parameter) -> Shard:
    """fully_shard cuts inner dimensions only where that is even."""
    ranks = dist.get_world_size()
    return Shard(
        max((dim for dim in range(1, param.dim()) if param.shape[dim] % ranks == 0), default=0)
    )


def build(layout: str, world: int) -> tuple[Net, nn.Module, int, int]:
    """The sharded model, what is called, and this rank's place among the data-parallel ranks, and
    their number.
    """
    model, rank = Net(), dist.get_rank()
    if layout == "ddp":
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        return model, ddp, rank, world
    if layout == "fsdp2":
        fully_sharded(model, init_device_mesh("cpu", (world,)))
    elif layout == "shard_k":
        fully_sharded(model, init_device_mesh("cpu", (world,)), shard_placement_fn=by_last_even_dim)
    elif layout == "hsdp":
        fully_sharded(
            model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        )
    elif layout == "tp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        tensor_parallel(model, mesh)
        return model, model, 0, 1
    elif layout == "tp_fsdp2":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(model, mesh["tp"])
        fully_sharded(model, mesh["dp"])
        return model, model, mesh["dp"].get_local_rank(), 2
    return model, model, rank, world


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
