"""Parameters of torch's `FullyShardedDataParallel` (FSDP1): where their local elements lie. Reads
the wrapped modules' handles, by private names of torch, all in this file.

FSDP1 lays the parameters of a unit one behind the other, with padding where addresses want it, and
cuts that flat tensor into equal chunks, one per rank. So a rank holds a flat interval of each
parameter, often of no elements. With `use_orig_params=True` its `.data` is that interval as a 1-D
tensor, without there is the flat tensor alone, of which `flat` makes such parameters. Where a unit
is not sharded (NO_SHARD) parameters are whole, and their gradients averaged, as under DDP.

Legend: a *unit* is a wrapped module with the parameters that it holds flat.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import comm
from ..core.cuts import Cuts, EvenCuts
from ..core.pieces import ShardBinding, bind_shard
from ..core.shards import TensorShard
from .objects import living

PREFIX = "_fsdp_wrapped_module."  # what a unit puts before the names of its parameters
_CHECKPOINTED = "_checkpoint_wrapped_module."  # and a module that computes activations again
FLAT = "_flat_param"  # what it calls the flat one

# private names of torch: of a unit, of its handle, of the handle's flat parameter, of the class
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
    "plain": "_contiguities",
    "changed": "_param_extensions",
    "names": "_fqns",
    "size": "_sharded_size",
    "local": "_local_shard",
    "save": "_optim_state_dict_impl",
    "load": "_optim_state_dict_to_load_impl",
    "tied": "_shared_params",
    "tied_infos": "_shared_param_infos",
    "in_shards": "needs_unshard",
    "free": "_free_unsharded_flat_param",
    "doing": "_training_state",
}

_OURS = "_pylo_dist"  # on a function that took the place of torch's

# a weak reference to the unit of a parameter, which holds that and would keep itself, and the
# parameter's number in it; a flat one is number 0
_known: Any = WeakIdKeyDictionary()


def bare(name: str) -> str:
    """The name of a parameter without what wrappers put before it, as `state_dict` has it."""
    return name.replace(PREFIX, "").replace(_CHECKPOINTED, "")


def is_flat(param: object) -> bool:
    """Whether this is the flat parameter of a unit, which stands for many."""
    return getattr(param, "_is_flat_param", False) is True


def is_flattened(param: object) -> bool:
    """Whether FSDP1 holds this parameter in a unit; not of a flat one."""
    marked: bool = getattr(param, "_fsdp_flattened", False)
    return marked and not is_flat(param)


def is_held(param: object) -> bool:
    """Whether this is the flat parameter of a unit or one in it."""
    return is_flat(param) or is_flattened(param)


def is_sharded(param: Tensor) -> bool:
    """Whether FSDP1 has cut this parameter into intervals. Raises ValueError as `unit_of`."""
    return is_flattened(param) and is_cut(unit_of(param))


def is_cut(unit: Any) -> bool:
    """Whether a unit is sharded."""
    return bool(_of_torch(_handle(unit), "sharded"))


def is_unit(module: object) -> bool:
    """Whether this is a wrapped module that holds parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapped = fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)
    return wrapped and _handle(module) is not None


def unit_of(param: Tensor) -> Any:
    """The wrapped module that holds a flattened parameter.

    Looks through all objects of the process when it is first asked of a model.

    Raises:
        ValueError: there is none any more, or this torch calls its parts differently.
    """
    unit = _known_unit(param)
    if unit is None:
        for other in filter(is_unit, wrapped()):
            _remember(other)
        unit = _known_unit(param)
    if unit is None:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} belonged to a FullyShardedDataParallel "
            "module that is gone: build the optimizer on the parameters of the wrapped model"
        )
    return unit


def wrapped() -> list[Any]:
    """All wrapped modules there are in the process; those without parameters of their own are no
    units.
    """
    return living((sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel,))


def _remember(unit: Any) -> None:
    handle = _handle(unit)
    infos = [(info.module, info.param_name) for info in _flat(handle, "infos")]
    mine = [(_of_torch(handle, "flat"), 0)]
    mine += [(param, place) for place, param in enumerate(_flat(handle, "params"))]
    for info, param in zip(_flat(handle, "tied_infos"), _flat(handle, "tied"), strict=False):
        mine.append((param, infos.index((info.prim_module, info.prim_param_name))))
    for param, place in mine:
        adopt(param, unit, place)


def adopt(param: Tensor, unit: Any, place: int) -> None:
    """Take `param` for number `place` of the parameters of a unit."""
    _known[param] = (weakref.ref(unit), place)


def place_of(param: Tensor) -> tuple[Any, int]:
    """The unit of a flattened parameter and its number there. Raises ValueError as `unit_of`."""
    return unit_of(param), _known[param][1]


def _known_unit(param: Tensor) -> Any:
    return _known[param][0]() if param in _known else None


def check_in_shards(param: Tensor) -> None:
    """Raise ValueError for a flattened parameter whose sharded unit shows whole ones now, which go
    in the place of its shards when that ends.
    """
    unit = _known_unit(param)  # gone with its model, it shows nothing
    if unit is None or not is_cut(unit):
        return
    if _of_torch(_handle(unit), "doing").name == "SUMMON_FULL_PARAMS":
        raise ValueError(
            f"{names_in(unit)[_known[param][1]]!r} is inside of summon_full_params, which would "
            "write over what a step changes: take the step outside"
        )


def units_of(params: Iterable[Tensor]) -> list[Any]:
    """The units that hold flattened parameters, each once. Raises ValueError as `unit_of`."""
    return list({id(unit): unit for unit in map(unit_of, params)}.values())


def names_in(unit: Any) -> list[str]:
    """The names of the parameters that a unit holds flat, from its wrapped module on, by number."""
    return list(map(bare, _flat(_handle(unit), "names")))


def modules_in(unit: Any) -> list[tuple[Any, str]]:
    """The module of each parameter that a unit holds flat and its name there, by number."""
    return [(info.module, info.param_name) for info in _flat(_handle(unit), "infos")]


def tied_in(unit: Any) -> Iterator[tuple[str, int]]:
    """Further names of tied parameters that a unit holds flat, and the numbers of these."""
    handle = _handle(unit)
    infos = modules_in(unit)
    for info in _flat(handle, "tied_infos"):
        name = f"{info.module_name}.{info.param_name}" if info.module_name else info.param_name
        yield bare(name), infos.index((info.prim_module, info.prim_param_name))


def flat_of(unit: Any) -> Any:
    """The flat parameter of a unit where there are no others (`use_orig_params=False`), or None."""
    handle = _handle(unit)
    return None if _of_torch(_of_torch(handle, "flat"), "params") else _of_torch(handle, "flat")


def left_behind(named: Sequence[tuple[str, Tensor]]) -> ValueError | None:
    """What is wrong if `use_orig_params=False` copied these parameters into flat ones, and no
    backward reaches them any more.

    Looks through all objects of the process: ask only where no parameter has a gradient.
    """
    if not named or "torch.distributed.fsdp" not in sys.modules:
        return None
    units = [unit for unit in wrapped() if is_unit(unit) and flat_of(unit) is not None]
    shapes = {shape_at(unit, i) for unit in units for i in range(len(names_in(unit)))}
    if any(is_held(p) for _, p in named) or not all(tuple(p.shape) in shapes for _, p in named):
        return None
    return ValueError(
        f"{named[0][0]!r} and all other parameters have no gradient: the model was given to "
        "FullyShardedDataParallel (use_orig_params=False) after this optimizer was built, and has "
        "flat parameters now; build the optimizer on the parameters of the wrapped model"
    )


def local_of(flat: Tensor) -> Tensor:
    """What this rank holds of a flat parameter, whatever torch has it stand for now; shares its
    memory.

    Raises:
        ValueError: torch lays it out in another way.
    """
    local: Tensor = getattr(flat, _NAMES["local"], flat.data)  # it comes with the first pass
    if local.shape != _of_torch(flat, "size"):
        raise ValueError(
            f"a flat parameter has {local.numel()} elements now, wanted this rank's "
            f"{flat._sharded_size.numel()}: build the optimizer outside of summon_full_params"  # type: ignore[attr-defined]
        )
    return local


def reduced_of(flat: Tensor) -> Tensor | None:
    """The gradient of what this rank holds of a flat parameter; None where there is none, or none
    yet: passes under no_sync leave that of the whole one.
    """
    grad = flat.grad
    return grad if grad is not None and grad.shape == _of_torch(flat, "size") else None


def check_reduced(fqn: str, grad: Tensor, numel: int) -> None:
    """Raise ValueError for a gradient that is not of the `numel` elements which this rank holds:
    one of whole parameters, as passes under no_sync leave it.
    """
    if grad.numel() != numel:
        raise ValueError(
            f"the gradient of {fqn!r} has {grad.numel()} elements, wanted the {numel} that this "
            "rank holds: no_sync leaves each rank the gradient of its own batches, so run the last "
            "backward pass before a step outside of it"
        )


def exchange(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put what `make` makes of a static function of FullyShardedDataParallel in its place, once.

    Args:
        name: "save" or "load", which all functions for states of optimizers go through.

    Raises:
        ValueError: this torch has none of that name.
    """
    kind = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel
    held = _of_torch(kind, name)
    if not hasattr(held, _OURS):
        ours = make(held)
        setattr(ours, _OURS, True)
        setattr(kind, _NAMES[name], staticmethod(ours))


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
    if asked is None or freeing is None or not _has_run(asked.__self__):
        return  # its model is gone, or there was no pass yet
    if not asked():
        freeing()


def _has_run(handle: Any) -> bool:
    """Whether torch has prepared the flat parameter of a unit for passes, as the first one does."""
    return hasattr(_of_torch(handle, "flat"), _NAMES["local"])


def _of_torch(thing: Any, name: str) -> Any:
    """What torch keeps under one of the names above. Raises ValueError if it does so no more."""
    try:
        return getattr(thing, _NAMES[name])
    except AttributeError:
        raise ValueError(
            f"torch {torch.__version__} has no {_NAMES[name]!r} where FullyShardedDataParallel "
            "has it in 2.10 to 2.15, so its layout cannot be read: use "
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
    held = [param for param in params if is_held(param)]
    units = units_of(held)
    if len(held) == len(params) and not any(map(is_cut, units)):
        return ()
    ranks: tuple[int, ...] = ()
    for unit in units:
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
    return shape_at(*place_of(param))


def shape_at(unit: Any, place: int) -> tuple[int, ...]:
    """The global shape of a parameter of a unit, by its number."""
    return tuple(_flat(_handle(unit), "shapes")[place])


def _bind(fqn: str, param: Tensor, holders: Any, num_holders: int) -> ShardBinding:
    if not is_sharded(param):
        # gradients of what FSDP1 was told to ignore are averaged by nobody
        whole = TensorShard.whole(fqn, _shape(param))
        unreduced = not is_flattened(param)
        return ShardBinding(whole, None, holders=holders, replicas=num_holders, unreduced=unreduced)
    peers, group = shards_of(fqn, param)
    ranks = comm.size(group)
    return bind_shard(param, peers, comm.rank(group), group, holders, num_holders // ranks)


def shards_of(fqn: str, param: Tensor) -> tuple[Cuts, Any]:
    """The intervals of a sharded parameter that the ranks of its unit hold, in rank order, and
    their process group.

    Raises:
        ValueError: torch lays them out in another way, or the parameter is not in its shards now.
    """
    peers, group = shards_at(fqn, *place_of(param))
    shard = peers[comm.rank(group)]
    if tuple(param.shape) != (shard.numel,):
        raise ValueError(
            f"{fqn!r} has shape {tuple(param.shape)} now, wanted its {shard.numel} elements: build "
            "the optimizer outside of summon_full_params, and not between a forward pass and its "
            "backward"
        )
    return peers, group


def shards_at(fqn: str, unit: Any, place: int) -> tuple[Cuts, Any]:
    """As `shards_of`, of a parameter of a unit by its number."""
    handle, group = _handle(unit), _group(unit)
    check_order(fqn, unit, place)
    ranks, total = comm.size(group), sum(_flat(handle, "sizes"))
    peers = EvenCuts(fqn, shape_at(unit, place), -(-total // ranks), begin_at(unit, place), ranks)
    _check_place(fqn, peers[comm.rank(group)], _flat(handle, "places")[place])
    return peers, group


def begin_at(unit: Any, place: int) -> int:
    """Where a parameter begins in the flat one of its unit, before that is cut."""
    handle = _handle(unit)
    begins: list[int] = [0, *accumulate(_flat(handle, "sizes"))]
    both = zip(begins, _flat(handle, "paddings"), strict=False)
    return [begin for begin, padding in both if not padding][place]


def check_order(fqn: str, unit: Any, place: int) -> None:
    """Raise ValueError for a parameter whose elements lie in another order than its own, or that is
    the part of one which tensor parallelism has cut.
    """
    handle = _handle(unit)
    if _flat(handle, "changed")[place] is not None:
        raise ValueError(
            f"{fqn!r} is a DTensor inside of FullyShardedDataParallel, which holds this rank's "
            "part of it and nothing of the others': shard a model of DTensors with "
            "torch.distributed.fsdp.fully_shard"
        )
    if not _flat(handle, "plain")[place]:
        raise ValueError(
            f"{fqn!r} was not contiguous when FullyShardedDataParallel took it (channels_last, a "
            "transpose), and lies in its flat parameter in the order of its strides: make it "
            "contiguous before, param.data = param.data.contiguous()"
        )


def _check_place(fqn: str, shard: TensorShard, info: Any) -> None:
    """Raise ValueError unless torch says the same of where this rank's elements lie."""
    theirs = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (None, 0)
    if theirs != (shard.start if shard.numel else None, shard.numel):
        raise ValueError(
            f"{fqn!r}: this rank should hold {shard.numel} elements from {shard.start} on, torch "
            f"{torch.__version__} says {theirs[1]} from {theirs[0]} on: its "
            "FullyShardedDataParallel lays parameters out in a way that is not known here"
        )
