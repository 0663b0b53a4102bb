"""Where a step is, by name, for whoever measures it. Touches nothing; what nobody observes costs a
comparison.

    class Watch:
        def begin(self, name, buffer): ...   # buffer: see below, else None
        def end(self, name): ...

    with trace.observe(Watch()):
        loss.backward()
        optimizer.step()

Phases may lie within each other; each ends in the order in which they began, also by an error. Of
an optimizer, in the order of a step:

    step: A                     what a rule computes before its first request
    step: judge                 from the sums: whether there is a step, which tensors move, how far
    step: B                     what a rule computes before its second request
    step: C, D, ...             ... and after it, and after each further one; within C
    step: prepare               what depends on no element of a tensor (VeLO's LSTM)
    sums: wait                  after each: until the sums over ranks, or the tensors, are there
    kernels: gradient_pass      a compiled pass; within A, or early
    kernels: moment_pass        ... within B
    kernels: feature_pass       ... within B
    kernels: update_pass        ... within C
    kernels: square_sums        of what AdamW moves, within A
    kernels: adamw_pass         ... within the last of the rule's passes, or B

of `ZeroOptimizer`, around and beside them:

    reduce: launch              a bucket's gradients are packed and leave
    reduce: land                ... have arrived and become those of the pieces; within it
    reduce: wait                until those of the other ranks are there
    step: early                 what A reads of the gradients of a bucket that has arrived; on GPUs
    step: inner                 the step of the optimizer over the pieces
    gather: start               updated parameters leave
    gather: wait                until those of a bucket are there

and of collectives, `buffer` being the tensor that holds all ranks' parts:

    collective: all_reduce
    collective: reduce_scatter
    collective: all_gather
    collective: all_to_all      each begins with the call, ends when it is on its way
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, Protocol, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Observer(Protocol):
    """Whoever measures: is told of every phase as it begins and ends, by the thread that runs it.

    It must change nothing, and raise nothing.
    """

    def begin(self, name: str, buffer: Tensor | None) -> None: ...

    def end(self, name: str) -> None: ...


_observer: Observer | None = None


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Inside, `observer` is told of the phases of this process, and it alone."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


class _Unobserved:
    """A phase of which nobody is told; there is one."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


class _Phase:
    __slots__ = ("_buffer", "_name", "_observer")

    def __init__(self, observer: Observer, name: str, buffer: Tensor | None) -> None:
        self._observer, self._name, self._buffer = observer, name, buffer

    def __enter__(self) -> None:
        self._observer.begin(self._name, self._buffer)

    def __exit__(self, *error: object) -> None:
        self._observer.end(self._name)


_UNOBSERVED = _Unobserved()


def phase(name: str, buffer: Tensor | None = None) -> _Phase | _Unobserved:
    """What runs in this context is phase `name`, one of those above."""
    return _UNOBSERVED if _observer is None else _Phase(_observer, name, buffer)


def phased(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: calls of the function are phase `name`."""

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _observer is None:
                return function(*args, **kwargs)
            with phase(name):
                return function(*args, **kwargs)

        return call

    return mark
