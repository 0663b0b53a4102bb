"""Numbers of the host that come from another library, such as numpy, as Python's own."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

_OWN = frozenset((float, int, bool, str, type(None)))


def as_python(value: Any) -> Any:
    """An int or float in place of a number of another library; anything else as it is.

    numpy computes with float32 where one of its float32 meets a Python number, and what it has
    pickled is not read again by `torch.load(weights_only=True)`.
    """
    if type(value) in _OWN:
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def with_python_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with `as_python` of every value."""
    return {key: as_python(value) for key, value in values.items()}
