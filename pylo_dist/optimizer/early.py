"""Gradients that arrive before the step: what it reads of them alone is computed at once, where the
rule has a use for that. Writes no parameter and no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..core.devices import stream_of
from ..core.pieces import raw_grad
from ..core.rule import LearnedRule
from ..layouts import plain
from .lineup import Lineup, Member, steady_gradients


class EarlyPass:
    """For adapters whose gradients arrive bit by bit.

    Whatever it is not told the step reads by itself, and it reads a gradient again if its version
    counter shows a change. What leaves no trace there (torch's GradScaler) needs `forget`.

    Args:
        lineup: the parameters that gradients may be of.
        ready: makes it, where there is none yet.
    """

    def __init__(self, lineup: Lineup, ready: Callable[[], object]) -> None:
        self._lineup, self._ready = lineup, ready
        # id(parameter) -> its member, the gradient that was read, and the version of that then
        self._read: dict[int, tuple[Member, Tensor, int]] = {}

    @torch.no_grad()
    def arrived(self, params: Iterable[Tensor]) -> None:
        """The gradients of these parameters are there; those that were there before are others
        now. What is no parameter of the optimizer is passed over.

        On a GPU gradients may arrive on another stream than that of the step, on which nothing is
        made that outlives steps; so all of the first one is left to it.
        """
        rule = self._lineup.rule
        if type(rule).gradient_pass is LearnedRule.gradient_pass:
            return  # all is left to the step
        params, engine = [*params], self._lineup.engine
        queued = any(stream_of(param.device) is not None for param in params)
        if queued and (engine is None or not engine.begun):
            return
        if engine is None:
            try:
                self._ready()
            except ValueError:  # the step will say it
                return
        known = map(self._lineup.member, map(id, params))
        members = [*dict.fromkeys(member for member in known if member is not None)]
        for member in members:
            if member.place in member.batch.summed:
                rule.forget_gradient(member.batch, member.place)
        for batch in self._lineup.batches:
            mine = [member for member in members if member.batch is batch]
            found = [*zip(mine, _brought(mine), strict=True)]
            arrived = [(member, grad) for member, grad in found if grad is not None]
            if not arrived:
                continue
            rule.gradient_pass(batch, [member.place for member, _ in arrived])
            for member, grad in arrived:
                if member.place in batch.summed:
                    self._read[id(member.param)] = member, grad, grad._version
                else:  # the rule leaves it to the step
                    member.item.param.grad = None

    def taken(self) -> set[int]:
        """Parameters, by id, of whose gradient the coming step has all it needs; those whose
        gradient or memory is another one by now are forgotten. Asked once a step.
        """
        read, self._read = self._read, {}
        read = {
            key: entry
            for key, entry in read.items()
            if entry[0].place in entry[0].batch.summed and self._lineup.member(key) is entry[0]
        }  # the others are of another engine
        # a copy of the parameter, in place of a view, may be out of date by now
        places = plain.memory_of([member.param for member, _, _ in read.values()])
        views = [member.item.param.value.data_ptr() for member, _, _ in read.values()]
        taken = set()
        for (key, (member, grad, version)), place, view in zip(
            read.items(), places, views, strict=True
        ):
            if raw_grad(member.param) is grad and grad._version == version and place == view:
                taken.add(key)
            else:
                self._lineup.rule.forget_gradient(member.batch, member.place)
        return taken

    def forget(self) -> None:
        """Drop what was read, and all gradients held for the coming step: it will not be taken, or
        reads them again.
        """
        self._read.clear()
        for batch in self._lineup.batches:
            batch.summed.clear()
            for item in batch.items:
                item.param.grad = None  # it would be in memory until the next step


def _brought(members: Sequence[Member]) -> Sequence[Tensor | None]:
    """Give the items of these members the gradients of their parameters.

    Returns:
        Those gradients, None where the step must look again.
    """
    steady = steady_gradients(members)
    if steady is None or any(member.binding.unreduced for member in members):
        return [*map(_bring, members)]
    for member, grad in zip(members, steady, strict=True):
        if grad is not None:
            member.take(grad)
    return steady


def _bring(member: Member) -> Tensor | None:
    """Give an item the gradient of its parameter.

    Returns:
        That gradient, or None where the step must look again.
    """
    grad, param, item = raw_grad(member.param), member.param, member.item
    if grad is None or member.binding.unreduced or not member.sound:
        return None
    if plain.is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        return None  # the step adds it up, with the other ranks
    try:
        item.param = plain.collect(member.binding, param, None, item.param, item.state)
    except ValueError:  # the step will say it
        return None
    return grad
