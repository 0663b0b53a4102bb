"""What DeepSpeed is told of an optimizer, in its JSON or by an object, as arguments of a face.
Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ... import comm
from ...optimizer import LearnedOptimizer, checks
from ...optimizer.settings import REQUIRED, arguments_of

T = TypeVar("T")
_CLIPPING = (
    'DeepSpeed clips before the optimizer sees a gradient: use "gradient_clipping" of its JSON'
)
# Arguments that would do again what DeepSpeed does, and what to use instead.
_DEEPSPEEDS = {
    "max_grad_norm": _CLIPPING,
    "clip_grad": _CLIPPING,
    "clip_norm": _CLIPPING,
    "clip": _CLIPPING,
    "process_group": "DeepSpeed says which ranks share the data: leave it out",
}


def together(where: str, work: Callable[[], T]) -> T:
    """`work()`, which calls no collective; an error of one rank is raised on all.

    Args:
        where: what the error is about, before its text.
    """

    def named() -> T:
        try:
            return work()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    return comm.together(named, comm.default_group(), ValueError)


def probe(face: type[LearnedOptimizer], given: dict[str, Any]) -> LearnedOptimizer:
    """The face over one number: what is wrong with the arguments or the weights is said before
    anything is built.

    Raises:
        ValueError: an argument that is unknown, missing or cannot be served, by JSON key.
    """
    kwargs = checked_arguments(face, given)
    if "width_mults" in arguments_of(face):
        if kwargs.get("width_mults") is not None:
            checks.positive_by_name("width_mults", kwargs["width_mults"])
        kwargs["width_mults"] = {}  # named parameters, which are not known yet
    return face([("probe", nn.Parameter(torch.zeros(1)))], **kwargs)


def check_groups(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError for a parameter group that asks for clipping of ours."""
    for i, group in enumerate(groups):
        for key in ("max_grad_norm", "clip_grad"):
            if group.get(key):
                raise ValueError(
                    f"parameter group {i} has {key}={group[key]!r}: {_DEEPSPEEDS[key]}"
                )


def _same(value: Any, default: Any) -> bool:
    """Whether an argument is its default; what cannot be compared as one is not."""
    try:
        return bool(value == default)
    except (RuntimeError, TypeError, ValueError):
        return False


def checked_arguments(face: type[LearnedOptimizer], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with our own clipping off. Raises ValueError naming the argument."""
    arguments = arguments_of(face)
    names = set(arguments)
    for key, value in given.items():
        if (
            key in _DEEPSPEEDS
            and key in names | {"max_grad_norm"}
            and not (key == "clip_grad" and value is False)
            and (key == "clip_grad" or not _same(value, arguments.get(key)))
        ):
            raise ValueError(f'"{key}": {checks.shown(value)}: {_DEEPSPEEDS[key]}')
        if key not in names:
            known = ", ".join(sorted(names - set(_DEEPSPEEDS)))
            raise ValueError(f'"{key}" is no parameter of {face.__name__}; wanted some of {known}')
    required = [key for key, x in arguments.items() if x is REQUIRED and key not in given]
    if required:
        meaning = ", the length of the run in steps" if required == ["num_steps"] else ""
        raise ValueError(f'"{required[0]}" is missing{meaning}')
    return {**given, "clip_grad": False} if "clip_grad" in names else dict(given)
