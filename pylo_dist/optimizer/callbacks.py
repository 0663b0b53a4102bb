"""Users' code that a step calls: what it raises on one rank alone reaches all. Calls it, and
touches nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

from .. import comm

P = ParamSpec("P")
R = TypeVar("R")


def evaluate(closure: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The loss that a closure returns, or what it raises; a lost rank is raised at once."""
    try:
        with torch.enable_grad():
            return closure(), None
    except comm.CommunicationError:
        raise
    except Exception as error:
        return None, error


def with_hooks(func: Callable[P, R]) -> Callable[P, R]:
    """`func`, the `step` of an optimizer, with the hooks that torch calls around it.

    What a hook before the step raises, the step raises, so that the other ranks do not wait for
    this one (see `LearnedOptimizer.fail_next_step`); but not where they may be in collectives of a
    closure, which this one has not sent.
    """

    step: Callable[..., R] = func

    @functools.wraps(step)
    def entered(optimizer: Any, *args: Any, **kwargs: Any) -> R:
        optimizer.__dict__["_step_entered"] = True
        return step(optimizer, *args, **kwargs)

    hooked: Callable[..., R] = torch.optim.Optimizer.profile_hook_step(entered)

    @functools.wraps(step)
    @_disable_dynamo
    def with_errors_told(optimizer: Any, *args: Any, **kwargs: Any) -> R:
        optimizer.__dict__["_step_entered"] = False
        try:
            return hooked(optimizer, *args, **kwargs)
        except Exception as error:
            given = args[0] if args else kwargs.get("closure")
            if not optimizer._step_entered and (optimizer.closures_apart or not callable(given)):
                optimizer.fail_next_step(error)
                step(optimizer)
            raise

    return cast("Callable[P, R]", with_errors_told)
