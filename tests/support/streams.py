"""Streams of an accelerator that is not there: what is queued on each, who waits for whom, and
whether two streams could touch the same memory in either order.

All work is done at once, on the CPU. What would be a race on a device is found by clocks: every
stream counts its operations, and knows up to which operation of each other stream it has waited.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pylo_dist.adapters.zero import aside, gathering, reduction
from pylo_dist.adapters.zero import optimizer as zero_optimizer
from pylo_dist.optimizer import early

MODULES = (aside, gathering, reduction, early, zero_optimizer)  # that ask for streams


@contextmanager
def early_pass_on_a_cpu() -> Iterator[None]:
    """Inside, a `ZeroOptimizer` is built to read gradients as they arrive, as it does where work is
    queued.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_optimizer, "stream_of", lambda device: device)
        yield


class Event:
    """A place in a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.clock = stream, dict(stream.clock)

    def synchronize(self) -> None:
        self.stream.machine.note(f"waits for {self.stream.name}", "host")
        self.stream.machine.learn(self.stream.machine.host, self.clock)

    def query(self) -> bool:
        """Nothing is done before somebody waits for it."""
        host = self.stream.machine.host
        return all(count <= host.get(name, 0) for name, count in self.clock.items())


class Stream:
    """Attributes:
    clock: by name of a stream, how many of its operations come before the next one of this.
    """

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name, self.device = machine, name, torch.device("cpu")
        self.clock: dict[str, int] = {name: 0}
        self._before: list[Stream] = []

    def wait_event(self, event: Event) -> None:
        self.machine.note(f"waits for {event.stream.name}", self.name)
        self.machine.learn(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(Event(other))

    def record_event(self) -> Event:
        return Event(self)

    def __enter__(self) -> Stream:
        assert not self._before, "torch's streams are not entered twice at a time"
        self._before.append(self.machine.now)
        self.machine.now = self
        return self

    def __exit__(self, *_: Any) -> None:
        self.machine.now = self._before.pop()


class Machine(TorchDispatchMode):
    """The streams there are; inside, every operation is one of the stream of now.

    Attributes:
        now: the stream of now; at first `compute`.
        log: (stream, what) in the order of the host: "waits for ...", compiled passes, and what
            tests note.
        host: of which operations the host knows that they are done, as a clock.
        kept: by memory the streams that read it before it is given to others (`record_stream`).
        races: what was found, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.compute = Stream(self, "compute")
        self.log: list[tuple[str, str]] = []
        self.host: dict[str, int] = {}
        self.kept: dict[int, tuple[str, ...]] = {}
        self.races: list[str] = []
        # by memory: who wrote it last, and who has read it since
        self._written: dict[int, tuple[str, int, str]] = {}
        self._read: dict[int, dict[str, tuple[int, str]]] = {}
        self._alive: dict[int, Any] = {}  # an address given back would be taken for the same memory
        self._numbers = itertools.count()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Have the package see these streams, and a network beside them: sums over ranks are this
        rank's part times the ranks, noted where they begin ("sends b", "adds") and where they are
        waited for ("has b", "has added"), with the number of the bucket.
        """
        for module in MODULES:
            patch.setattr(module, "stream_of", lambda device: self.now)
        patch.setattr(
            aside, "new_stream", lambda device: Stream(self, f"aside {next(self._numbers)}")
        )
        patch.setattr(
            Tensor,
            "record_stream",
            lambda x, stream: self.kept.update({_memory(x): (stream.name,)}),
        )
        network = Stream(self, "network")

        def over_network(what: str, out: Tensor, x: Tensor, group: Any) -> _Pending:
            network.wait_stream(self.now)
            with network:
                torch.mul(x, group.size(), out=out)
            return _Pending(self, what, network.record_event(), x)

        def reduce_scatter(shard: Tensor, full: Tensor, group: Any, what: str, *_: Any) -> _Pending:
            bucket = what.partition("bucket ")[2].split(",")[0]
            self.note(f"sends {bucket}")
            return over_network(f"has {bucket}", shard, full.view(-1, len(shard))[0], group)

        def all_reduce(buffer: Tensor, group: Any, *_: Any) -> _Pending:
            self.note("adds")
            return over_network("has added", buffer, buffer, group)

        patch.setattr(reduction.comm, "reduce_scatter", reduce_scatter)
        patch.setattr(reduction.comm, "all_reduce", all_reduce)

    def learn(self, clock: dict[str, int], other: dict[str, int]) -> None:
        """`clock` (modified in place) comes after `other`, too."""
        for name, count in other.items():
            clock[name] = max(count, clock.get(name, 0))

    def note(self, what: str, stream: str | None = None) -> None:
        """Something is queued on a stream, that of now, or done by "host"."""
        self.log.append((stream or self.now.name, what))

    def given_back(self, tensor: Tensor) -> None:
        """From when nobody holds a tensor any more, its memory may be written on its own stream,
        which is that of now.
        """
        weakref.finalize(tensor, self._give_back, _memory(tensor), self.now)

    def _give_back(self, key: int, home: Stream) -> None:
        for name, (at, op) in self._read.get(key, {}).items():
            known = max(home.clock.get(name, 0), self.host.get(name, 0))
            if name != home.name and at > known and name not in self.kept.get(key, ()):
                self.races.append(f"memory that {op} reads on {name} is given back")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        now, name = self.now, str(func)
        now.clock[now.name] += 1
        if func.namespace == "pylo_dist":
            self.note(name)
        named = {argument.name: argument for argument in func._schema.arguments}
        values = [*zip(func._schema.arguments, args, strict=False)]
        values += [(named[key], value) for key, value in (kwargs or {}).items()]
        written, read = list[Tensor](), list[Tensor]()
        for argument, value in values:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            (written if writes else read).extend(_tensors(value))
        if func.is_view:
            return result
        given = {_memory(x) for x in (*written, *read)}
        made = [x for x in _tensors(result) if _memory(x) not in given]
        for tensor in read:
            self._touch(tensor, name, writes=False)
        for tensor in (*written, *made):
            self._touch(tensor, name, writes=True)
        return result

    def _touch(self, tensor: Tensor, name: str, writes: bool) -> None:
        now, key = self.now, _memory(tensor)
        self._alive.setdefault(key, tensor.untyped_storage())
        others = [self._written[key]] if key in self._written else []
        if writes:
            others += [(s, at, op) for s, (at, op) in self._read.get(key, {}).items()]
        for stream, at, op in others:
            if at > now.clock.get(stream, 0):
                self.races.append(f"{name} on {now.name} beside {op} on {stream}")
        if writes:
            self._written[key] = now.name, now.clock[now.name], name
            self._read[key] = {}
        else:
            self._read.setdefault(key, {})[now.name] = now.clock[now.name], name


class _Pending:
    """Of a stand-in for the network; `read` is in memory until it is waited for."""

    def __init__(self, machine: Machine, what: str, event: Event, read: Tensor) -> None:
        self.machine, self.what, self.event = machine, what, event
        self._read: Tensor | None = read

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        if self._read is not None:
            self._read = None
            self.machine.now.wait_event(self.event)
            self.machine.note(self.what)


def _tensors(tree: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.untyped_storage().nbytes()]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
