"""What the faces of all rules do with their arguments: check them, read them, hand them on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from ..maths.factored import FactoredRule
from ..optimizer import LearnedOptimizer, StateDtype, checks
from ..optimizer.engine import Clip, Nonfinite
from ..weights import MetaNetwork

Precision = Literal["highest", "high", "medium"]
checked_numbers = checks.numbers


def checked_decays(
    momentum: Sequence[float], rms: Sequence[float], adafactor: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """The initial decays of the three accumulators as floats. Raises ValueError naming the
    argument.
    """
    return (
        decays("initial_momentum_decays", momentum, 3),
        decays("initial_rms_decays", rms, 1),
        decays("initial_adafactor_decays", adafactor, 3),
    )


def norm_bound(clip_grad: bool, clip_norm: float, clamp: float = math.inf) -> float | None:
    """`max_grad_norm` of PyLO's two arguments. Raises ValueError naming the argument.

    Args:
        clamp: what elements of a gradient are clamped to anyway, grad_clip_val.
    """
    if not checks.switch("clip_grad", clip_grad):
        clamp = math.inf  # the other is not used
    wanted = "a number > 0" + (f", at most grad_clip_val={clamp:g}" if clamp < math.inf else "")
    bound = checks.number("clip_norm", clip_norm, wanted, most=clamp, above=True)
    return bound if clip_grad else None


def decays(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    """`values` as floats. Raises ValueError unless they are `count` decays in [0, 1)."""
    return checked_numbers(name, values, count, f"number{'s' * (count > 1)} in [0, 1)", 0.0, 1.0)


def check_precision(precision: Precision) -> Precision:
    """`precision` itself. Raises ValueError for none of the three."""
    checks.choose("precision", precision, ("highest", "high", "medium"))
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
        state_dtype: StateDtype,
        state_seed: int,
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
            state_dtype=state_dtype,
            state_seed=state_seed,
        )
