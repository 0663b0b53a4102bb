"""What only the first steps can tell of an optimizer that was built apart from its model or from
the other ranks, and the first gradient of a parameter. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import comm
from ..core.pieces import ShardBinding
from ..layouts import construction, ddp, dtensor
from .parameters import Parameters


class FirstSteps:
    """Guards of an optimizer whose tensors are shared with no other rank.

    Args:
        looks: in how many steps it asks whether other ranks wait for this one.
    """

    def __init__(self, looks: int = construction.LOOKS) -> None:
        self._looks = looks
        self._seen: set[int] = set()  # parameters that have had a gradient, by id

    def check(
        self,
        parameters: Parameters,
        bound: Sequence[tuple[ShardBinding, Tensor]],
        problem: ValueError | None,
        asks: bool,
    ) -> ValueError | None:
        """Look at a step that is about to be taken.

        Args:
            bound: the parameters that take part in it.
            problem: why this rank cannot take the step, if it cannot.
            asks: whether others may wait for this rank at all.

        Returns:
            The problem, or what is found here.

        Raises:
            ValueError: other ranks wait for this one to build what it has built, but of DTensors.
        """
        if self._looks and asks:
            self._looks -= 1
            construction.check_alone(parameters.bindings, parameters.kind)
        first = [
            (binding.shard.fqn, param)
            for binding, param in bound
            if param.grad is not None and id(param) not in self._seen
        ]
        if not (first or self._seen) and problem is None:
            return dtensor.left_behind([(binding.shard.fqn, param) for binding, param in bound])
        if first and comm.size(comm.default_group()) > 1:
            problem = problem or ddp.left_out(first)
        if problem is None:
            self._seen.update(id(param) for _, param in first)
        return problem
