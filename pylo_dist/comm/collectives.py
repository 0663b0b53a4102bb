"""Process groups, and what moves tensors and objects over them. Touches the buffers it is handed,
nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import trace
from ..core.requests import Transfer
from .meeting import GRACE, CommunicationError, counted, digest, listed, lost, timeout_of
from .store import Store, StoreError, within

if dist.is_available():
    # Before there is a process group: its default arguments hold the group that exists at its first
    # import, which optimizers cause. One held so outlives destroy_process_group(), and its threads
    # now and then abort the process at exit.
    import torch.distributed.nn.functional

# Renamed in newer torch, where the old names warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

PHASES = {1: "the gradient sums of the step (phase A)", 2: "the feature sums of the step (phase B)"}

# a process group and the buffer to be added over its ranks, in place
Reduction = tuple[Any, Tensor]
Collective = Union[Reduction, Transfer]


def default_group() -> Any:
    """The world's process group, or None when torch.distributed is not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def check_group(name: str, group: object) -> None:
    """Raise ValueError for a group that somebody gave and that is none: wanted one of
    torch.distributed that this rank is in, None, or False for this rank alone.
    """
    if group is None or group is False:
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            f"{name} is a {type(group).__name__}; wanted a process group that this rank is in "
            "(torch.distributed.new_group, or get_group() of a mesh), None, or False for this "
            "rank alone"
        )


def size(group: Any) -> int:
    """Number of ranks of `group`; 1 for None."""
    return 1 if group is None else int(group.size())


def rank(group: Any) -> int:
    """This process's rank in `group`; 0 for None."""
    return 0 if group is None else int(group.rank())


def ranks_of(group: Any) -> list[int]:
    """The world's ranks in `group`, in its order."""
    return dist.get_process_group_ranks(group)


def sent(group: Any) -> int:
    """How many collectives this rank has begun in `group`; only differences mean something."""
    return int(group._get_sequence_number_for_group())


def can_reduce(group: Any, device: torch.device) -> bool:
    """Whether the ranks of `group` can reduce tensors that lie on `device`."""
    return device.type in {known.type for known in group._device_types}


def device_type() -> str:
    """Where the world's ranks reduce: on their accelerators if they can there, else "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and can_reduce(default_group(), found) else "cpu"


# by ranks: the world it was made in, and the group
_MADE: dict[tuple[int, ...], tuple[Any, Any]] = {}


def group_over(ranks: tuple[int, ...]) -> Any:
    """A process group over these ranks (rising). The first call for them is collective over them
    alone.
    """
    world = default_group()
    if len(ranks) == size(world):
        return world
    if _MADE.get(ranks, (None, None))[0] is not world:
        group = new_group(list(ranks), timeout_of(world, torch.device(device_type())))
        for other in [key for key, (made_in, _) in _MADE.items() if made_in is not world]:
            del _MADE[other]  # of a world that was destroyed
        _MADE[ranks] = (world, group)
    return _MADE[ranks][1]


def new_group(ranks: list[int], timeout: float, **options: Any) -> Any:
    """A process group over these ranks, which all make it now.

    Args:
        timeout: seconds that its ranks wait for each other, now and later.
        **options: of `torch.distributed.new_group`.

    Raises:
        CommunicationError: one of them did not come in time.
    """

    def make() -> Any:
        return dist.new_group(
            ranks,
            timeout=timedelta(seconds=timeout),
            use_local_synchronization=True,
            **options,
        )

    what, start = "the making of a process group", time.monotonic()
    if "gloo" in str(options.get("backend") or dist.get_backend_config()):
        _check_room(what, len(ranks) + 8)
    try:
        number = counted(Store(timeout + GRACE), "made", tuple(ranks), 1)
        with _named(digest([ranks, number])):
            return within(timeout + GRACE, make)
    except StoreError as error:  # through which alone the others could be asked
        raise CommunicationError(
            f"rank {dist.get_rank()} waited {time.monotonic() - start:.0f} s in {what} over the "
            f"ranks [{listed(ranks)}]: {error}"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise lost(what, ranks, error) from error


def _check_room(what: str, count: int) -> None:
    """Raise CommunicationError unless so many files can be opened: where gloo cannot, a thread of
    its own ends the process.
    """
    opened = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise CommunicationError(
            f"rank {dist.get_rank()} cannot take part in {what}, for which it may have to open "
            f"{count} files ({error}): raise the limit (ulimit -n)"
        ) from None
    finally:
        for handle in opened:
            os.close(handle)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """The name of a group that is made inside, alike on its ranks.

    torch makes one of the number of groups that this rank is in; where the numbers of two ranks
    differ, they never meet. torch 2.15 counts groups of some ranks alone too, on these ranks: their
    next `new_group` with others would never return, so the count stays as it was.
    """
    module: Any = dist.distributed_c10d
    world = module._world
    count = world.group_count
    original = getattr(module, "_hash_ranks_to_str", None)
    if original is None:
        yield
        return
    module._hash_ranks_to_str = lambda _: name
    try:
        yield
    finally:
        module._hash_ranks_to_str = original
        world.group_count = count


def union(group: Any, replicate_group: Any) -> Any:
    """The process group of all ranks of all replicas; every rank of them must call it.

    Raises:
        ValueError: the two groups do not form a grid, in which a replicate group holds the same
            place of every group.
    """
    place, mine = rank(group), ranks_of(group)
    columns = gather_objects((place, mine), replicate_group)
    members = sorted(member for _, ranks in columns for member in ranks)
    sizes = {(column_place, len(ranks)) for column_place, ranks in columns}
    if sizes != {(place, len(mine))} or len(set(members)) != len(members):
        raise ValueError(
            "process_group and replicate_group do not form a grid: seen from rank "
            f"{dist.get_rank()} the replicas are {columns}; wanted groups of equal size without a "
            "common rank, and the same place in each"
        )
    return group_over(tuple(members))


class Pending:
    """A collective under way.

    Args:
        work: what torch.distributed returned, or None if it is done.
        what: its name, for errors.
        tensors: those it reads or writes; they live as long as it does.
        timeout: seconds to wait at most, for tensors in host memory; None, and on GPUs: what the
            process group has.
        finish: what `wait` does once the work is done.
    """

    def __init__(
        self,
        work: Any,
        what: str,
        group: Any,
        tensors: Sequence[Tensor],
        timeout: float | None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._work, self._what, self._group, self._tensors = work, what, group, tensors
        self._finish = finish
        self._error: CommunicationError | None = None
        self._timeout = timeout if tensors and tensors[0].device.type == "cpu" else None

    def done(self) -> bool:
        """Whether `wait` would not block; asks, and waits for nothing."""
        return self._error is not None or self._work is None or bool(self._work.is_completed())

    def wait(self) -> None:
        """Until the result is there; on a GPU, for work queued from here on. Raises
        CommunicationError.
        """
        if self._error is not None:
            raise self._error
        work, self._work = self._work, None
        if work is None:
            return
        try:
            with _or_lost(self._what, self._group):
                work.wait() if self._timeout is None else work.wait(
                    timeout=timedelta(seconds=self._timeout)
                )
        except CommunicationError as error:
            self._error = error
            raise
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        self._tensors = ()


def serve(phases: Iterable[list[Collective]], timeout: float | None = None) -> Any:
    """Drive an engine: carry out the collectives of a phase, those of all groups at once, until the
    phases end.

    Returns:
        What the phases, a generator, return.
    """
    remaining, number = iter(phases), 0
    while True:
        try:
            collectives = next(remaining)
        except StopIteration as done:
            return done.value
        number += 1
        what = PHASES.get(number, f"phase {number} of the step")
        for pending in [_start(collective, what, timeout) for collective in collectives]:
            with trace.phase("sums: wait"):
                pending.wait()


def _start(collective: Collective, what: str, timeout: float | None) -> Pending:
    if isinstance(collective, Transfer):
        return _all_to_all(collective, what, timeout)
    group, buffer = collective
    return all_reduce(buffer, group, what, timeout)


def _all_to_all(t: Transfer, what: str, timeout: float | None) -> Pending:
    def start() -> Any:
        return dist.all_to_all_single(
            t.receive, t.send, t.receive_counts, t.send_counts, group=t.group, async_op=True
        )

    with trace.phase("collective: all_to_all", t.send):
        return _call(start, what, t.group, [t.receive, t.send], timeout)


_DURING: ContextVar[str] = ContextVar("during", default="")


@contextmanager
def during(what: str) -> Iterator[None]:
    """Inside, errors of collectives say that they were part of `what`; also a decorator."""
    token = _DURING.set(f" ({what})")
    try:
        yield
    finally:
        _DURING.reset(token)


@contextmanager
def _or_lost(what: str, group: Any) -> Iterator[None]:
    """Around a collective: an error of it as a CommunicationError that names who is lost."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # a group that has lost a rank refuses further work, too
        raise lost(what + _DURING.get(), ranks_of(group), error) from error


def _call(
    start: Callable[[], Any],
    what: str,
    group: Any,
    tensors: Sequence[Tensor],
    timeout: float | None,
    finish: Callable[[], None] | None = None,
) -> Pending:
    with _or_lost(what, group):
        return Pending(start(), what, group, tensors, timeout, finish)


def all_reduce(buffer: Tensor, group: Any, what: str, timeout: float | None = None) -> Pending:
    """Start adding `buffer` over the ranks (modified in place)."""
    with trace.phase("collective: all_reduce", buffer):
        return _call(
            lambda: dist.all_reduce(buffer, group=group, async_op=True),
            what,
            group,
            [buffer],
            timeout,
        )


def reduce_scatter(
    shard: Tensor, full: Tensor, group: Any, what: str, timeout: float | None = None
) -> Pending:
    """Start shard <- sum over ranks of this rank's part of `full` (`shard` is modified in place).

    Args:
        shard: (numel,), full: (ranks * numel,).
    """
    with trace.phase("collective: reduce_scatter", full):
        if _is_gloo(group, full.device):
            received = torch.empty_like(full)
            return _call(
                lambda: _deal(received, full, group),
                what,
                group,
                [shard, full, received],
                timeout,
                lambda: _add_up(received.view(size(group), -1), shard),
            )
        return _call(
            lambda: _reduce_scatter(shard, full, group=group, async_op=True),
            what,
            group,
            [shard, full],
            timeout,
        )


def all_gather(
    full: Tensor,
    shard: Tensor,
    group: Any,
    what: str,
    timeout: float | None = None,
    slices: Sequence[tuple[int, int]] = (),
) -> Pending:
    """Start full <- the shards of all ranks, in rank order (`full` is modified in place; `shard`
    may be a view of it).

    Args:
        slices: first and stop, in every shard, of what may be sent at a time where that is sent by
            way of a copy, which then is no larger: by gloo.
    """

    def start() -> Any:
        if len(slices) < 2 or not _is_gloo(group, full.device):
            return _all_gather(full, shard, group=group, async_op=True)
        parts = full.view(size(group), -1)
        return _Works(
            dist.all_gather(
                [part[first:stop] for part in parts], shard[first:stop], group=group, async_op=True
            )
            for first, stop in slices
        )

    with trace.phase("collective: all_gather", full):
        return _call(start, what, group, [full, shard], timeout)


class _Works:
    """Several works of torch.distributed as one."""

    def __init__(self, works: Iterable[Any]) -> None:
        self._works = list(works)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self, **timeout: timedelta) -> None:
        for work in self._works:
            work.wait(**timeout)


def _is_gloo(group: Any, device: torch.device) -> bool:
    """Whether gloo adds tensors in host memory up for these ranks. Its reduce-scatter is an
    all-reduce, which sends everything twice: to deal the parts out and add them up here takes 0.3
    to 0.6 of the CPU time.
    """
    return device.type == "cpu" and group._get_backend(device).name() == "gloo"


def _deal(received: Tensor, full: Tensor, group: Any) -> Any:
    """Start sending every rank its part of `full`, as bytes, which gloo sends of every dtype;
    `received` (modified in place) gets those of all ranks for this one, in rank order.
    """
    return dist.all_to_all_single(
        received.view(torch.uint8), full.view(torch.uint8), group=group, async_op=True
    )


def _add_up(parts: Tensor, total: Tensor) -> None:
    """total <- the sum of parts (ranks, numel) in rank order, the same wherever an element lies
    (`total` is modified in place).
    """
    total.copy_(parts[0])
    for part in parts[1:]:
        total.add_(part)


def broadcast(tensor: Tensor, source: int, group: Any) -> None:
    """tensor <- that of rank `source` of `group` (modified in place)."""
    with _or_lost("a broadcast", group):
        dist.broadcast(tensor, group_src=source, group=group)


def gather_objects(mine: Any, group: Any) -> list[Any]:
    """What every rank of `group` has, in rank order, on all of them."""
    if group is None:
        return [mine]
    gathered: list[Any] = [None] * size(group)
    with _or_lost("an exchange of messages", group):
        dist.all_gather_object(gathered, mine, group=group)
    return gathered
