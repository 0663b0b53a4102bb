"""The engine over the parameters that take part in steps. Brings items their gradients, and
parameters their new values where those could not be written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm import Collective
from ..core.pieces import ShardBinding
from ..core.rule import Batch, Item, LearnedRule
from ..layouts import flat, gradients, plain
from ..layouts.gathered import releases_of
from .engine import Clip, Engine, Nonfinite
from .parameters import Groups, Parameters


@dataclass(slots=True, eq=False)
class Member:
    """A parameter in the line-up: item number `place` of `batch`."""

    binding: ShardBinding
    param: Tensor
    item: Item
    batch: Batch
    place: int


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
        self.members: list[Member] = []
        self.batches: list[Batch] = []
        self.bound: list[tuple[ShardBinding, Tensor]] = []
        self._parameters, self._clip, self._nonfinite = parameters, clip, nonfinite
        self._by_id: dict[int, Member] = {}
        self._groups: Groups = []
        self._bindings: dict[Tensor, ShardBinding] = {}
        self._key: list[tuple[int, int]] = []
        self._releases: list[Callable[[], None]] = []
        self._pieces: list[flat.FlatPiece] = []
        self._held: list[Tensor] = []  # so that no other tensor gets the id of one in the key

    def ready(self, groups: Groups, state: MutableMapping[Tensor, Any], enter: bool) -> Engine:
        """The engine over the parameters there are now; their state is made where there is none.

        Args:
            enter: see `Parameters.taking_part`.

        Raises:
            ValueError: parameters on several devices, for a rule that couples all of them.
        """
        taking_part = self._parameters.taking_part(groups, state, enter)
        params = [param for param, _ in taking_part]
        described = self._parameters.bindings
        same = self._bindings is described and [*map(id, self._groups)] == [*map(id, groups)]
        if self.engine is not None and same and _key(params, state) == self._key:
            return self.engine
        self.retire()
        by_device: dict[torch.device, list[tuple[Tensor, Item]]] = {}
        for param, group in taking_part:
            binding, fields = described[param], self._parameters.fields[param]
            if not state[param]:
                state[param] = self._parameters.new_state(param)
            local = {
                name: fields[name].flat(plain.local_tensor(tensor))
                for name, tensor in state[param].items()
            }
            dims = self.rule.dims(binding.shard.shape)
            item = Item(plain.without_gradient(binding, param), local, group, dims)
            by_device.setdefault(param.device, []).append((param, item))
        if self.rule.needs_loss and len(by_device) > 1:
            raise ValueError(
                f"{self._parameters.kind} couples all tensors; they are on "
                f"{[str(d) for d in by_device]}, wanted one device"
            )
        for device, entries in by_device.items():
            batch = Batch.of([item for _, item in entries], groups, device)
            self.batches.append(batch)
            for place, (param, item) in enumerate(entries):
                self._by_id[id(param)] = Member(described[param], param, item, batch, place)
        self.members = [self._by_id[id(param)] for param in params]
        self.bound = [(member.binding, member.param) for member in self.members]
        self._groups, self._bindings = list(groups), described
        self._releases = releases_of(params)
        self._pieces = [param for param in params if isinstance(param, flat.FlatPiece)]
        self._key = _key(params, state)
        self._held = [tensor for param in params for tensor in state[param].values()]
        self.engine = Engine(
            [(self.rule, batch) for batch in self.batches], self._nonfinite, self._clip
        )
        return self.engine

    def retire(self) -> None:
        """Give up the engine, and with it the memory that only it holds."""
        retired, self.engine = self.engine, None
        self.members, self.batches, self.bound = [], [], []
        self._by_id, self._groups, self._bindings, self._key, self._held = {}, [], {}, [], []
        if retired is not None:
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
        flat.follow(self._pieces)
        settled = yield from gradients.settle(self.bound)
        for member in self.members:
            binding, param, item = member.binding, member.param, member.item
            if id(param) in early:
                item.param.present = binding.present
                continue
            try:
                item.param = plain.collect(
                    binding, param, settled.sums.get(id(param)), item.param, item.state
                )
            except ValueError as error:
                problem = problem or error
                item.param = plain.absent(binding, param)
            item.param.grad = settled.means.get(id(param), item.param.grad)
        return problem

    def publish(self) -> None:
        """Bring the parameters their new values, where they are not there already, and the next
        pass to use them.
        """
        for member in self.members:
            plain.publish(member.item.param, member.param)
        for release in self._releases:
            release()


def _key(params: list[Tensor], state: MutableMapping[Tensor, Any]) -> list[tuple[int, int]]:
    """What an engine is built on: parameters, and their state with its memory, which callers may
    have replaced.
    """
    key = [(id(param), 0) for param in params]
    for param in params:
        key += [
            (id(tensor), plain.local_tensor(tensor).data_ptr())
            for tensor in state.get(param, {}).values()
        ]
    return key
