"""What a parameter group and a constructor may say: checks of single settings. Reads only."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

REFUSED = ("foreach", "fused", "capturable", "differentiable", "maximize")  # modes of torch's own


def choose(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: wanted one of {', '.join(map(repr, choices))}")


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a setting that cannot be served, of those that most learned optimizers
    share.
    """
    for key in REFUSED:
        if group.get(key):
            raise ValueError(
                f"{key}=True in a parameter group: learned optimizers have no such mode; leave "
                "it out"
            )
    for key in ("lr", "weight_decay", "exp_mult", "step_mult"):
        value = group.get(key, 0.0)
        number = float(value) if isinstance(value, Tensor) and value.dim() == 0 else value
        if not (isinstance(number, (int, float)) and 0.0 <= number < math.inf):
            raise ValueError(f"{key}={value!r}: wanted a finite number >= 0")
    limit = group.get("max_grad_norm")
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0.0):
        raise ValueError(f"max_grad_norm={limit!r}: wanted a number > 0, or None for no clipping")
