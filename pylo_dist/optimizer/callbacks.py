"""Users' code that a step calls: what it raises on one rank alone reaches all. Calls it, and
touches nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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


class Closures:
    """Evaluates the closures of one optimizer.

    What a closure sends in the groups of the step's sums (FSDP2 sends its gradients there), one
    that failed on this rank may not have sent: the step's sums would be taken for it. It has where
    it sent as much as the closure before it did.
    """

    def __init__(self) -> None:
        self._usual: list[int] | None = None

    def evaluate(
        self, closure: Callable[[], Any], groups: Sequence[Any]
    ) -> tuple[Any, Exception | None]:
        """As `evaluate`; raises what the closure raises where the other ranks cannot be told.

        Args:
            groups: those in which the step will send.
        """
        before = [comm.sent(group) for group in groups]
        loss, problem = evaluate(closure)
        now = [comm.sent(group) - then for group, then in zip(groups, before, strict=True)]
        if problem is None:
            self._usual = now
        elif not groups or now != self._usual:
            raise problem
        return loss, problem


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
