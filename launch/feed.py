"""Samples of a rank, read ahead of the steps by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt
from data import Tokens

Windows = npt.NDArray[np.int64]
AHEAD = 2  # steps


class Feed:
    """The windows of each step in turn, in micro-batches. A context: its thread ends with the
    block.

    Raises from `next` what reading raised, such as the ValueError that names a damaged file.
    """

    def __init__(
        self, tokens: Tokens, places: Callable[[int], Windows], rows: Sequence[slice], steps: range
    ) -> None:
        """`places`: of the global batch of a step; `rows`: this rank's part of it, one slice per
        micro-batch.
        """
        self._read: queue.Queue[list[Windows] | Exception] = queue.Queue(AHEAD)
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(tokens, places, rows, steps), name="feed", daemon=True
        )

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            self.drop()
            self._thread.join(0.01)

    def next(self) -> list[Windows]:
        """Of the next step the micro-batches, (sequences, tokens + 1) each."""
        found = self._read.get()
        if isinstance(found, Exception):
            raise found
        return found

    def drop(self) -> None:
        """Forget what has been read ahead."""
        while True:
            try:
                self._read.get_nowait()
            except queue.Empty:
                return

    def _work(
        self, tokens: Tokens, places: Callable[[int], Windows], rows: Sequence[slice], steps: range
    ) -> None:
        for step in steps:
            if self._over.is_set():
                return
            try:
                samples = places(step)
                found: list[Windows] | Exception = [tokens.read(samples[part]) for part in rows]
            except Exception as error:  # raised in the training loop instead
                found = error
            self._read.put(found)
            if isinstance(found, Exception):
                return
