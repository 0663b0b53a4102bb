"""`FSDP.optim_state_dict`, `FSDP.optim_state_dict_to_load` and their older forms for learned
optimizers. torch's own take every state tensor for one number per element and end in an
AssertionError, so once a learned optimizer has parameters of FSDP1, all go through the functions
here; any other optimizer goes on to torch's. Changes no optimizer.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..core.pieces import ShardBinding
from ..core.state import StateField
from ..layouts import fsdp1
from ..layouts.flat import Tree
from ..layouts.objects import living
from .parameters import named_in
from .sharded_state import ShardedState, canonical, covering_gap, local_part, whole_tensor

States = dict[str, Any]


def serve(params: Sequence[Tensor], kind: type) -> None:
    """Have torch's functions for states ask optimizers of this kind, where FSDP1 holds some of
    these parameters.
    """
    if any(map(fsdp1.is_flattened, params)):
        fsdp1.exchange("save", functools.partial(_asked, kind, _saved))
        fsdp1.exchange("load", functools.partial(_asked, kind, _to_load))


def _asked(
    kind: type, ours: Callable[[Any, dict[str, Any]], States], theirs: Callable[..., States]
) -> Callable[..., States]:
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> States:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        optimizer = given.arguments["optim"]
        if optimizer is None:
            optimizer = _only_one(kind, given.arguments["model"])
        # accelerate hands over an optimizer that holds it
        while not isinstance(optimizer, kind) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, kind):
            return theirs(*args, **kwargs)
        return ours(optimizer, given.arguments)

    return function


def _only_one(kind: type, model: Any) -> Any:
    """The optimizer of this kind whose parameters are all of this model, which functions of torch
    that are older than `optim` leave open; None where there is none.

    Raises:
        ValueError: there are several.
    """
    gc.collect()  # of those that nobody keeps, ranks have collected different ones
    tree, found = Tree([model]), []
    for optimizer in living((kind,)):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if params and all(tree.find(param) is not None for param in params):
            found.append(optimizer)
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} optimizers have parameters of this model: name the one meant, optim="
        )
    return found[0] if found else None


def _by_key(state_dict: Mapping[str, Any], optimizer: Any) -> dict[Any, Tensor]:
    """The parameters behind the keys of a state dict of this optimizer: those that its groups name,
    without groups their numbers.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if "param_groups" not in state_dict:
        return dict(enumerate(params))
    keys = [key for saved in state_dict["param_groups"] for key in saved["params"]]
    return dict(zip(keys, params, strict=True))


def _bindings(optimizer: Any) -> dict[int, ShardBinding]:
    return {id(param): binding for binding, param in optimizer.layouts()}


# ----------------------------------------------------------------------------------------- to save


@torch.no_grad()
def _saved(optimizer: Any, given: Mapping[str, Any]) -> States:
    """A state dict by the full names of the parameters in the model, with whole tensors or with
    sharded ones. Collective where they are to be whole.
    """
    state_dict, full = given["optim_state_dict"], given["full_state_dict"]
    group = given["group"] or comm.default_group()
    wanted = not full or not given["rank0_only"] or comm.rank(group) == 0
    by_key, tree = _by_key(state_dict, optimizer), Tree([given["model"]])
    bindings, found = _bindings(optimizer), dict[Any, tuple[int, str]]()
    for key, param in by_key.items():
        where = tree.find(param)
        if where is None:
            raise ValueError(
                f"{bindings[id(param)].shard.fqn!r} of the optimizer is no parameter of the model "
                "given to FullyShardedDataParallel.optim_state_dict: give the model that was "
                "wrapped"
            )
        found[key] = where

    def out(value: Any, binding: ShardBinding) -> Any:
        if isinstance(value, ShardedState) and full:
            value = whole_tensor(value, binding, wanted)
        if isinstance(value, Tensor):
            value = value.detach().clone()
            return value.cpu() if given["cpu_offload"] else value
        return value

    state = {
        found[key][1]: {
            name: out(value, bindings[id(by_key[key])])
            for name, value in state_dict["state"][key].items()
        }
        for key in by_key
        if key in state_dict["state"]
    }
    if not wanted:
        return {}
    if "param_groups" not in state_dict:
        return {"state": state}
    groups = []
    for saved in state_dict["param_groups"]:
        # in the model's order, in which torch numbers parameters (rekey_optim_state_dict)
        names = [name for _, name in sorted(found[key] for key in saved["params"])]
        others = {k: copy.deepcopy(v) for k, v in saved.items() if k != "params"}
        groups.append({**others, "params": names, "param_names": list(names)})
    return {"state": state, "param_groups": groups}


# ----------------------------------------------------------------------------------------- to load


@torch.no_grad()
def _to_load(optimizer: Any, given: Mapping[str, Any]) -> States:
    """What `load_state_dict` of this rank takes, of a state dict by full names: this rank's
    elements. Collective where the first rank alone has it, and where it is sharded.
    """
    loaded = held = given["optim_state_dict"]
    group = (given["group"] or comm.default_group()) if given["rank0_only"] else None
    if group is not None:
        loaded = comm.gather_objects(_outline(held) if comm.rank(group) == 0 else None, group)[0]
    if "state" not in loaded:
        raise ValueError(
            'the state has no "state"; wanted what FullyShardedDataParallel.optim_state_dict '
            "returned"
        )
    tree, bindings = Tree([given["model"]]), _bindings(optimizer)
    params = named_in(optimizer.param_groups)
    found = [tree.find(param) for _, param in params]
    numbers = {
        own if where is None else where[1]: i
        for i, ((own, _), where) in enumerate(zip(params, found, strict=True))
    }
    targets = {
        name: _Target(param, bindings[id(param)], optimizer.state_fields(param))
        for name, param in ((name, params[i][1]) for name, i in numbers.items())
    }
    elsewhere, among = set[tuple[str, str]](), given["group"] or _sharers(bindings)
    if not given["full_state_dict"]:
        elsewhere = _elsewhere(loaded["state"], targets, among)
    state: dict[Any, Any] = {}
    for name, entries in loaded["state"].items():
        state[numbers.get(name, name)] = mine = {}
        for key, value in entries.items():
            if isinstance(value, _Sent):
                value = value.receive(held["state"][name][key] if held else None, group)
            elif (name, key) in elsewhere:
                value = _gathered(value, among)
            if name in targets and isinstance(value, Tensor):
                value = targets[name].mine(key, value)
            mine[key] = value
    result: States = {"state": state}
    if "param_groups" in loaded:
        result["param_groups"] = [
            _group(saved, numbers, params) for saved in loaded["param_groups"]
        ]
    return result


@dataclass(frozen=True, slots=True)
class _Target:
    """A parameter whose state is loaded."""

    param: Tensor
    binding: ShardBinding
    fields: Mapping[str, StateField]

    def field(self, key: str, value: Tensor) -> StateField | None:
        """What a state tensor is, if it is of the shape of such a one."""
        field = self.fields.get(key)
        if field is None or tuple(value.shape) != field.canonical_shape(self.binding.shard.shape):
            return None
        return field

    def lacks(self, key: str, value: Any) -> bool:
        """Whether this rank needs elements of sharded state that it does not have."""
        field = self.field(key, value) if isinstance(value, ShardedState) else None
        return field is not None and (
            covering_gap(value, field.copies, field.part(self.binding.shard)) > 0
        )

    def mine(self, key: str, value: Tensor) -> Tensor:
        """This rank's elements of a state tensor, as `state_dict` has them; one that does not fit
        stays as it is, for the optimizer to refuse.
        """
        fqn = self.binding.shard.fqn
        if type(value).__name__ == "ShardedTensor":
            raise ValueError(
                f"state {key!r} of {fqn!r} is a ShardedTensor of torch, as "
                "load_sharded_optimizer_state_dict makes it in the shape of the parameter: read it "
                "with torch.distributed.checkpoint.load into what FullyShardedDataParallel."
                "optim_state_dict returns, or save full state dicts"
            )
        field = self.field(key, value)
        if field is None:
            return value
        local = local_part(value, field, self.binding.shard, self.param)
        return canonical(local, field, self.binding)


def _elsewhere(
    state: Mapping[str, Mapping[str, Any]], targets: Mapping[str, _Target], group: Any
) -> set[tuple[str, str]]:
    """The sharded state, by the name of its parameter and its own, of which some rank of `group`
    lacks elements that it needs: the model that saved it was wrapped in another way. Collective.
    """
    mine = [
        (name, key)
        for name, entries in state.items()
        for key, value in entries.items()
        if name in targets and targets[name].lacks(key, value)
    ]
    return {entry for theirs in comm.gather_objects(mine, group) for entry in theirs}


def _sharers(bindings: Mapping[int, ShardBinding]) -> Any:
    """The ranks that share these parameters; the world where none are."""
    holders = (binding.holders for binding in bindings.values())
    return next((group for group in holders if group is not None), comm.default_group())


def _gathered(state: ShardedState, group: Any) -> Tensor:
    """A state tensor whole, from the parts that the ranks of `group` have, which all call it.

    Raises:
        ValueError: they do not have all of it.
    """
    mine = [(offsets, part.cpu().clone()) for offsets, part in state.parts()]
    parts = dict(part for theirs in comm.gather_objects(mine, group) for part in theirs)
    if sum(part.numel() for part in parts.values()) != state.numel():
        raise ValueError(
            f"the ranks that load state of {state.shard.fqn!r} do not have all its elements: load "
            "it through torch.distributed.checkpoint, or give whole tensors"
        )
    whole = state.local.new_empty(state.shape)
    for offsets, part in parts.items():
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))] = part
    return whole


@dataclass(frozen=True, slots=True)
class _Sent:
    """A tensor that the first rank alone has."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def receive(self, held: Tensor | None, group: Any) -> Tensor:
        """It, on all ranks of `group`; `held` on the first."""
        device = torch.device(comm.device_type())
        if held is None or comm.rank(group):
            tensor = torch.empty(self.shape, dtype=self.dtype, device=device)
        else:
            tensor = held.detach().to(device).contiguous()
        comm.broadcast(tensor, 0, group)
        return tensor


def _outline(state_dict: Any) -> Any:
    """A state dict without its large tensors."""
    if not isinstance(state_dict, Mapping) or "state" not in state_dict:
        return {}
    state = {
        name: {
            key: _Sent(tuple(value.shape), value.dtype)
            if isinstance(value, Tensor) and value.dim()
            else value
            for key, value in entries.items()
        }
        for name, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _group(
    saved: Mapping[str, Any], numbers: Mapping[str, int], params: Sequence[tuple[str, Tensor]]
) -> dict[str, Any]:
    """A saved group by numbers, in the order of the optimizer; unknown names at the end."""
    known = sorted(numbers[name] for name in saved["params"] if name in numbers)
    others = [name for name in saved["params"] if name not in numbers]
    names = [params[number][0] for number in known] + others
    return {**saved, "params": [*known, *others], "param_names": names}
