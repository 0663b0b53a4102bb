"""Who the parameters of an optimizer are, what they are called, where their elements lie and which
state they have. Makes state; writes no parameter.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from ..core.pieces import ShardBinding
from ..core.rule import LearnedRule
from ..core.state import StateField, allocate_state
from ..layouts import construction, dtensor, plain
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
    in a group already.
    """
    if isinstance(given["params"], set):
        return dict(given)  # refused by torch
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
    return {**given, "params": entries}


class Parameters:
    """The one place that is asked about the parameters of an optimizer.

    Args:
        rule: says which state a parameter has.
        kind: of the optimizer; ranks that build one together compare it.

    Attributes:
        bindings: where the elements of each parameter lie; another dict whenever they were
            described anew.
        fields: the state of each parameter.
    """

    def __init__(self, rule: LearnedRule, kind: str) -> None:
        self.kind = kind
        self.bindings: dict[Tensor, ShardBinding] = {}
        self.fields: dict[Tensor, dict[str, StateField]] = {}
        self._rule = rule

    # ------------------------------------------------------------------------------ which there are

    def describe(self, groups: Groups, settings: Sequence[str]) -> dict[Tensor, ShardBinding]:
        """Where the elements of all parameters of these groups lie; collective where there are
        DTensors. Changes nothing here.

        Args:
            settings: what else must be the same on all ranks.
        """
        named = named_in(groups)
        construction.meet(named, self.kind)
        bindings = dtensor.describe_all(named, settings)
        return {param: binding for (_, param), binding in zip(named, bindings, strict=True)}

    def admit(self, group: dict[str, Any], bindings: dict[Tensor, ShardBinding]) -> None:
        """Take over a new group; the bindings are those of all groups, of which some may have
        changed: a copy of a parameter may lie on ranks that the new group brings in.
        """
        fields = self._fields_of(group, bindings)
        self.bindings, self.fields = bindings, {**self.fields, **fields}

    def follow(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, Any],
        settings: Callable[[], Sequence[str]],
    ) -> None:
        """Take over parameters that a library put in the place of ours before the first step
        (accelerate, under FSDP2), and drop the state of those that are gone.

        Raises:
            ValueError: steps were taken, and the state belongs to the parameters that are gone.
        """
        if all(param in self.bindings for group in groups for param in group["params"]):
            return
        for group in groups:
            for name, param in zip(names_of(groups, group), group["params"], strict=True):
                plain.check_param(name, param)
                if param not in self.bindings and bool(group["step"] > 0):
                    raise ValueError(
                        f"{name!r} was replaced by another tensor after {int(group['step'])} "
                        "steps, and its state belongs to the old one: shard the model before the "
                        "first step"
                    )
        bindings = self.describe(groups, settings())
        fields = {p: f for group in groups for p, f in self._fields_of(group, bindings).items()}
        self.bindings, self.fields = bindings, fields
        for param in [param for param in state if param not in self.bindings]:
            del state[param]

    def _fields_of(
        self, group: dict[str, Any], bindings: dict[Tensor, ShardBinding]
    ) -> dict[Tensor, dict[str, StateField]]:
        return {
            param: self._rule.state_fields(bindings[param].shard, group)
            for param in group["params"]
        }

    def bound(self, groups: Groups) -> list[tuple[ShardBinding, Tensor]]:
        """Every parameter with where its elements lie."""
        return [(self.bindings[param], param) for group in groups for param in group["params"]]

    def trainable(self, groups: Groups) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters that take part in steps, with their groups: those that are not frozen and
        have elements at all.
        """
        return [
            (param, group)
            for group in groups
            for param in group["params"]
            if param.requires_grad and self.bindings[param].shard.global_numel
        ]

    # ---------------------------------------------------------------------------------- their state

    def new_state(self, param: Tensor) -> State:
        """What the state of a parameter begins with, as `optimizer.state` shows it."""
        return self.shown(
            param, allocate_state(self.fields[param], self.bindings[param].shard, param)
        )

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
