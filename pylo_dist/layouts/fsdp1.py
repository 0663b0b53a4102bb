"""Parameters of torch's `FullyShardedDataParallel` (FSDP1, `use_orig_params=True`): where their
local elements lie. Reads the wrapped modules' handles, by private names of torch, all in this file.

FSDP1 lays the parameters of a unit one behind the other, with padding where addresses want it, and
cuts that flat tensor into equal chunks, one per rank. So a rank holds a flat interval of each
parameter, often of no elements, and its `.data` is that interval as a 1-D tensor. Where a unit is
not sharded (NO_SHARD) parameters are whole, and their gradients averaged, as under DDP.

Legend: a *unit* is a wrapped module with the parameters that it holds flat.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import comm
from ..core.pieces import ShardBinding, bind_shard
from ..core.shards import TensorShard
from .objects import living

PREFIX = "_fsdp_wrapped_module."  # what a unit puts before the names of its parameters

# private names of torch: of a unit, of its handle, and of the handle's flat parameter
_NAMES = {
    "handle": "_handle",
    "group": "process_group",
    "copies": "_inter_node_pg",
    "flat": "flat_param",
    "sharded": "uses_sharded_strategy",
    "params": "_params",
    "infos": "_param_infos",
    "shapes": "_shapes",
    "sizes": "_numels_with_padding",
    "paddings": "_is_padding_mask",
    "places": "_shard_param_infos",
    "tied": "_shared_params",
    "tied_infos": "_shared_param_infos",
    "in_shards": "needs_unshard",
    "free": "_free_unsharded_flat_param",
}

# weak references to the units of parameters: a unit holds its parameters, and would keep itself
_units: Any = WeakIdKeyDictionary()


def is_flat(param: object) -> bool:
    """Whether this is the flat parameter of a unit, which stands for many."""
    return getattr(param, "_is_flat_param", False) is True


def is_flattened(param: object) -> bool:
    """Whether FSDP1 holds this parameter in a unit; not of a flat one."""
    marked: bool = getattr(param, "_fsdp_flattened", False)
    return marked and not is_flat(param)


def is_sharded(param: Tensor) -> bool:
    """Whether FSDP1 has cut this parameter into intervals. Raises ValueError as `unit_of`."""
    return is_flattened(param) and bool(_of_torch(_handle(unit_of(param)), "sharded"))


def unit_of(param: Tensor) -> Any:
    """The wrapped module that holds a flattened parameter.

    Looks through all objects of the process when it is first asked of a model.

    Raises:
        ValueError: there is none any more, or this torch calls its parts differently.
    """
    unit = _known_unit(param)
    if unit is None:
        kind = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel
        for other in living((kind,)):
            handle = _handle(other)
            if handle is not None:
                for held in (*_flat(handle, "params"), *_flat(handle, "tied")):
                    _units[held] = weakref.ref(other)
        unit = _known_unit(param)
    if unit is None:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} belonged to a FullyShardedDataParallel "
            "module that is gone: build the optimizer on the parameters of the wrapped model"
        )
    return unit


def _known_unit(param: Tensor) -> Any:
    return _units[param]() if param in _units else None


def units_of(params: Iterable[Tensor]) -> list[Any]:
    """The units that hold flattened parameters, each once. Raises ValueError as `unit_of`."""
    return list({id(unit): unit for unit in map(unit_of, params)}.values())


def releases(params: Iterable[Tensor]) -> list[Callable[[], None]]:
    """For each sharded unit of these parameters, what frees all that it has gathered outside of a
    pass, so that the next one gathers it anew. Keeps no unit alive.

    Raises:
        ValueError: as `unit_of`.
    """
    handles = map(_handle, units_of(param for param in params if is_sharded(param)))
    return [
        partial(
            _release,
            weakref.WeakMethod(_of_torch(handle, "in_shards")),
            weakref.WeakMethod(_of_torch(handle, "free")),
        )
        for handle in handles
    ]


def _release(in_shards: weakref.WeakMethod[Any], free: weakref.WeakMethod[Any]) -> None:
    asked, freeing = in_shards(), free()
    if asked is not None and freeing is not None and not asked():
        freeing()


def _of_torch(thing: Any, name: str) -> Any:
    """What torch keeps under one of the names above. Raises ValueError if it does so no more."""
    try:
        return getattr(thing, _NAMES[name])
    except AttributeError:
        raise ValueError(
            f"torch {torch.__version__} has no {_NAMES[name]!r} where FullyShardedDataParallel "
            "has it in 2.10 to 2.13 and 2.15, so its layout cannot be read: use "
            "torch.distributed.fsdp.fully_shard (see pylo_dist.shard), or another torch"
        ) from None


def _handle(unit: Any) -> Any:
    return _of_torch(unit, "handle")


def _group(unit: Any) -> Any:
    """The process group over which a unit is cut."""
    return _of_torch(unit, "group")


def _flat(handle: Any, name: str) -> Any:
    """Metadata of a unit's flat parameter."""
    return _of_torch(_of_torch(handle, "flat"), name) or ()


def domain_of(params: Sequence[Tensor]) -> tuple[int, ...]:
    """The ranks that add sums for these parameters of an optimizer, copies included; () where
    each adds its own: no unit is sharded, and nothing lies beside them.

    Raises:
        ValueError: units over different ranks, or copies (HYBRID_SHARD) on part of the ranks.
    """
    flattened = [param for param in params if is_flattened(param)]
    if len(flattened) == len(params) and not any(map(is_sharded, flattened)):
        return ()
    ranks: tuple[int, ...] = ()
    for unit in units_of(flattened):
        group = _group(unit)
        own = tuple(sorted(comm.ranks_of(group)))
        between = getattr(unit, _NAMES["copies"], None)  # only with copies
        if between is not None:
            everywhere = tuple(range(comm.size(comm.default_group())))
            if len(own) * comm.size(between) != len(everywhere):
                raise ValueError(
                    f"FullyShardedDataParallel keeps copies (HYBRID_SHARD) of {len(own)} ranks' "
                    f"shards on {comm.size(between)} sets of ranks, and the world has "
                    f"{len(everywhere)} ranks: wrap the model on all of them"
                )
            own = everywhere
        if ranks and own != ranks:
            raise ValueError(
                f"units of FullyShardedDataParallel lie on the ranks {list(ranks)} and "
                f"{list(own)}: give each part an optimizer of its own"
            )
        ranks = own
    return ranks


def describe(
    named: Sequence[tuple[str, Tensor]], settings: Sequence[str] = ()
) -> list[ShardBinding]:
    """Where the elements of each parameter of an optimizer lie; some of them are flattened.
    Collective over the ranks that hold them, which compare what they have.

    Args:
        settings: what else must be the same on all ranks.

    Raises:
        ValueError: a layout that cannot be served, or ranks that disagree; on all of them.
    """
    domain = domain_of([param for _, param in named])
    if len(domain) < 2:  # as under DDP
        return [ShardBinding(TensorShard.whole(fqn, _shape(p)), None) for fqn, p in named]
    holders = _group_of(domain, named)

    def entries() -> list[Any]:
        _check_devices(named, holders)
        return [*settings, *(_spec(fqn, param) for fqn, param in named)]

    comm.agree("setting or parameter", entries, holders, torch.device(comm.device_type()))
    return [_bind(fqn, param, holders, len(domain)) for fqn, param in named]


def _group_of(domain: tuple[int, ...], named: Sequence[tuple[str, Tensor]]) -> Any:
    """A process group over these ranks: that of a unit, or where there are copies a new one."""
    flattened = next(param for _, param in named if is_flattened(param))
    group = _group(unit_of(flattened))
    return group if comm.size(group) == len(domain) else comm.group_over(domain)


def _check_devices(named: Sequence[tuple[str, Tensor]], holders: Any) -> None:
    """Raise ValueError for parameters that their process group cannot reduce."""
    for fqn, param in named:
        if not comm.can_reduce(holders, param.device):
            raise ValueError(
                f"{fqn!r} is offloaded to {param.device}, where its process group cannot reduce: "
                'call init_process_group("cpu:gloo,cuda:nccl"), or leave CPUOffload out'
            )


def _spec(fqn: str, param: Tensor) -> list[object]:
    """What must be the same on all ranks of the domain."""
    kind = "beside the units"
    if is_flattened(param):
        kind = "sharded" if is_sharded(param) else "whole"
    return [fqn, list(_shape(param)), str(param.dtype), bool(param.requires_grad), kind]


def _shape(param: Tensor) -> tuple[int, ...]:
    """The global shape."""
    if not is_flattened(param):
        return tuple(param.shape)
    handle = _handle(unit_of(param))
    return tuple(_flat(handle, "shapes")[_place(handle, param)])


def _place(handle: Any, param: Tensor) -> int:
    """The number of a parameter in its unit; of a tied one that of its first name."""
    for i, other in enumerate(_flat(handle, "params")):
        if other is param:
            return i
    shared = next(
        info
        for info, other in zip(_flat(handle, "tied_infos"), _flat(handle, "tied"), strict=True)
        if other is param
    )
    first = (shared.prim_module, shared.prim_param_name)
    return next(
        i
        for i, info in enumerate(_flat(handle, "infos"))
        if (info.module, info.param_name) == first
    )


def _bind(fqn: str, param: Tensor, holders: Any, num_holders: int) -> ShardBinding:
    if not is_sharded(param):
        # gradients of what FSDP1 was told to ignore are averaged by nobody
        whole = TensorShard.whole(fqn, _shape(param))
        unreduced = not is_flattened(param)
        return ShardBinding(whole, None, holders=holders, replicas=num_holders, unreduced=unreduced)
    peers, group = shards_of(fqn, param)
    ranks = comm.size(group)
    return bind_shard(param, peers, comm.rank(group), group, holders, num_holders // ranks)


def shards_of(fqn: str, param: Tensor) -> tuple[tuple[TensorShard, ...], Any]:
    """The intervals of a sharded parameter that the ranks of its unit hold, in rank order, and
    their process group.

    Raises:
        ValueError: torch lays them out in another way, or the parameter is not in its shards now.
    """
    unit = unit_of(param)
    handle, group = _handle(unit), _group(unit)
    place, ranks = _place(handle, param), comm.size(group)
    paddings = _flat(handle, "paddings")
    sizes = list(_flat(handle, "sizes"))
    begins = [
        begin
        for begin, padding in zip([0, *accumulate(sizes)], paddings, strict=False)
        if not padding
    ]
    chunk = -(-sum(sizes) // ranks)
    shape, begin = _shape(param), begins[place]
    numel = TensorShard.whole(fqn, shape).numel
    cuts = [min(max(rank * chunk - begin, 0), numel) for rank in range(ranks + 1)]
    peers = tuple(TensorShard.interval(fqn, shape, *cuts[rank : rank + 2]) for rank in range(ranks))
    _check_place(fqn, param, peers[comm.rank(group)], _flat(handle, "places")[place])
    return peers, group


def _check_place(fqn: str, param: Tensor, shard: TensorShard, info: Any) -> None:
    """Raise ValueError unless torch says the same of where this rank's elements lie."""
    theirs = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (None, 0)
    if theirs != (shard.start if shard.numel else None, shard.numel):
        raise ValueError(
            f"{fqn!r}: this rank should hold {shard.numel} elements from {shard.start} on, torch "
            f"{torch.__version__} says {theirs[1]} from {theirs[0]} on: its "
            "FullyShardedDataParallel lays parameters out in a way that is not known here"
        )
    if tuple(param.shape) != (shard.numel,):
        raise ValueError(
            f"{fqn!r} has shape {tuple(param.shape)} now, wanted its {shard.numel} elements: build "
            "the optimizer outside of summon_full_params, and not between a forward pass and its "
            "backward"
        )
