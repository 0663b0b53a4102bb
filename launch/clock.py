"""Times what a device does, without stalling it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks on a device's own time line, so that timing a GPU does not stall it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; waits for the second."""
        if not self._cuda:
            return 1e3 * float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end))
