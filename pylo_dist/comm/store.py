"""The store that the ranks of a world share, of which every call ends. Starts threads; writes the
keys it is told to.

A call of torch's TCP client waits without end where the process that keeps the store stands still,
whatever timeout the client has. So another thread makes it, and the caller waits as long as it may;
a thread whose call never returns is left behind, and keeps no process from ending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..core.devices import initialized_index

T = TypeVar("T")


class StoreError(RuntimeError):
    """The store did not answer in time, or is gone."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call()`, which may wait for the store, made by another thread.

    Raises:
        StoreError: it took longer.
    """
    done = threading.Event()
    result: list[T] = []
    problem: list[BaseException] = []
    device = initialized_index()

    def work() -> None:
        try:
            if device is not None:  # a thread begins with the first one
                torch.accelerator.set_device_index(device)
            result.append(call())
        except BaseException as error:
            problem.append(error)
        done.set()

    threading.Thread(target=work, name="pylo_dist store", daemon=True).start()
    if not done.wait(max(0.0, seconds)):
        raise StoreError(
            "the store of the process group does not answer: the process that keeps it (rank 0, or "
            "the launcher) stands still or cannot be reached"
        )
    if problem:
        raise problem[0]
    return result[0]


class Store:
    """The store of the world, for calls that have all returned in `seconds` from now on.

    Raises:
        StoreError: by every method, where the store does not answer by then, or is gone.
    """

    def __init__(self, seconds: float) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._until = time.monotonic() + seconds

    def _ask(self, name: str, *arguments: Any) -> Any:
        call = getattr(self._store, name)
        try:
            return within(self._until - time.monotonic(), lambda: call(*arguments))
        except StoreError:
            raise
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StoreError(f"the store of the process group is gone: {first}") from error

    def set(self, key: str, value: str) -> None:
        self._ask("set", key, value)

    def get(self, key: str) -> str:
        return str(self._ask("get", key).decode())

    def append(self, key: str, rank: int) -> None:
        """Put a rank at the end of the list that stands there."""
        self._ask("append", key, f"{rank},")

    def ranks(self, key: str) -> list[int]:
        """The list that stands there, of which one has been put there."""
        return [int(rank) for rank in self.get(key).split(",")[:-1]]

    def add(self, key: str, more: int) -> int:
        return int(self._ask("add", key, more))

    def has(self, key: str) -> bool:
        return bool(self._ask("check", [key]))

    def first(self, key: str, value: str) -> str:
        """What stands there; `value` from now on, if nothing does."""
        return str(self._ask("compare_set", key, "", value).decode())
