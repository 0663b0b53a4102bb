"""What the faces of all rules do with their arguments: check them, read them, hand them on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..maths.factored import FactoredRule
from ..optimizer import LearnedOptimizer
from ..optimizer.engine import Clip, Nonfinite
from ..weights import MetaNetwork

Precision = Literal["highest", "high", "medium"]


def wide(value: float | Tensor) -> float | Tensor:
    """A hyperparameter that may be a tensor, in float64: its products are then those of a float."""
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def checked_numbers(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    """`values` as floats. Raises ValueError naming the argument unless they are `count` finite
    numbers.
    """
    try:
        numbers = tuple(float(x) for x in values)
    except (TypeError, ValueError):  # not a sequence, or not of numbers
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"{name}={values!r}: wanted {count} finite number{'s' if count > 1 else ''}"
        )
    return numbers


def checked_decays(
    momentum: Sequence[float],
    rms: Sequence[float],
    adafactor: Sequence[float],
    prefix: str = "initial_",
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """The decays of the three accumulators as floats. Raises ValueError naming the argument."""
    return (
        checked_numbers(f"{prefix}momentum_decays", momentum, 3),
        checked_numbers(f"{prefix}rms_decays", rms, 1),
        checked_numbers(f"{prefix}adafactor_decays", adafactor, 3),
    )


def check_precision(precision: Precision) -> Precision:
    """`precision` itself. Raises ValueError for none of the three."""
    if precision not in ("highest", "high", "medium"):
        raise ValueError(f"precision={precision!r}: wanted 'highest', 'high' or 'medium'")
    return precision


class FactoredOptimizer(LearnedOptimizer):
    """The common end of the faces whose rule is a `FactoredRule`: the arguments they all have.

    Args:
        precision: "highest", "high" or "medium", arithmetic of the rule's network in GPU kernels.
        Others: as `LearnedOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        rule: FactoredRule,
        weights: MetaNetwork,
        defaults: dict[str, Any],
        clip: Clip,
        nonfinite: Nonfinite,
        process_group: Any,
        precision: Precision,
    ) -> None:
        self.precision = rule.precision = check_precision(precision)
        super().__init__(
            params,
            rule,
            weights,
            defaults,
            clip=clip,
            nonfinite=nonfinite,
            process_group=process_group,
        )
