"""Faces whose rule knows the length of the run: checks, another length, a warning at its end."""

from __future__ import annotations

import warnings
from typing import Any

from ..core.rule import is_capturing
from ..maths import reference
from ..optimizer import LearnedOptimizer, checks


class PlannedOptimizer(LearnedOptimizer):
    """A face with `num_steps` in its groups, in front of others that it derives from.

    Attributes:
        after_the_end: how its rule goes on after that, for the warning.
    """

    after_the_end: str
    _steps_called: int | None = None
    _warned_at: int | None = None

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_length(group["num_steps"])
        limit, clamp = group.get("max_grad_norm"), reference.VELO.clamp
        if limit is not None and clamp is not None and limit > clamp:
            raise ValueError(f"max_grad_norm={limit!r}: wanted at most {clamp:g}, or None")

    def warn_of_length(self, num_steps: int, longest: int | None) -> None:
        """Warn at the construction of a face where the run is longer than any in meta-training."""
        if longest is not None and num_steps > longest:
            warnings.warn(
                f"num_steps={num_steps}: {type(self).__name__} was meta-trained on runs of up to "
                f"{longest} steps",
                stacklevel=3,
            )

    def extend(self, num_steps: int) -> None:
        """Give the run another length, e.g. to go on after its end; call it alike on all ranks.

        Args:
            num_steps: the new length in steps, counted from the start.
        """
        _check_length(num_steps)
        for group in self.param_groups:
            group["num_steps"] = num_steps

    def phases(self) -> Any:
        # on a GPU the count is read back once; after that calls are counted on the host, steps not
        # taken among them, but not what a CUDA graph replays
        group = self.param_groups[0]
        if is_capturing(group["step"].device):
            return super().phases()
        if self._steps_called is None or group["step"].device.type == "cpu":
            self._steps_called = int(group["step"])
        num_steps = group["num_steps"]
        is_over = isinstance(num_steps, int) and self._steps_called >= num_steps
        if is_over and self._warned_at != num_steps:
            self._warned_at = num_steps
            warnings.warn(
                f"{type(self).__name__} has taken all num_steps={num_steps} steps it was told of; "
                f"it goes on {self.after_the_end}. extend(num_steps) makes the run longer",
                stacklevel=3,
            )
        self._steps_called += 1
        return super().phases()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steps_called = None


class SingleRunOptimizer(PlannedOptimizer):
    """One whose rule has a single schedule for the run, and so one length in all groups."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for i, other in enumerate(self.param_groups):
            if other.get("num_steps", group["num_steps"]) != group["num_steps"]:
                raise ValueError(
                    f"num_steps={group['num_steps']} beside num_steps={other['num_steps']} in "
                    f"parameter group {i}: wanted the same in all, since {type(self).__name__} has "
                    "one schedule for the run; extend(num_steps) sets it in all"
                )


def _check_length(num_steps: Any) -> None:
    checks.whole("num_steps", num_steps, "the length of the run, an int >= 2", 2)
