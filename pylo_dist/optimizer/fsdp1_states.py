"""`FSDP.optim_state_dict`, `FSDP.optim_state_dict_to_load` and their older forms for learned
optimizers. torch's own take every state tensor for one number per element and end in an
AssertionError, so once a learned optimizer has parameters of FSDP1, all go through the functions
here; any other optimizer goes on to torch's. Changes no optimizer.
"""

from __future__ import annotations

import copy
import functools
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
from .parameters import named_in
from .sharded_state import ShardedState, canonical, local_part, whole_tensor

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
        # accelerate hands over an optimizer that holds it
        while not isinstance(optimizer, kind) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, kind):
            return theirs(*args, **kwargs)
        return ours(optimizer, given.arguments)

    return function


def _by_key(groups: Sequence[Mapping[str, Any]], optimizer: Any) -> dict[Any, Tensor]:
    """The parameters behind the keys of a state dict of this optimizer."""
    return {
        key: param
        for saved, group in zip(groups, optimizer.param_groups, strict=True)
        for key, param in zip(saved["params"], group["params"], strict=True)
    }


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
    by_key, tree = _by_key(state_dict["param_groups"], optimizer), Tree([given["model"]])
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
    elements. Collective where the first rank alone has it, or where tensors are torch's
    ShardedTensors.
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
    state: dict[Any, Any] = {}
    for name, entries in loaded["state"].items():
        number = numbers.get(name)
        param = None if number is None else params[number][1]
        state[name if number is None else number] = mine = {}
        for key, value in entries.items():
            if isinstance(value, _Sent):
                value = value.receive(held["state"][name][key] if held else None, group)
            if param is not None and isinstance(value, Tensor):
                value = _mine(key, value, param, bindings[id(param)], optimizer.state_fields(param))
            mine[key] = value
    result: States = {"state": state}
    if "param_groups" in loaded:
        result["param_groups"] = [
            _group(saved, numbers, params) for saved in loaded["param_groups"]
        ]
    return result


def _mine(
    key: str, value: Tensor, param: Tensor, binding: ShardBinding, fields: Mapping[str, StateField]
) -> Tensor:
    """This rank's elements of a state tensor, as `state_dict` has them; one that does not fit stays
    as it is, for the optimizer to refuse.
    """
    fqn = binding.shard.fqn
    if type(value).__name__ == "ShardedTensor":
        raise ValueError(
            f"state {key!r} of {fqn!r} is a ShardedTensor of torch, as "
            "load_sharded_optimizer_state_dict makes it in the shape of the parameter: read it "
            "with torch.distributed.checkpoint.load into what FullyShardedDataParallel."
            "optim_state_dict returns, or save full state dicts"
        )
    field = fields.get(key)
    if field is None or tuple(value.shape) != field.canonical_shape(binding.shard.shape):
        return value
    return canonical(local_part(value, field, binding.shard, param), field, binding)


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
