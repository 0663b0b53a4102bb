"""What only the first steps can tell of an optimizer that was built apart from its model or from
the other ranks. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.pieces import ShardBinding
from ..layouts import construction, dtensor
from .parameters import Parameters


class FirstSteps:
    """Guards of an optimizer whose tensors are shared with no other rank.

    Args:
        looks: in how many steps it asks whether other ranks wait for this one.
    """

    def __init__(self, looks: int = construction.LOOKS) -> None:
        self._looks = looks
        self._had_gradients = False

    def check(
        self,
        parameters: Parameters,
        bound: Sequence[tuple[ShardBinding, Tensor]],
        problem: Exception | None,
        asks: bool,
    ) -> Exception | None:
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
        if not self._had_gradients:
            self._had_gradients = any(param.grad is not None for _, param in bound)
            if not self._had_gradients and problem is None:
                return dtensor.left_behind([(binding.shard.fqn, param) for binding, param in bound])
        return problem
