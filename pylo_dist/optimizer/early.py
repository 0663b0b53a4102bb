"""Gradients that arrive before the step: what it reads of them alone is computed at once, where the
rule has a use for that. Writes no parameter and no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..core.pieces import raw_grad
from ..core.rule import LearnedRule
from ..layouts import plain
from .lineup import Lineup, Member


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
        # id(parameter) -> the gradient that was read, and its version then
        self._read: dict[int, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def arrived(self, params: Iterable[Tensor]) -> None:
        """The gradients of these parameters are there; those that were there before are others
        now. What is no parameter of the optimizer is passed over.
        """
        rule = self._lineup.rule
        if type(rule).gradient_pass is LearnedRule.gradient_pass:
            return  # all is left to the step
        if self._lineup.engine is None:
            try:
                self._ready()
            except ValueError:  # the step will say it
                return
        arrived: dict[int, dict[int, Member]] = {}
        found: dict[int, tuple[Tensor, int]] = {}
        for param in params:
            member = self._lineup.member(id(param))
            if member is None:
                continue
            if member.place in member.batch.summed:
                rule.forget_gradient(member.batch, member.place)
            grad = _bring(member)
            if grad is not None:
                arrived.setdefault(id(member.batch), {})[member.place] = member
                found[id(param)] = grad, grad._version
        for members in arrived.values():
            batch = next(iter(members.values())).batch
            rule.gradient_pass(batch, list(members))
            for place, member in members.items():
                if place in batch.summed:
                    self._read[id(member.param)] = found[id(member.param)]
                else:  # the rule leaves it to the step
                    member.item.param.grad = None

    def taken(self) -> set[int]:
        """Parameters, by id, of whose gradient the coming step has all it needs; those whose
        gradient or memory is another one by now are forgotten. Asked once a step.
        """
        read, self._read = self._read, {}
        taken = set()
        for key, (grad, version) in read.items():
            member = self._lineup.member(key)
            if member is None or member.place not in member.batch.summed:  # of another engine
                continue
            unchanged = raw_grad(member.param) is grad and grad._version == version
            if unchanged and _is_view(member):
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


def _is_view(member: Member) -> bool:
    """Whether the item's values lie in the parameter's memory: a copy may be out of date by the
    step.
    """
    return member.item.param.value.data_ptr() == plain.local_tensor(member.param).data_ptr()
