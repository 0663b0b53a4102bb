"""Layouts of a run (`--parallel`): which ranks read other data, and how model and optimizer lie on
the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from model import GPT, Block, build
from options import Options, WrongInput
from torch import Tensor, nn

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], Any]


def tensor_ranks(options: Options, world_size: int) -> int:
    """How many ranks share each matrix product, and so the same data."""
    return (options.tp or world_size) if options.parallel == "tp" else 1


def data_ranks(options: Options, world_size: int) -> int:
    """How many ranks, or groups of ranks, read data of their own. Raises WrongInput for a mesh that
    does not fit.
    """
    if options.parallel == "hsdp" and world_size % copies(options, world_size):
        raise WrongInput(
            f"--replicas {options.replicas} does not divide {world_size} ranks; choose a divisor."
        )
    ranks = tensor_ranks(options, world_size)
    if world_size % ranks:
        raise WrongInput(f"--tp {ranks} does not divide {world_size} ranks; choose a divisor.")
    if options.config().n_head % ranks:
        raise WrongInput(
            f"--tp {ranks} does not divide the {options.config().n_head} heads; choose a divisor, "
            "or --n-head."
        )
    return world_size // ranks


def data_rank(options: Options, rank: int, world_size: int) -> int:
    """Which of them a rank belongs to."""
    return rank // tensor_ranks(options, world_size)


def copies(options: Options, world_size: int) -> int:
    """Of hsdp: how many copies of the model there are."""
    return options.replicas or (2 if world_size > 1 else 1)


def spread(
    model: GPT,
    optimizer_class: Any,
    arguments: dict[str, Any],
    grouped: Any,
    options: Options,
    device: torch.device,
    world: int,
) -> tuple[nn.Module, Any]:
    """Lay `model` (modified in place) and a new optimizer on the ranks: what is called in its
    place, and the optimizer.

    Args:
        grouped: makes what the optimizer takes of named parameters.

    Raises:
        WrongInput: what the optimizer refuses, alike on all ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    import pylo_dist

    def make(named: Iterable[tuple[str, nn.Parameter]]) -> Any:
        return optimizer_class(grouped(list(named)), **arguments)

    kind, on = options.parallel, device.type
    try:
        if kind in ("zero1", "zero2"):
            parameters = grouped(list(model.named_parameters()))
            # of a module, parameters arrive during forward
            whole = parameters if isinstance(parameters[0], dict) else model
            return model, pylo_dist.ZeroOptimizer(
                whole, optimizer_class, stage=int(kind[-1]), **arguments
            )
        if kind == "ddp":
            called = nn.parallel.DistributedDataParallel(
                model, device_ids=[device] if on == "cuda" else None
            )
            return called, make(model.named_parameters())
        if kind == "fsdp2":
            return pylo_dist.shard(model, make, mesh=init_device_mesh(on, (world,)), wrap=Block)
        if kind == "hsdp":
            sizes = (copies(options, world), world // copies(options, world))
            mesh = init_device_mesh(on, sizes, mesh_dim_names=("copies", "shards"))
            return pylo_dist.shard(model, make, mesh=mesh, wrap=Block)
        ranks = tensor_ranks(options, world)
        mesh = init_device_mesh(on, (world // ranks, ranks), mesh_dim_names=("data", "tensor"))
        cut_matrices(model, mesh["tensor"], ranks)
        if world == ranks:
            return model, make(model.named_parameters())
        return pylo_dist.shard(model, make, mesh=mesh["data"], wrap=Block)
    except ValueError as error:
        raise WrongInput(" ".join(str(error).split())) from None


def accumulation(called: nn.Module, optimizer: Any) -> Callable[[], AbstractContextManager[Any]]:
    """What a forward and backward pass run in whose gradients stay on their rank, as another
    micro-batch follows.

    FSDP2 then holds whole gradients, as ZeRO-1 does. ZeRO-2 sends those of each micro-batch, to
    free them.
    """
    if isinstance(called, nn.parallel.DistributedDataParallel):
        return called.no_sync
    if getattr(optimizer, "stage", None) == 1:
        no_sync: Callable[[], AbstractContextManager[Any]] = optimizer.no_sync
        return no_sync
    if not hasattr(called, "set_requires_gradient_sync"):
        return nullcontext

    @contextmanager
    def kept() -> Iterator[None]:
        called.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            called.set_requires_gradient_sync(True)

    return kept


def cut_matrices(model: GPT, mesh: Any, ranks: int) -> None:
    """Tensor parallelism over whole heads and over the MLPs (`model` is modified in place)."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for block in model.blocks:
        plan: dict[str, Any] = {"mlp.fc": ColwiseParallel(), "mlp.proj": RowwiseParallel()}
        if not block.attention.fused:  # a fused matrix would be cut across queries, keys and values
            plan |= {f"attention.{name}": ColwiseParallel() for name in ("q", "k", "v")}
            plan["attention.proj"] = RowwiseParallel()
            block.attention.n_head //= ranks  # of those, this rank has its share
        parallelize_module(block, mesh, plan)


@torch.no_grad()
def whole_model(model: GPT, options: Options, device: torch.device) -> GPT:
    """The model itself, or a copy in one piece where it is sharded; then all ranks call it."""
    state: dict[str, Tensor] = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return model
    copy = build(options.config(), options.seed)
    copy.load_state_dict(
        {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}
    )
    return copy.to(device)
