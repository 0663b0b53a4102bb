"""Streams and events of an accelerator, whichever it is; on a CPU nothing is queued, and on meta
tensors nothing is done. Touches no tensor.
"""

from __future__ import annotations

import torch


def stream_of(device: torch.device) -> torch.Stream | None:
    """On which work for a device is queued now; None for a CPU."""
    if device.type in ("cpu", "meta"):
        return None
    return torch.accelerator.current_stream(device)


def new_stream(device: torch.device) -> torch.Stream | None:
    """A further one on which work for a device can be queued; None for a CPU."""
    return None if stream_of(device) is None else torch.Stream(device)


def event_behind(device: torch.device) -> torch.Event | None:
    """An event behind all that is queued for a device now; None for a CPU."""
    stream = stream_of(device)
    return None if stream is None else stream.record_event()


def initialized_index() -> int | None:
    """The index of the process's current accelerator; None where none is in use yet."""
    accelerator = torch.accelerator.current_accelerator()
    module = None if accelerator is None else torch.get_device_module(accelerator)
    if not getattr(module, "is_initialized", bool)():
        return None
    return torch.accelerator.current_device_index()
