"""DTensor parameters (FSDP2, HSDP, tensor parallel and what they combine to): where their local
elements lie. Reads parameters, placements and meshes.

Legend: `axis` a mesh axis, `dim` a tensor dimension, N local elements; the *domain* of an optimizer
is the largest set of ranks that any of its parameters is spread over. A parameter on fewer ranks (a
norm beside tensor-parallel matrices lives on the data-parallel ranks of its own column) has a copy
on each other column: its sums go over the whole domain, so that all copies stay the same to the
bit.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..core.cuts import GridCuts
from ..core.pieces import ShardBinding
from ..core.shards import TensorShard
from . import plain
from .objects import living
from .plain import is_dtensor

# Names of a mesh axis along which every rank computes the same but for its part of each product.
TENSOR_PARALLEL = ("tp", "tensor", "tensor_parallel")
# Names of one along which every rank has other experts.
EXPERTS = re.compile(r"(^|_)(e?ep|experts?|edp|etp|efsdp)($|_)", re.IGNORECASE)


def describe(named: Sequence[tuple[str, Any]], settings: Sequence[str] = ()) -> list[ShardBinding]:
    """Where the elements of each parameter of an optimizer lie; some of them are DTensors.

    Collective over their domain: its ranks compare what they have, and make the process groups that
    are missing.

    Args:
        settings: what else must be the same on all ranks.

    Raises:
        ValueError: a layout that cannot be served, or ranks that disagree; on all ranks of the
            domain, by name.
    """
    sharded = [(fqn, param) for fqn, param in named if is_dtensor(param)]
    domain = domain_of(sharded)
    if len(domain) == 1:
        return [
            ShardBinding(TensorShard.whole(fqn, tuple(param.shape)), None) for fqn, param in named
        ]
    mesh = max((param.device_mesh for _, param in sharded), key=lambda mesh: mesh.size())
    holders = _group_of(domain, [mesh])

    def entries() -> list[Any]:
        check_domain(sharded)
        for fqn, param in named:
            _check_layout(fqn, param, holders)
        return [*settings, *(_spec(fqn, param) for fqn, param in named)]

    comm.agree("setting or parameter", entries, holders, torch.device(mesh.device_type))
    alike = all(_is_tensor_parallel(param.device_mesh) for _, param in sharded)
    bindings = [
        _bind(fqn, param, holders, len(domain), unreduced=not alike) for fqn, param in named
    ]
    _check_copies(bindings, [param for _, param in named], holders)
    return bindings


def domain_of(sharded: Sequence[tuple[str, Any]]) -> tuple[int, ...]:
    """The ranks of all meshes together."""
    return tuple(
        sorted({rank for _, param in sharded for rank in param.device_mesh.mesh.flatten().tolist()})
    )


def check_domain(sharded: Sequence[tuple[str, Any]]) -> None:
    """Raise ValueError unless the largest mesh holds the ranks of all others."""
    if not sharded:
        return
    ranks = {fqn: frozenset(param.device_mesh.mesh.flatten().tolist()) for fqn, param in sharded}
    largest = max(ranks, key=lambda fqn: len(ranks[fqn]))
    for fqn, own in ranks.items():
        if not own <= ranks[largest]:
            raise ValueError(
                f"{fqn!r} lies on the ranks {sorted(own)}, {largest!r} on "
                f"{sorted(ranks[largest])}: neither holds the other; shard the whole model over "
                "one mesh (fully_shard on all of it), or give each part an optimizer of its own"
            )


def _check_layout(fqn: str, param: Any, holders: Any) -> None:
    """Raise ValueError for a DTensor whose layout cannot be expressed."""
    if not is_dtensor(param):
        return
    mesh = param.device_mesh
    experts = [name for name in mesh.mesh_dim_names or () if EXPERTS.search(name)]
    if experts:
        raise ValueError(
            f"{fqn!r} lies on the mesh dimension {experts[0]!r}, which looks like expert "
            "parallelism: that is not supported; give expert parameters an optimizer of their "
            "own, such as torch.optim.AdamW"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"{fqn!r} lies on a mesh without this rank; build its optimizer on the ranks of its "
            "mesh only"
        )
    if not comm.can_reduce(holders, param.device):
        raise ValueError(
            f"{fqn!r} is offloaded to {param.device}, where its process group cannot reduce; call "
            f'init_process_group("cpu:gloo,{mesh.device_type}:nccl"), or leave CPUOffloadPolicy out'
        )
    local, shard = plain.local_tensor(param), _shard_at(fqn, param, mesh.get_coordinate())
    if local.numel() != shard.numel:
        raise ValueError(
            f"{fqn!r} with placements {tuple(param.placements)} holds {tuple(local.shape)} "
            f"elements here, wanted {shard.numel}; only the even-by-chunks layouts of fully_shard "
            "and parallelize_module are supported"
        )


def _spec(fqn: str, param: Any) -> list[object]:
    """What must be the same on all ranks of the domain."""
    spec: list[object] = [fqn, list(param.shape), str(param.dtype), bool(param.requires_grad)]
    if is_dtensor(param):
        mesh = param.device_mesh
        spec += [
            list(mesh.shape),
            list(mesh.mesh_dim_names or ()),
            list(map(str, param.placements)),
        ]
    return spec


def _is_tensor_parallel(mesh: Any) -> bool:
    """Whether all ranks of the mesh see the same data, so that they have the same gradients of what
    is whole.
    """
    return mesh.ndim == 1 and (mesh.mesh_dim_names or ("",))[0].lower() in TENSOR_PARALLEL


def _bind(fqn: str, param: Any, holders: Any, num_holders: int, unreduced: bool) -> ShardBinding:
    """Where a parameter lies; `unreduced`: whole ones have another gradient on every rank
    (`fully_shard`'s ignored_params).
    """
    if not is_dtensor(param):
        whole = TensorShard.whole(fqn, tuple(param.shape))
        return ShardBinding(whole, None, holders=holders, replicas=num_holders, unreduced=unreduced)
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    own = _shard_at(fqn, param, coordinate)
    cut = [
        axis
        for axis, placement in enumerate(param.placements)
        if _cuts(placement) and mesh.size(axis) > 1
    ]
    if not cut:
        return ShardBinding(own, None, holders=holders, replicas=num_holders)
    index = tuple(slice(None) if axis in cut else coordinate[axis] for axis in range(mesh.ndim))
    ranks = mesh.mesh[index].flatten().tolist()
    group = _group_of(tuple(sorted(ranks)), [mesh])
    peers = _grid(fqn, param, cut, tuple(ranks), tuple(comm.ranks_of(group)))
    return ShardBinding(
        own, group, peers, comm.rank(group), holders=holders, replicas=num_holders // len(ranks)
    )


@torch.no_grad()
def _check_copies(bindings: Sequence[ShardBinding], params: Sequence[Tensor], holders: Any) -> None:
    """Raise ValueError, on all ranks, where ranks hold copies of the same elements that are not the
    same.
    """
    copied = [
        (binding.shard, plain.local_tensor(p))
        for binding, p in zip(bindings, params, strict=True)
        if binding.replicas > 1
    ]
    if not copied:
        return
    squares = torch.stack(
        [torch.linalg.vector_norm(local, dtype=torch.float64).cpu() for _, local in copied]
    ).tolist()
    sums = torch.stack([local.sum(dtype=torch.float64).cpu() for _, local in copied]).tolist()
    mine = [
        (shard.start, shard.numel, shard.run, repr((a, b)))
        for (shard, _), a, b in zip(copied, squares, sums, strict=True)
    ]
    seen: dict[tuple[Any, ...], tuple[int, str]] = {}
    for rank, theirs in zip(
        comm.ranks_of(holders), comm.gather_objects(mine, holders), strict=True
    ):
        for i, (*place, values) in enumerate(theirs):
            other, wanted = seen.setdefault((i, *place), (rank, values))
            if values != wanted:
                raise ValueError(
                    f"{copied[i][0].fqn!r} differs between the ranks {other} and {rank}, which "
                    "hold copies of it: give all ranks the same parameters before sharding (one "
                    "seed, or a broadcast; pylo_dist.shard sees to it)"
                )


def _group_of(ranks: tuple[int, ...], meshes: Sequence[Any]) -> Any:
    """A process group over these ranks: one that a mesh has, or a new one."""
    for mesh in meshes:
        for axis in range(mesh.ndim):
            group = mesh.get_group(axis)
            if tuple(sorted(comm.ranks_of(group))) == ranks:
                return group
    return comm.group_over(ranks)


def shard_of(fqn: str, param: Any) -> TensorShard:
    """The elements of a DTensor that this rank holds."""
    return _shard_at(fqn, param, param.device_mesh.get_coordinate())


def _shard_at(fqn: str, param: Any, coordinate: Sequence[int]) -> TensorShard:
    """The elements that the rank at `coordinate` of the parameter's mesh holds."""
    return _grid(fqn, param, range(param.device_mesh.ndim)).shard(coordinate)


def _grid(
    fqn: str,
    param: Any,
    along: Sequence[int],
    there: tuple[int, ...] = (),
    ranks: tuple[int, ...] = (),
) -> GridCuts:
    """How a DTensor is cut over some axes of its mesh, which are all that cut it.

    Args:
        along: those axes.
        there: the ranks on them, in C order.
        ranks: the same in the order in which their shards are wanted.
    """
    mesh, shape = param.device_mesh, tuple(param.shape)
    place = {axis: i for i, axis in enumerate(along)}
    axes = []
    for dim in range(len(shape)):
        order = _order_of_cuts(fqn, param, dim)
        if order:
            axes.append((dim, tuple(place[axis] for axis in order)))
    places = None
    if there != ranks:
        at = {rank: i for i, rank in enumerate(there)}
        places = tuple(at[rank] for rank in ranks)
    sizes = tuple(mesh.size(axis) for axis in along)
    return GridCuts(fqn, shape, sizes, tuple(axes), places)


def _order_of_cuts(fqn: str, param: Any, dim: int) -> list[int]:
    """The mesh axes that cut a dimension, in the order in which they do."""
    axes = []
    for axis, placement in enumerate(param.placements):
        if placement.is_partial():
            raise ValueError(
                f"{fqn!r} has placements {tuple(param.placements)}: a parameter cannot be Partial"
            )
        if _cuts(placement) and placement.dim == dim and param.device_mesh.size(axis) > 1:
            axes.append(axis)
    factors = {axis: getattr(param.placements[axis], "split_factor", 1) for axis in axes}
    strided = [axis for axis in axes if factors[axis] > 1]
    if not strided:
        return axes
    # _StridedShard(dim, split_factor=n): the dimension had been cut into n by the axis to the right
    # before
    if (
        len(axes) == 2
        and strided == axes[:1]
        and factors[axes[0]] == param.device_mesh.size(axes[1])
    ):
        return [axes[1], axes[0]]
    raise ValueError(
        f"{fqn!r} with placements {tuple(param.placements)} is cut in strides on dimension {dim}; "
        "what can be expressed is one cut of fully_shard over one cut of tensor parallelism: "
        "shard this dimension over fewer mesh axes"
    )


def wrap_like(param: Any, local: Tensor, copies: int) -> Tensor:
    """State of a DTensor parameter as a DTensor that lies as the parameter does.

    Args:
        local: (*lead, N) or (*lead, *local shape of the parameter), with `copies` leading
            dimensions.
    """
    from torch.distributed.tensor import DTensor

    lead = tuple(local.shape[:copies])
    shape = (*lead, *param.shape)
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    placements = [_moved(placement, copies) for placement in param.placements]
    local = local.view(*lead, *plain.local_tensor(param).shape)
    size = torch.Size(shape)
    return DTensor.from_local(
        local, param.device_mesh, placements, run_check=False, shape=size, stride=stride
    )


def _cuts(placement: Any) -> bool:
    """Whether this is a `Shard` or a `_StridedShard`, which is no `Shard` in newer torch."""
    return hasattr(placement, "dim")


def _moved(placement: Any, dims: int) -> Any:
    """A placement `dims` dimensions further right."""
    if not _cuts(placement) or not dims:
        return placement
    factor = getattr(placement, "split_factor", None)
    if factor is None:
        return type(placement)(placement.dim + dims)
    return type(placement)(placement.dim + dims, split_factor=factor)


def left_behind(named: Sequence[tuple[str, Tensor]]) -> ValueError | None:
    """What is wrong if `fully_shard` put others in the place of these parameters, which no backward
    reaches any more.

    Looks through all objects of the process: ask only where no parameter has a gradient.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None or not named:
        return None
    mine = {id(param) for _, param in named}
    theirs = [param for module in living((kind,)) for param in module.parameters()]
    shapes = {tuple(param.shape) for param in theirs}
    if any(id(param) in mine for param in theirs) or not all(
        tuple(param.shape) in shapes for _, param in named
    ):
        return None
    return ValueError(
        f"{named[0][0]!r} and all other parameters have no gradient: the model was given to "
        "fully_shard after this optimizer was built, and has other parameters now; build the "
        "optimizer after fully_shard (or use pylo_dist.shard, which does both)"
    )
