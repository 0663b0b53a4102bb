"""State dicts of learned optimizers: what saving them adds, whether one fits, and this rank's
elements of it. Reads only; what it makes is new memory.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.pieces import ShardBinding
from ..core.rule import LearnedRule
from ..core.state import StateField, state_dtype
from ..layouts.plain import local_tensor
from ..maths.rounding import to_nearest
from ..weights import MetaNetwork
from .checks import as_number, shown
from .parameters import Groups, Parameters, State, names_of
from .sharded_state import ShardedState, covering_gap, local_part

# of state_dict(); what changes it says here how: 1 = canonical shapes, sharded or not
STATE_FORMAT = 1

OTHER_MARKS = {
    "state_format": "it was saved by another version of pylo_dist",
    "state_rule": "build the optimizer that saved it",
    "state_weights": "those are sha256 of learned weights: give the optimizer the weights it was "
    "saved with",
}
EARLIER_MARKS = {
    "state_weights": "the state was saved by a version that knew weights by their tensors alone; "
    "whether they had the same decays cannot be told"
}
SEED = "state_seed"  # what groups have beside their settings where state is halved
_log = logging.getLogger("pylo_dist")
_WRAPPERS = ("module.", "_orig_mod.")  # DDP's and torch.compile's, in front of every name


def marks_of(rule: LearnedRule, weights: MetaNetwork) -> dict[str, Any]:
    """What every group says about its state, so that every format of a checkpoint holds it."""
    return {
        "state_format": STATE_FORMAT,
        "state_rule": rule.name,
        "state_weights": weights.digest,
    }


def earlier_marks_of(weights: MetaNetwork) -> dict[str, Any]:
    """What earlier versions said in the place of some marks."""
    return {"state_weights": weights.tensors_digest}


def unsharded(saved: dict[str, Any], groups: Groups, parameters: Parameters) -> dict[str, Any]:
    """A state dict of torch's making in the keys, shapes and dtypes of the unsharded optimizer;
    `saved` (modified in place).
    """
    state, whole = saved["state"], parameters.whole()
    for i, param in _params_by_key(saved["param_groups"], groups).items():
        if i in state:
            entries = state[i]
            state[i] = {**entries} if id(param) in whole else parameters.canonical(param, entries)
        elif param.requires_grad and not parameters.bindings[param].shard.global_numel:
            state[i] = {}  # torch's set_optimizer_state_dict misses it otherwise
    for saved_group, group in zip(saved["param_groups"], groups, strict=True):
        saved_group["param_names"] = list(names_of(groups, group))
    return saved


@torch.no_grad()
def own_state(
    loaded: dict[str, Any], groups: Groups, parameters: Parameters
) -> dict[Tensor, State]:
    """This rank's elements of the loaded state per parameter, copied to its device, in the dtype
    they are kept in. Says so once where that is another one.
    """
    own, converted = {}, dict[str, tuple[torch.dtype, torch.dtype]]()
    kept_in: dict[Any, list[tuple[str, torch.dtype]]] = {}  # alike for many parameters
    for saved, param in _params_by_key(loaded["param_groups"], groups).items():
        entries = loaded["state"].get(saved)
        if entries:
            shard, fields = parameters.bindings[param].shard, parameters.fields[param]
            parts = {
                name: local_part(entries[name], field, shard, param)
                for name, field in fields.items()
            }
            kind = id(fields), param.dtype
            if kind not in kept_in:
                kept_in[kind] = [
                    (name, field.dtype(param.dtype, parameters.halved))
                    for name, field in fields.items()
                ]
            for name, kept in kept_in[kind]:
                found = parts[name].dtype
                if found != kept:
                    rounded = kept == torch.bfloat16
                    parts[name] = to_nearest(parts[name]) if rounded else parts[name].to(kept)
                    converted[name] = found, kept
            own[param] = parameters.shown(param, parts)
    if converted:
        found, kept = next(iter(converted.values()))
        how = "rounded to nearest" if kept == torch.bfloat16 else "exactly"
        names = ", ".join(converted)
        _log.warning("state was saved in %s and is kept in %s, %s: %s", found, kept, how, names)
    return own


def with_seeds_of(groups: Groups, loaded: dict[str, Any]) -> dict[str, Any]:
    """The same state dict for groups that have, or have no, seed for the rounding of their state:
    one that was saved counts, and where none was, their own.
    """
    saved = loaded["param_groups"]
    if len(saved) != len(groups):  # the checks say it
        return loaded
    taken = []
    for theirs, own in zip(saved, groups, strict=True):
        seed = {SEED: theirs.get(SEED, own[SEED])} if SEED in own else {}
        taken.append({**{key: value for key, value in theirs.items() if key != SEED}, **seed})
    return {**loaded, "param_groups": taken}


def without_state(loaded: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """What torch shall load: the groups. Names are the model's own, which torch keeps where a state
    has none; a group without takes those of the state.
    """
    taken = []
    for saved, group in zip(loaded["param_groups"], groups, strict=True):
        names = saved.get("param_names")
        keep = names and "param_names" not in group and not any(map(_is_generated, names))
        taken.append({k: v for k, v in saved.items() if keep or k != "param_names"})
    return {**loaded, "param_groups": taken, "state": {}}


def matched(loaded: dict[str, Any], groups: Groups, state: Mapping[Tensor, Any]) -> dict[str, Any]:
    """The same state dict with the parameters of this optimizer, in their order, where it can be
    told by their names: a frozen parameter may be in one of the two alone, as long as it has no
    state. Otherwise as it is, for the checks to refuse.
    """
    if "param_groups" not in loaded or "state" not in loaded:
        return loaded
    stated = {key for key, entries in loaded["state"].items() if entries}
    found = matched_groups(loaded["param_groups"], groups, state, stated)
    return {**loaded, "param_groups": _completed(found, groups)}


def matched_groups(
    saved: Groups, groups: Groups, state: Mapping[Tensor, Any], stated: Container[Any]
) -> Groups:
    """The groups of `matched`; in the place of what is not in the state they have a new key.

    Args:
        saved: the groups of a state dict.
        state: the optimizer's own.
        stated: keys of which the state dict has state.
    """
    if len(saved) != len(groups):
        return saved
    result = []
    for i, (saved_group, group) in enumerate(zip(saved, groups, strict=True)):
        only_saved, only_own = _differing(saved_group, groups, group)
        if not (only_saved or only_own):
            result.append(saved_group)
            continue
        if any(key in stated for key in only_saved.values()) or any(
            state.get(param) or param.requires_grad for param in only_own.values()
        ):
            return saved
        keys = dict(zip(_bare(saved_group["param_names"]), saved_group["params"], strict=True))
        names = names_of(groups, group)
        params = [keys.get(bare, f"without state: {i}.{j}") for j, bare in enumerate(_bare(names))]
        result.append({**saved_group, "params": params, "param_names": list(names)})
    return saved if all(a is b for a, b in zip(result, saved, strict=True)) else result


def _completed(saved: Groups, groups: Groups) -> Groups:
    """The same groups; of an empty one torch's set_optimizer_state_dict loses all entries. What
    belongs to the run is in every group alike, and no step reads the rest: its lr stays.
    """
    whole = next((group for group in saved if group["params"]), None)
    if whole is None or len(saved) != len(groups):
        return saved
    lost = {key: value for key, value in whole.items() if key != "param_names"}
    completed = []
    for theirs, own in zip(saved, groups, strict=True):
        if not (theirs["params"] or own["params"]):
            kept = {key: value for key, value in own.items() if key in ("lr", "initial_lr")}
            # copies: a step writes the entries of each group
            theirs = {**copy.deepcopy(lost), **kept, **theirs}
        completed.append(theirs)
    return completed


def _differing(
    saved: dict[str, Any], groups: Groups, group: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys that are in a saved group alone and the parameters that are in ours alone, by name;
    none where names cannot tell.
    """
    own_names, saved_names = names_of(groups, group), saved.get("param_names")
    keys = saved["params"]
    if not isinstance(saved_names, list) or len(saved_names) != len(keys):
        return {}, {}
    if saved_names == own_names or any(map(_is_generated, (*saved_names, *own_names))):
        return {}, {}
    theirs = dict(zip(_bare(saved_names), keys, strict=True))
    ours = dict(zip(_bare(own_names), group["params"], strict=True))
    if len(theirs) != len(saved_names) or len(ours) != len(own_names):
        return {}, {}
    return (
        {name: key for name, key in theirs.items() if name not in ours},
        {name: param for name, param in ours.items() if name not in theirs},
    )


def _params_by_key(saved: Groups, groups: Groups) -> dict[Any, Tensor]:
    """The parameter that each key of a state dict stands for."""
    return {
        key: param
        for saved_group, group in zip(saved, groups, strict=True)
        for key, param in zip(saved_group["params"], group["params"], strict=True)
    }


# ------------------------------------------------------------------------------------------- checks


def check_parts(loaded: dict[str, Any], kind: str) -> None:
    """Raise ValueError for what is no state dict at all; `kind` is that of the optimizer."""
    for key in ("param_groups", "state"):
        if key not in loaded:
            raise ValueError(
                f"the state has no {key!r}; wanted what state_dict() of {kind} returned"
            )


def check_groups(
    saved: Groups,
    groups: Groups,
    keys: Sequence[str],
    marks: Mapping[str, Any],
    earlier: Mapping[str, Any],
) -> None:
    """Raise ValueError for parameter groups that do not fit.

    Args:
        groups: the optimizer's own.
        keys: what each must have, beside the marks.
        marks: what each must say.
        earlier: what states of earlier versions say in the place of some of them, which is taken
            with a warning.
    """
    saved_sizes, own_sizes = ([len(group["params"]) for group in g] for g in (saved, groups))
    if saved_sizes != own_sizes:
        alone = ""
        for saved_group, group in zip(saved, groups, strict=False):
            only_saved, only_own = _differing(saved_group, groups, group)
            for where, found in (("state", [*only_saved]), ("optimizer", [*only_own])):
                if found and not alone:
                    alone = f" ({found[0]!r} is in the {where} alone)"
        raise ValueError(
            f"the state holds groups of {saved_sizes} parameters, this optimizer groups of "
            f"{own_sizes}{alone}; build the optimizer with the groups that were saved"
        )
    for i, group in enumerate(saved):
        for key in (*keys, *marks):
            if key not in group:
                raise ValueError(
                    f"group {i} of the state has no {key!r}; was it saved by another optimizer?"
                )
        for key, wanted in marks.items():
            if key in earlier and group[key] == earlier[key]:
                warnings.warn(EARLIER_MARKS[key], stacklevel=2)
            elif group[key] != wanted:
                raise ValueError(
                    f"group {i} of the state has {key} {group[key]!r}, this optimizer {wanted!r}; "
                    f"{OTHER_MARKS[key]}"
                )
    check_names(saved, groups)


def group_state(rule: LearnedRule) -> dict[str, Tensor]:
    """What a group has beside its settings, as it is before the first step."""
    return {"step": torch.zeros((), dtype=torch.int64), **rule.group_state()}


def check_group_state(saved: Groups, rule: LearnedRule) -> None:
    """Raise ValueError for an entry of `group_state` that is no real tensor of its shape, or a
    number where it is 0-d.
    """
    own = group_state(rule)
    for i, group in enumerate(saved):
        for key, value in own.items():
            found, shape = group[key], tuple(value.shape)
            if isinstance(found, Tensor):
                fits = tuple(found.shape) == shape and not found.is_complex()
            else:
                number = as_number(found)
                fits = not shape and number is not None and math.isfinite(number)
            if not fits:
                raise ValueError(
                    f"group {i} of the state has {key}={shown(found)}, wanted real numbers of "
                    f"shape {shape}; was it saved by another optimizer?"
                )


def check_names(saved: Groups, groups: Groups) -> None:
    """Raise ValueError for groups of a state that name other parameters than ours in their place,
    where both have names.
    """
    for i, (group, own_group) in enumerate(zip(saved, groups, strict=False)):
        names = names_of(groups, own_group)
        found = group.get("param_names") or names
        if found == names:
            continue
        for name, own in zip(found, names, strict=False):
            if not same_name(name, own):
                raise ValueError(
                    f"group {i} of the state has {name!r} in the place of {own!r}: it belongs to "
                    "another model, or has its parameters in another order; build the optimizer "
                    "as it was saved (without 'param_names' in its groups a state loads by "
                    "position)"
                )


def check_states(
    loaded: dict[str, Any], groups: Groups, state: Mapping[Tensor, Any], parameters: Parameters
) -> None:
    """Raise ValueError for state that does not fit its parameter.

    Args:
        state: the optimizer's own; a parameter that has some must find some.
    """
    by_key = _params_by_key(loaded["param_groups"], groups)
    if passed_over := _passed_over(by_key, loaded["state"], state):
        raise ValueError(
            f"state of {parameters.bindings[passed_over[0]].shard.fqn!r}, which is frozen, was "
            "left out by torch's set_optimizer_state_dict: call that while the parameter is "
            "trainable and freeze it after it, or load with load_state_dict or pylo_dist.checkpoint"
        )
    # alike for many parameters
    wanted: dict[Any, list[tuple[str, StateField, torch.Size, torch.dtype]]] = {}
    for saved, param in by_key.items():
        entries = loaded["state"].get(saved, {})
        if not (entries or state.get(param)):
            continue
        fields, binding = parameters.fields[param], parameters.bindings[param]
        shape = binding.shard.shape
        kind = id(fields), shape, param.dtype
        if kind not in wanted:
            wanted[kind] = [
                (
                    name,
                    field,
                    torch.Size(field.canonical_shape(shape)),
                    field.dtype(param.dtype, parameters.halved),
                )
                for name, field in fields.items()
            ]
        for name, field, size, dtype in wanted[kind]:
            got = entries.get(name)
            # a tensor that is no part of another is whole: every rank's elements are in it
            if type(got) is not Tensor or got.dtype != dtype or got.shape != size:
                _check_tensor(name, got, field, binding, param)


def _passed_over(
    by_key: Mapping[Any, Tensor], loaded: Mapping[Any, Any], state: Mapping[Tensor, Any]
) -> list[Tensor]:
    """Frozen parameters whose state is not in what torch's set_optimizer_state_dict hands over (its
    keys are names): there is none, or the optimizer's own stands in for it while others are new.
    """
    named = {key: param for key, param in by_key.items() if isinstance(key, str)}
    same = {
        key: all(_same_memory(tensor, own.get(name)) for name, tensor in loaded[key].items())
        for key, param in named.items()
        if loaded.get(key) and (own := state.get(param))
    }
    partly = not all(same.values())
    return [
        param
        for key, param in named.items()
        if not param.requires_grad
        and state.get(param)
        and (partly if same.get(key) else not loaded.get(key))
    ]


def _same_memory(a: object, b: object) -> bool:
    """Whether this rank's elements of two tensors are at the same place."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and not isinstance(a, ShardedState)
        and local_tensor(a).data_ptr() == local_tensor(b).data_ptr()
    )


def _check_tensor(
    name: str, got: object, field: StateField, binding: ShardBinding, param: Tensor
) -> None:
    shard = binding.shard
    wanted, dtype = field.canonical_shape(shard.shape), state_dtype(param.dtype)
    fits = isinstance(got, Tensor) and field.loads(got.dtype, param.dtype)
    if isinstance(got, Tensor) and fits and tuple(got.shape) == wanted:
        if gap := covering_gap(got, field.copies, field.part(shard)):
            raise ValueError(
                f"state {name!r} of {shard.fqn!r}: {gap} elements of this rank are on other "
                "ranks; load it through torch.distributed.checkpoint, or give whole tensors "
                "(pylo_dist.full_state_dict)"
            )
        return
    found, asked = "nothing" if got is None else type(got).__name__, f"shape {wanted}"
    if isinstance(got, Tensor) and tuple(got.shape) == wanted:
        found, asked = str(got.dtype), str(dtype)
    elif isinstance(got, Tensor):
        found = f"shape {tuple(got.shape)}"
    raise ValueError(
        f"state {name!r} of {shard.fqn!r}: found {found}, wanted {asked}; the state belongs to "
        "another model, optimizer or layout"
    )


def same_name(saved: str, own: str) -> bool:
    """Whether two parameter names may mean the same parameter: wrappers and generated names do not
    count.
    """
    saved, own = _bare([saved, own])
    return saved == own or _is_generated(saved) or _is_generated(own)


def _bare(names: Sequence[str]) -> list[str]:
    """Names without those of wrappers in front."""
    found = list(names)
    for wrapper in _WRAPPERS * 2:
        found = [name.removeprefix(wrapper) for name in found]
    return found


def _is_generated(name: str) -> bool:
    return re.fullmatch(r"group\d+\.\d+", name) is not None
