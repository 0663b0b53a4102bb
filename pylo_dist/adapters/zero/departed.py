"""Gradients that have left for the other ranks, and whether those on the parameters are still what
these got. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.pieces import raw_grad
from .buckets import BucketParam
from .freed import FreedGradient
from .others import LateAnswer, maxima

_NEVER_LEFT = (None, 0, None)  # of a gradient that stands nowhere


class Departed:
    """What is known of the gradients that have left.

    Attributes:
        standing: parameters, by id, whose gradient was freed as it left, and on which something
            should stand for it.
    """

    def __init__(self) -> None:
        self.standing: set[int] = set()
        # id(parameter) -> the gradient that left, its version and its largest number then
        self._left: dict[int, tuple[Tensor, int, Tensor | None]] = {}
        self._late = LateAnswer()

    def forget(self) -> None:
        """Nothing has left."""
        self._left.clear()
        self.standing.clear()

    def note(self, param: Tensor, grad: Tensor | None, largest: Tensor | None) -> None:
        """A parameter's gradient leaves and stays there, or there is none.

        Args:
            largest: its maximum, 0-d, to compare with later; None: nothing to compare, or nothing
                yet.
        """
        if grad is None:
            self._left.pop(id(param), None)
        else:
            self._left[id(param)] = grad, grad._version, largest

    def note_parts(self, param: Tensor, largest: Sequence[Tensor]) -> None:
        """Of parts of a gradient that has left, the maximum of each, 0-d."""
        grad, version, before = self._left[id(param)]
        parts = largest if before is None else (before, *largest)
        of_all = parts[0] if len(parts) == 1 else torch.stack([*parts]).amax()
        self._left[id(param)] = grad, version, of_all

    def is_other(self, param: Tensor) -> bool:
        """Whether something happened to a parameter's gradient after it had been reduced, and would
        be lost. Asked of every parameter in every step.
        """
        grad = raw_grad(param)
        if type(grad) is FreedGradient:
            return False
        left, version, _ = self._left.get(id(param), _NEVER_LEFT)
        if grad is None:
            return left is not None or id(param) in self.standing
        return grad is not left or grad._version != version

    def changed_unseen(self, members: Sequence[BucketParam]) -> BucketParam | None:
        """One whose gradient is another than the one that left, by what raises no version counter,
        such as a collective; on a GPU the answer comes with the next question.
        """
        found: BucketParam | None = self._late.ask(*self._compared(members))
        return found

    @torch.no_grad()
    def _compared(self, members: Sequence[BucketParam]) -> tuple[list[BucketParam], list[Tensor]]:
        """Members whose gradient may be another one, and per dtype and device, in their order,
        whether it is (bool).
        """
        kinds: dict[Any, list[tuple[BucketParam, Tensor, Tensor]]] = {}
        for member in members:
            grad, _, mark = self._left.get(id(member.param), _NEVER_LEFT)
            if grad is not None and mark is not None:
                kind = grad.dtype, mark.dtype, mark.device
                kinds.setdefault(kind, []).append((member, grad, mark))
        flags = []
        for some in kinds.values():
            now = torch.stack(maxima([grad for _, grad, _ in some]))
            then = torch.stack([mark for _, _, mark in some])
            flags.append((now != then) & ~(now.isnan() & then.isnan()))
        return [member for some in kinds.values() for member, _, _ in some], flags
