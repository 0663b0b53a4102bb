"""Who the parameters of an optimizer are, what they are called, where their elements lie and which
state they have. Makes state; writes no parameter.

Who takes part in steps, in every layout: a parameter that was trainable when it came to the
optimizer, or in any step since. It stays for good, so that freezing it between steps changes
nothing but its gradient; without one it is not moved, and VeLO's LSTM sees it all the same. Its
state says that it is in: state is made as it enters, saved, loaded and copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..core.pieces import ShardBinding
from ..core.rule import LearnedRule
from ..core.shards import Shape, TensorShard
from ..core.state import StateField, allocate_states
from ..layouts import construction, dtensor, plain
from ..layouts.describe import describe_all
from .sharded_state import canonical

Groups = list[dict[str, Any]]
State = dict[str, Tensor]


def names_of(groups: Groups, group: dict[str, Any]) -> list[str]:
    """Full names of the parameters of one of these groups: as given, else `group{i}.{j}`."""
    i = next(i for i, other in enumerate(groups) if other is group)
    given: list[str] | None = group.get("param_names")
    return given or [f"group{i}.{j}" for j in range(len(group["params"]))]


def named_in(groups: Groups) -> list[tuple[str, Tensor]]:
    """All parameters of these groups with their full names."""
    return [
        pair
        for group in groups
        for pair in zip(names_of(groups, group), group["params"], strict=True)
    ]


def own_group(given: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A copy of a caller's group, which stays as it is. Raises ValueError for a parameter that is
    in a group already, or is no leaf.
    """
    entries = [given["params"]] if isinstance(given["params"], Tensor) else list(given["params"])
    known = {id(param): i for i, group in enumerate(groups) for param in group["params"]}
    new = len(groups)
    for j, entry in enumerate(entries):
        name, param = entry if isinstance(entry, tuple) else (f"group{new}.{j}", entry)
        if id(param) in known:
            i = known[id(param)]
            where = "in the same group twice" if i == new else f"already in parameter group {i}"
            raise ValueError(f"{name!r} is {where}; list a tied parameter once")
        known[id(param)] = new
        if isinstance(param, Tensor):
            plain.check_leaf(name, param)
    return {**given, "params": entries}


def share_names(group: dict[str, Any], groups: Groups) -> None:
    """An empty group goes with groups that have names and with those that have none (all modified
    in place): torch wants all alike, and takes an empty one for one without.
    """
    named = any(isinstance(entry, tuple) for entry in group["params"])
    if not group["params"] and any("param_names" in other for other in groups):
        group.setdefault("param_names", [])
    elif named and not any(other["params"] for other in groups):
        for other in groups:
            other.setdefault("param_names", [])


def _ids_of(groups: Groups) -> list[int]:
    return [*map(id, chain.from_iterable(group["params"] for group in groups))]


class Parameters:
    """The one place that is asked about the parameters of an optimizer.

    Args:
        rule: says which state a parameter has.
        kind: of the optimizer; ranks that build one together compare it.
        halved: whether state is kept in bfloat16 where its field allows it.

    Attributes:
        bindings: where the elements of each parameter lie; another dict whenever they were
            described anew.
        fields: the state of each parameter.
        ids: the parameters of all groups, by id, as they were followed last; another list whenever
            they or the bindings, which keep them alive, are others.
    """

    def __init__(self, rule: LearnedRule, kind: str, halved: bool = False) -> None:
        self.kind, self.halved = kind, halved
        self.bindings: dict[Tensor, ShardBinding] = {}
        self.fields: dict[Tensor, dict[str, StateField]] = {}
        self.ids: list[int] = []
        self._rule = rule
        self._whole: tuple[dict[Tensor, ShardBinding], set[int]] | None = None
        self._given: list[list[tuple[str, Shape]]] = []  # names and global shapes, by group

    def __setstate__(self, state: dict[str, Any]) -> None:
        # of another process, or of a version that had none
        self.__dict__.update({"halved": False, **state, "ids": [], "_whole": None})

    # ------------------------------------------------------------------------------ which there are

    def describe(self, groups: Groups, settings: Sequence[str]) -> dict[Tensor, ShardBinding]:
        """Where the elements of all parameters of these groups lie; collective where there are
        DTensors. Changes nothing here.

        Args:
            settings: what else must be the same on all ranks.
        """
        named = named_in(groups)
        construction.meet(named, self.kind)
        bindings = describe_all(named, settings)
        return {param: binding for (_, param), binding in zip(named, bindings, strict=True)}

    def check_halved(self, group: dict[str, Any], bindings: dict[Tensor, ShardBinding]) -> None:
        """Raise ValueError for a parameter of a group whose state cannot be kept in bfloat16, where
        that was asked for.
        """
        for param in group["params"] if self.halved else ():
            shard = bindings[param].shard
            fields = self._rule.state_fields(shard, group)
            why = ""
            if param.dtype == torch.float64:
                why = f"{shard.fqn!r} is torch.float64, and so is all arithmetic with its state"
            elif all(field.slot is None for field in fields.values()):
                why = (
                    f"the rule {self._rule.name!r} says of no state that it may be rounded "
                    "(StateField.slot)"
                )
            if why:
                raise ValueError(f"state_dtype='bfloat16': {why}; leave it out")

    def admit(self, groups: Groups, bindings: dict[Tensor, ShardBinding]) -> None:
        """Take over the last of these groups, which is new; the bindings are those of all, of which
        some may have changed: a copy of a parameter may lie on ranks that the new group brings in.
        """
        shards = [bindings[param].shard for param in groups[-1]["params"]]
        fields = self._fields_of(groups[-1], shards)
        self._given.append([(shard.fqn, shard.shape) for shard in shards])
        self.bindings, self.fields = bindings, {**self.fields, **fields}
        self.ids = _ids_of(groups)

    def follow(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, Any],
        settings: Callable[[], Sequence[str]],
    ) -> None:
        """Take over parameters that a library put in the place of ours before the first step
        (accelerate, under FSDP2), and drop the state of those that are gone. Changes nothing on an
        error.

        Raises:
            ValueError: one has another global shape than that in whose place it is, or steps were
                taken, and the state belongs to the parameters that are gone.
        """
        ids = _ids_of(groups)
        if ids == self.ids:
            return
        if all(param in self.bindings for group in groups for param in group["params"]):
            self.ids = ids
            return
        for i, group in enumerate(groups):
            self._check_exchanged(i, group)
        bindings = self.describe(groups, settings())
        fields: dict[Tensor, dict[str, StateField]] = {}
        for group in groups:
            fields |= self._fields_of(group, [bindings[param].shard for param in group["params"]])
        self.bindings, self.fields, self.ids = bindings, fields, ids
        for param in [param for param in state if param not in self.bindings]:
            del state[param]

    def _check_exchanged(self, i: int, group: dict[str, Any]) -> None:
        """Raise ValueError for parameters of group i that cannot take the place of ours."""
        if i >= len(self._given):
            raise ValueError(
                f"parameter group {i} was put into param_groups by hand: add it with "
                "add_param_group, which describes its parameters and makes their state"
            )
        given, params = self._given[i], group["params"]
        if all(param in self.bindings for param in params):
            return
        for (name, _), param in zip(given, params, strict=False):
            plain.check_param(name, param)
        shapes = [plain.describe("", param).shard.shape for param in params]
        for j, (name, shape) in enumerate(given):
            if j < len(shapes) == len(given) and shapes[j] == shape:
                continue
            found = f"one of shape {shapes[j]}" if j < len(shapes) else "none"
            raise ValueError(
                f"{name!r} of shape {shape} was exchanged in parameter group {i}, which held "
                f"{len(given)} tensors and holds {len(params)} now: {found} is in its place. A "
                "step needs whole tensors, or knows how they are cut; a flattened or reshaped one "
                f"it would move wrongly. DeepSpeed does this to an optimizer object: "
                f"{self._remedy()}"
            )
        name, new = next(
            (name, p) for (name, _), p in zip(given, params, strict=True) if p not in self.bindings
        )
        if not plain.is_dtensor(new) and _deepspeed_alone():
            raise ValueError(
                f"{name!r} was exchanged for another tensor of its shape in parameter group {i}, "
                f"as DeepSpeed does to an optimizer object in stage 0: {self._remedy()}"
            )
        if bool(group["step"] > 0):
            raise ValueError(
                f"{name!r} was replaced by another tensor after {int(group['step'])} steps, and "
                "its state belongs to the old one: shard the model before the first step"
            )

    def _remedy(self) -> str:
        return (
            "`import pylo_dist.deepspeed` before deepspeed.initialize, which then serves it, or "
            f'name it in the JSON ({{"optimizer": {{"type": "{self.kind}", "params": {{...}}}}}}). '
            "Elsewhere change the model first and build the optimizer after it"
        )

    def _fields_of(
        self, group: dict[str, Any], shards: Sequence[TensorShard]
    ) -> dict[Tensor, dict[str, StateField]]:
        found = {}
        for param, shard in zip(group["params"], shards, strict=True):
            fields = self._rule.state_fields(shard, group)
            if plain.is_dtensor(param):  # whose state torch gathers, and knows no third kind
                fields = {name: f.everywhere() for name, f in fields.items()}
            found[param] = fields
        return found

    def whole(self) -> set[int]:
        """The parameters, by id, of which this rank alone has all: their state is canonical as it
        is.
        """
        if self._whole is None or self._whole[0] is not self.bindings:
            found = {
                id(param)
                for param, binding in self.bindings.items()
                if binding.group is None and binding.shard.is_whole
            }
            self._whole = self.bindings, found
        return self._whole[1]

    def bound(self, groups: Groups) -> list[tuple[ShardBinding, Tensor]]:
        """Every parameter with where its elements lie."""
        return [(self.bindings[param], param) for group in groups for param in group["params"]]

    def taking_part(
        self, groups: Groups, state: MutableMapping[Tensor, Any], enter: bool
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters that take part in steps, with their groups; those without elements never
        do.

        Args:
            state: the optimizer's; who has some is in.
            enter: whether others may come in now: at construction and in a step, which all ranks
                do at the same time.
        """
        return [
            (param, group)
            for group in groups
            for param in group["params"]
            if self.takes_part(param, state, enter)
        ]

    def takes_part(self, param: Tensor, state: MutableMapping[Tensor, Any], enter: bool) -> bool:
        """See `taking_part`."""
        there = state.get(param) or (enter and self._may_enter(param))
        return bool(there) and self.bindings[param].shard.global_numel > 0

    def _may_enter(self, param: Tensor) -> bool:
        # whether there is a gradient may differ between ranks, and the line-up must not
        return param.requires_grad or (
            param.grad is not None and self.bindings[param].holders is None
        )

    def left_out(self, groups: Groups, state: MutableMapping[Tensor, Any]) -> ValueError | None:
        """What is wrong with the coming step: a gradient that it would pass over."""
        for group in groups:
            for param in group["params"]:
                if (
                    not param.requires_grad
                    and param.grad is not None
                    and not (state.get(param) or self._may_enter(param))
                ):
                    return ValueError(
                        f"{self.bindings[param].shard.fqn!r} has a gradient, and has been frozen "
                        "in every step since the optimizer was built: call requires_grad_(True) "
                        "before step(), or build the optimizer while it is trainable and freeze "
                        "it after that"
                    )
        return None

    # ---------------------------------------------------------------------------------- their state

    def new_states(self, params: Sequence[Tensor]) -> Iterator[State]:
        """What the state of each of these parameters begins with, as `optimizer.state` shows it."""
        return self._new_states(params, [self.bindings[param].shard for param in params])

    def _new_states(
        self, params: Sequence[Tensor], shards: Sequence[TensorShard]
    ) -> Iterator[State]:
        fields = map(self.fields.__getitem__, params)
        states = allocate_states(zip(fields, shards, params, strict=True), self.halved)
        return map(self.shown, params, states) if any(map(plain.is_dtensor, params)) else states

    def enter(self, groups: Groups, state: MutableMapping[Tensor, Any]) -> None:
        """Make the state of those that may come in now (see `taking_part`) and have none."""
        new, shards = [], []
        for param in chain.from_iterable(group["params"] for group in groups):
            if state.get(param) or not self._may_enter(param):
                continue
            shard = self.bindings[param].shard
            if shard.global_numel > 0:
                new.append(param)
                shards.append(shard)
        state.update(zip(new, self._new_states(new, shards), strict=True))

    def shown(self, param: Tensor, local: State) -> State:
        """The local state of a parameter as `optimizer.state` shows it: what is sharded as a
        DTensor is a DTensor.
        """
        if not plain.is_dtensor(param):
            return local
        fields = self.fields[param]
        return {
            name: tensor
            if fields[name].replicated is not None
            else dtensor.wrap_like(param, tensor, len(fields[name].copies))
            for name, tensor in local.items()
        }

    def canonical(self, param: Tensor, state: State) -> State:
        """The same state as checkpoints have it, see `sharded_state.canonical`; what no field names
        stays as it is.
        """
        fields, binding = self.fields[param], self.bindings[param]
        return {
            name: canonical(tensor, fields[name], binding) if name in fields else tensor
            for name, tensor in state.items()
        }


def _deepspeed_alone() -> bool:
    """Whether DeepSpeed is there without our adapter, which keeps it from exchanging tensors."""
    return "deepspeed" in sys.modules and "pylo_dist.deepspeed" not in sys.modules
