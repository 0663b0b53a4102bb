"""Work that is queued beside what a model computes: a further stream per device, and who waits for
whom. Touches no tensor.

The stream of the model waits at `join` alone. What is queued aside waits, whenever it is begun, for
all that was queued before: for what it reads, and for whoever last used memory that was allocated
aside, given back since, and is used again now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...core.devices import new_stream, stream_of
from ...core.rule import is_capturing


class Aside:
    """Streams beside those of now, one per device; on a CPU there is none.

    Args:
        apart: whether to have any; without, work is queued on the stream of now.
    """

    def __init__(self, apart: bool) -> None:
        self._apart = apart
        self._streams: dict[torch.device, torch.Stream] = {}
        # devices on whose streams there is work since `join`, with the streams that made it ready
        self._begun: dict[torch.device, set[torch.Stream]] = {}
        # what is read aside, until the event behind the reading
        self._held: deque[tuple[torch.device, torch.Event, Sequence[Tensor | None]]] = deque()

    def is_apart(self, device: torch.device) -> bool:
        """Whether work for a device is queued on a stream that nobody waits for before `join`."""
        return self._apart and stream_of(device) is not None

    @contextmanager
    def behind(
        self,
        device: torch.device,
        others: Iterable[torch.Stream] = (),
        read: Sequence[Tensor | None] = (),
    ) -> Iterator[None]:
        """Inside, work for a device is queued aside, behind all that is queued for it now. Not to
        be entered twice at a time.

        Args:
            others: streams to wait for, too.
            read: what is read inside; it stays in memory until that is done, whoever gives it up
                meanwhile.
        """
        now = stream_of(device)
        if now is None:
            yield
            return
        stream = self._stream(device) if self._apart else now
        waited = {now, *others} - {stream}
        for other in waited:
            stream.wait_stream(other)
        if not self._apart:
            if waited:  # they do not join, and would use memory again that was given up
                for tensor in read:
                    if tensor is not None and tensor.layout is torch.strided:
                        tensor.record_stream(stream)
            yield
            return
        self._begun.setdefault(device, set()).update(waited)
        try:
            with stream:
                yield
        finally:
            if read:
                self._held.append((device, stream.record_event(), read))

    def let_go(self, most: int | None = None) -> None:
        """Give up what has been read, in the order in which it was queued.

        Args:
            most: of how many `behind` something may be left; the host waits for the others, but in
                the capture of a CUDA graph, in which it can ask for nothing. None: of any number.
        """
        while self._held:
            device, event, _ = self._held[0]
            if is_capturing(device):
                return
            if most is not None and len(self._held) > most:
                event.synchronize()
            elif not event.query():
                return
            self._held.popleft()

    def _stream(self, device: torch.device) -> torch.Stream:
        if device not in self._streams:
            stream = new_stream(device)
            assert stream is not None, "a device has streams or has none"
            self._streams[device] = stream
        return self._streams[device]

    def join(self) -> None:
        """What is queued from here on comes behind all that was queued aside, on the stream of now
        and on those that were waited for.
        """
        begun, self._begun = self._begun, {}
        for device, waited in begun.items():
            stream, now = self._streams[device], stream_of(device)
            for other in waited if now is None else {now, *waited}:
                other.wait_stream(stream)
        self._held.clear()
