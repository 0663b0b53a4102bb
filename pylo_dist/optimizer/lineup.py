"""The engine over the parameters that take part in steps. Brings items their gradients, and
parameters their new values where those could not be written in place.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Container,
    Generator,
    Iterable,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..comm import Collective
from ..core.pieces import ShardBinding, raw_grad
from ..core.rule import Batch, Item, LearnedRule
from ..layouts import flat, gradients, plain
from ..layouts.gathered import releases_of
from .engine import Clip, Engine, Nonfinite
from .parameters import Groups, Parameters


@dataclass(slots=True, eq=False)
class Member:
    """A parameter in the line-up: item number `place` of `batch`.

    Attributes:
        sound: whether the last step could use it; what that step saw of it is looked at anew
            otherwise.
        shape: the parameter's, as long as it is as it was.
    """

    binding: ShardBinding
    param: Tensor
    item: Item
    batch: Batch
    place: int
    sound: bool = True
    shape: torch.Size = field(init=False)

    def __post_init__(self) -> None:
        self.shape = plain.shape_of(self.binding, self.param)

    def take(self, grad: Tensor) -> None:
        """Bring the item a gradient that `steady_gradients` gave."""
        sharded = self.item.param
        sharded.grad = grad if grad.dim() == 1 else grad.view(-1)
        sharded.present = self.binding.present


def steady_gradients(members: Sequence[Member]) -> list[Tensor | None] | None:
    """The gradients of these members as they lie, where parameters and gradients are what they are
    in most steps; None where one is not, and each is to be collected by itself. Asked in every
    step, and so in lists.
    """
    params = [member.param for member in members]
    values = [member.item.param.value for member in members]
    shapes = [member.shape for member in members]
    if not plain.are_as_before(params, values, shapes):
        return None
    grads = [*map(raw_grad, params)]
    return grads if plain.are_local(grads, shapes) and all(m.sound for m in members) else None


class Lineup:
    """The parameters that take part, in batches by device, under one engine; made again when
    they, their groups or their state tensors are others, not when one is frozen.

    Args:
        parameters: knows who takes part.
        rule: drives all of them.
        clip, nonfinite: see `Engine`.

    Attributes:
        engine: None until `ready`, and after `retire`.
        members, batches: what it works on, in the order of the parameter groups.
        bound: the members' bindings and parameters.
    """

    def __init__(
        self, parameters: Parameters, rule: LearnedRule, clip: Clip, nonfinite: Nonfinite
    ) -> None:
        self.rule = rule
        self.engine: Engine | None = None
        self._replayed: list[Engine] = []  # of earlier parameters, see `retire`
        self.members: list[Member] = []
        self.batches: list[Batch] = []
        self.bound: list[tuple[ShardBinding, Tensor]] = []
        self._parameters, self._clip, self._nonfinite = parameters, clip, nonfinite
        self._by_id: dict[int, Member] = {}
        self._groups: Groups = []
        self._releases: list[Callable[[], None]] = []
        self._pieces: list[flat.FlatPiece] = []
        self._brought: list[Member] = []  # whose item has been made anew for this step
        # what the engine is built on: `Parameters.ids`, those of them that take no part, the state
        # tensors there were (so that no other tensor gets the id of one), by id, and their memory
        self._ids: list[int] = []
        self._outside: list[Tensor] = []
        self._held: list[Tensor] = []
        self._states: list[int] = []
        self._memory: list[int] = []

    def admit(self, groups: Groups, state: MutableMapping[Tensor, Any]) -> None:
        """Take in a group that is new among these: its state is made now, the engine when it is
        asked for, and not once per group. Raises as `ready`.
        """
        self.retire()
        self._parameters.enter(groups, state)
        self._check_devices(param for param, its in state.items() if its)

    def _check_devices(self, params: Iterable[Tensor]) -> None:
        if not self.rule.needs_loss:
            return
        devices = dict.fromkeys(str(param.device) for param in params)
        if len(devices) > 1:
            raise ValueError(
                f"{self._parameters.kind} couples all tensors; they are on {[*devices]}, wanted "
                "one device"
            )

    def ready(self, groups: Groups, state: MutableMapping[Tensor, Any], enter: bool) -> Engine:
        """The engine over the parameters there are now; their state is made where there is none.

        Args:
            enter: see `Parameters.taking_part`.

        Raises:
            ValueError: parameters on several devices, for a rule that couples all of them.
        """
        if self.engine is not None and self._stands(groups, state, enter):
            return self.engine
        if enter:
            self._parameters.enter(groups, state)
        taking_part = self._parameters.taking_part(groups, state, enter)
        params = [param for param, _ in taking_part]
        described = self._parameters.bindings
        self.retire()
        by_device: dict[torch.device, list[tuple[Tensor, Item]]] = {}
        for param, group in taking_part:
            binding, fields = described[param], self._parameters.fields[param]
            local = {
                name: fields[name].flat(plain.local_tensor(tensor))
                for name, tensor in state[param].items()
            }
            dims = self.rule.dims(binding.shard.shape)
            item = Item(plain.without_gradient(binding, param), local, group, dims)
            by_device.setdefault(param.device, []).append((param, item))
        self._check_devices(params)
        for device, entries in by_device.items():
            batch = Batch.of([item for _, item in entries], groups, device)
            self.batches.append(batch)
            for place, (param, item) in enumerate(entries):
                self._by_id[id(param)] = Member(described[param], param, item, batch, place)
        self.members = [self._by_id[id(param)] for param in params]
        self.bound = [(member.binding, member.param) for member in self.members]
        self._groups, self._ids = list(groups), self._parameters.ids
        self._releases = releases_of(params)
        self._pieces = [param for param in params if isinstance(param, flat.FlatPiece)]
        mine = {id(param) for param in params}
        self._outside = [p for group in groups for p in group["params"] if id(p) not in mine]
        self._held = [tensor for its in state.values() for tensor in its.values()]
        self._states, self._memory = _states(state, self._held)
        self.engine = Engine(
            [(self.rule, batch) for batch in self.batches], self._nonfinite, self._clip
        )
        return self.engine

    def _stands(self, groups: Groups, state: MutableMapping[Tensor, Any], enter: bool) -> bool:
        """Whether the engine is over the parameters, groups and state tensors there are now, which
        callers may have replaced. Asked in every step, and so in lists rather than one by one.
        """
        return (
            self._ids is self._parameters.ids
            and [*map(id, self._groups)] == [*map(id, groups)]
            and _states(state, self._held) == (self._states, self._memory)
            and not any(self._parameters.takes_part(p, state, enter) for p in self._outside)
        )

    def retire(self) -> None:
        """Give up the engine, and with it the memory that only it holds; one that a CUDA graph
        has captured stays, since a replay writes its memory, whoever else had got it.
        """
        retired, self.engine = self.engine, None
        self.members, self.batches, self.bound, self._brought = [], [], [], []
        self._by_id, self._groups, self._held, self._outside, self._pieces = {}, [], [], [], []
        if retired is not None:
            if retired.captured:
                self._replayed.append(retired)
            retired.retire()  # last: its warning may be made an error

    def member(self, param: int) -> Member | None:
        """The member whose parameter has this id."""
        return self._by_id.get(param)

    def collect(
        self, early: Container[int], problem: Exception | None
    ) -> Generator[list[Collective], None, Exception | None]:
        """Bring every item its parameter and its gradient as they are now. Yields the reductions
        that gradients need.

        Args:
            early: parameters, by id, whose items have their gradient already.
            problem: why this rank cannot take the step, if it cannot.

        Returns:
            The problem, or the first that was met here.
        """
        try:
            flat.follow(self._pieces)
        except ValueError as error:
            problem = problem or error
        settled = yield from gradients.settle(self.bound)
        sums, means, self._brought = settled.sums, settled.means, []
        waiting = []
        for member in self.members:
            if id(member.param) in early:
                member.item.param.present = member.binding.present
            else:
                waiting.append(member)
        steady = None if sums or means else steady_gradients(waiting)
        for i, member in enumerate(waiting):
            if steady is not None and (grad := steady[i]) is not None:
                member.take(grad)
                continue
            binding, param, item = member.binding, member.param, member.item
            before, key = item.param, id(param)
            try:
                known = before if member.sound else None
                brought = plain.collect(binding, param, sums.get(key), known, item.state)
                member.sound = True
            except ValueError as error:
                problem = problem or error
                brought = plain.absent(binding, param)
                member.sound = False
            if brought is not before:
                item.param = brought
                self._brought.append(member)
            if key in means:
                brought.grad = means[key]
        return problem

    def publish(self) -> None:
        """Bring the parameters their new values, where they are not there already, and the next
        pass to use them.
        """
        for member in self._brought:  # the values of all others are views of their parameters
            plain.publish(member.item.param, member.param)
        for release in self._releases:
            release()


def _states(
    state: MutableMapping[Tensor, Any], held: Sequence[Tensor]
) -> tuple[list[int], list[int]]:
    """The ids of all parameters that have state and of their state tensors; and where `held` lie
    in memory.
    """
    filled = [(param, its) for param, its in state.items() if its]
    tensors = chain.from_iterable([its.values() for _, its in filled])
    return [id(param) for param, _ in filled] + [*map(id, tensors)], plain.memory_of(held)
