"""The only module that calls torch.distributed collectives. Touches the buffers it is handed and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import trace
from ..core.requests import Transfer

# Renamed in newer torch, where the old names warn.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

PHASES = {1: "the gradient sums of the step (phase A)", 2: "the feature sums of the step (phase B)"}
GRACE = 3.0  # seconds in which ranks that lost a peer find out which one it was
PATIENCE = 0.5  # seconds that ranks wait for another before they tell it

T = TypeVar("T")
# a process group and the buffer to be added over its ranks, in place
Reduction = tuple[Any, Tensor]
Collective = Union[Reduction, Transfer]


def default_group() -> Any:
    """The world's process group, or None when torch.distributed is not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def size(group: Any) -> int:
    """Number of ranks of `group`; 1 for None."""
    return 1 if group is None else int(group.size())


def rank(group: Any) -> int:
    """This process's rank in `group`; 0 for None."""
    return 0 if group is None else int(group.rank())


def ranks_of(group: Any) -> list[int]:
    """The world's ranks in `group`, in its order."""
    return dist.get_process_group_ranks(group)


# by ranks: the world it was made in, and the group
_MADE: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _counted(what: str, ranks: tuple[int, ...], more: int) -> int:
    """How often this rank did `what` with these, `more` times now. Counted by the store: ranks of a
    later world are others.
    """
    store = dist.distributed_c10d._get_default_store()
    return int(store.add(f"pylo_dist/{what}/{_digest(ranks)}/{dist.get_rank()}", more))


def group_over(ranks: tuple[int, ...]) -> Any:
    """A process group over these ranks (rising). The first call for them is collective over them
    alone.
    """
    world = default_group()
    if len(ranks) == size(world):
        return world
    if _MADE.get(ranks, (None, None))[0] is not world:
        timeout = timedelta(seconds=timeout_of(world, torch.device(device_type())))
        with _named(_digest([ranks, _counted("made", ranks, 1)])):
            group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        for other in [key for key, (made_in, _) in _MADE.items() if made_in is not world]:
            del _MADE[other]  # of a world that was destroyed
        _MADE[ranks] = (world, group)
    return _MADE[ranks][1]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """The name of a group that is made inside, alike on its ranks.

    torch makes one of the number of groups that this rank is in; where the numbers of two ranks
    differ, they never meet.
    """
    module: Any = dist.distributed_c10d
    original = getattr(module, "_hash_ranks_to_str", None)
    if original is None:
        yield
        return
    module._hash_ranks_to_str = lambda _: name
    try:
        yield
    finally:
        module._hash_ranks_to_str = original


def _digest(content: Any) -> str:
    """Of JSON-able content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def device_type() -> str:
    """Where the world's ranks reduce: "cuda" if they can there, else "cpu"."""
    return (
        "cuda"
        if torch.cuda.is_available() and can_reduce(default_group(), torch.device("cuda"))
        else "cpu"
    )


def can_reduce(group: Any, device: torch.device) -> bool:
    """Whether the ranks of `group` can reduce tensors that lie on `device`."""
    return device.type in {known.type for known in group._device_types}


class CommunicationError(RuntimeError):
    """Other ranks did not take part in a collective: they died, hang, or went another way. The
    process group is unusable then.
    """


class Pending:
    """A collective under way.

    Args:
        work: what torch.distributed returned, or None if it is done.
        what: its name, for errors.
        keep: tensors it reads or writes; they live as long as it.
        timeout: seconds to wait at most, for tensors in host memory; None, and on GPUs: what the
            process group has.
    """

    def __init__(
        self, work: Any, what: str, group: Any, keep: Sequence[Tensor], timeout: float | None
    ) -> None:
        self._work, self._what, self._group, self._keep = work, what, group, keep
        self._error: CommunicationError | None = None
        self._timeout = timeout if keep and keep[0].device.type == "cpu" else None

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
        self._keep = ()


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
        t = collective
        return _call(
            lambda: dist.all_to_all_single(t.receive, t.send, t.receive_counts, t.send_counts, group=t.group, async_op=True),
            what, t.group, [t.receive, t.send], timeout,
        )  # fmt: skip
    group, buffer = collective
    return all_reduce(buffer, group, what, timeout)


@contextmanager
def _or_lost(what: str, group: Any) -> Iterator[None]:
    try:
        yield
    except (
        RuntimeError,
        ValueError,
    ) as error:
        # a group that has lost a rank refuses further work, too
        raise _lost(what, group, error) from error


def _call(
    start: Callable[[], Any], what: str, group: Any, keep: Sequence[Tensor], timeout: float | None
) -> Pending:
    with _or_lost(what, group):
        return Pending(start(), what, group, keep, timeout)


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
        return _call(
            lambda: _reduce_scatter(shard, full, group=group, async_op=True),
            what,
            group,
            [shard, full],
            timeout,
        )


def all_gather(
    full: Tensor, shard: Tensor, group: Any, what: str, timeout: float | None = None
) -> Pending:
    """Start full <- the shards of all ranks, in rank order (`full` is modified in place; `shard`
    may be a view of it).
    """
    with trace.phase("collective: all_gather", full):
        return _call(
            lambda: _all_gather(full, shard, group=group, async_op=True),
            what,
            group,
            [full, shard],
            timeout,
        )


def _lost(what: str, group: Any, error: Exception) -> CommunicationError:
    """Tell the other survivors through the store that this rank has given up, and name those that
    say nothing.
    """
    mine, ranks = dist.get_rank(), ranks_of(group)
    # whoever lost a peer too says so; one that died or went another way does not
    silent: list[int] = []
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"pylo_dist/gave_up/{mine}", what)
        until = time.monotonic() + GRACE
        silent = [rank for rank in ranks if rank != mine]
        while silent and time.monotonic() < until:
            silent = [rank for rank in silent if not store.check([f"pylo_dist/gave_up/{rank}"])]
            time.sleep(0.05)
    except Exception:  # the store may have died with its rank; what is known is said all the same
        pass
    who = (
        f"The missing one is among rank(s) {', '.join(map(str, silent))}, which did not report the "
        "same"
        if silent
        else ""
    )
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CommunicationError(
        f"rank {mine} lost the other ranks of its group in {what}: {cause}. {who}".strip()
    )


_MET = "met"  # the outcome of a meeting, or who gave it up and why
_MEETINGS: list[tuple[int, ...]] = []  # the ranks of each that this one has gone to, or declined


def meetings() -> int:
    """How many meetings this rank has gone to, or declined."""
    return len(_MEETINGS)


def _place(ranks: tuple[int, ...], number: int) -> str:
    """Where the store keeps a meeting of these ranks."""
    return f"pylo_dist/meeting/{_digest(ranks)}/{number}"


def _next_meeting(ranks: tuple[int, ...]) -> str:
    _MEETINGS.append(ranks)
    return _place(ranks, _counted("met", ranks, 1))


def timeout_of(group: Any, device: torch.device) -> float:
    """Seconds that the ranks of `group` wait for each other; the store's where the backend does not
    say.
    """
    try:
        return float(group._get_backend(device).options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return float(dist.distributed_c10d._get_default_store().timeout.total_seconds())  # type: ignore[attr-defined]


def meet(ranks: tuple[int, ...], what: str, entries: list[Any], timeout: float) -> None:
    """Wait until all these ranks are here, before collectives that a rank with an error of its own
    would never come to.

    Through the store: no process group is left out of step by whoever does not come.

    Args:
        ranks: rising; this one among them.
        entries: JSON-able; shown to those that are late, see `awaited_by`.
        timeout: seconds to wait for the last one.

    Raises:
        ValueError: what another rank has declined with. CommunicationError: one did not come in
            time, on all who come at all.
    """
    store, place, mine = (
        dist.distributed_c10d._get_default_store(),
        _next_meeting(ranks),
        dist.get_rank(),
    )
    start, pause, told = time.monotonic(), 0.001, False
    store.set(f"{place}/here/{mine}", "")
    arrived = store.add(f"{place}/arrived", 1)
    while True:
        if store.check([f"{place}/problem"]):
            raise ValueError(store.get(f"{place}/problem").decode())
        waited = time.monotonic() - start
        given_up, outcome = waited > timeout, _MET if arrived >= len(ranks) else ""
        if not outcome and (given_up or (waited > PATIENCE and not told)):
            late = [rank for rank in ranks if not store.check([f"{place}/here/{rank}"])]
            if given_up:
                outcome = f"rank {mine} waited {waited:.0f} s in {what} for the ranks {late}, which did not come"
            else:
                told = True
                for rank in late:
                    store.set(f"pylo_dist/awaited/{rank}", json.dumps([mine, ranks, entries]))
        # the first one holds for all, or one of them went on alone
        if outcome or store.check([f"{place}/outcome"]):
            outcome = store.compare_set(f"{place}/outcome", "", outcome).decode()
            if outcome == _MET:
                return
            raise CommunicationError(outcome)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        arrived = store.add(f"{place}/arrived", 0)


def decline(ranks: tuple[int, ...], problem: Exception) -> None:
    """Tell these ranks that this one does not come to the meeting with them that is next, and why."""
    text = f"rank {dist.get_rank()}: {problem}"
    dist.distributed_c10d._get_default_store().set(f"{_next_meeting(ranks)}/problem", text)


def awaited_by() -> tuple[int, tuple[int, ...], list[Any]] | None:
    """A rank that waits for this one, the ranks that meet there, and its entries; None if nobody
    does.
    """
    store, mine = dist.distributed_c10d._get_default_store(), dist.get_rank()
    if not store.check([f"pylo_dist/awaited/{mine}"]):
        return None
    rank, ranks, entries = json.loads(store.get(f"pylo_dist/awaited/{mine}"))
    place = _place(tuple(ranks), _counted("met", tuple(ranks), 0) + 1)
    # else this one came meanwhile
    return (rank, tuple(ranks), entries) if store.check([f"{place}/here/{rank}"]) else None


def check_equal(what: str, entries: list[Any], group: Any, device: torch.device) -> None:
    """Raise ValueError on every rank if the JSON-able `entries` differ between ranks, naming the
    first that does.

    Called where a disagreement would later be a hang.
    """
    digest = hashlib.sha256(json.dumps(entries).encode()).digest()[:8]
    mine = torch.tensor(
        [int.from_bytes(digest, "little", signed=True)], dtype=torch.int64, device=device
    )
    all_digests = mine.new_empty(size(group))
    all_gather(all_digests, mine, group, f"a comparison of every {what}").wait()
    if bool((all_digests == all_digests[0]).all()):
        return
    gathered = gather_objects(entries, group)
    for other, theirs in enumerate(gathered):
        for place in range(max(len(theirs), len(gathered[0]))):
            here = gathered[0][place] if place < len(gathered[0]) else "nothing"
            there = theirs[place] if place < len(theirs) else "nothing"
            if here != there:
                raise ValueError(
                    f"the ranks disagree on {what} number {place}: rank 0 has {here}, rank {other} "
                    f"has {there}; build the same model and optimizer on every rank"
                )


class PeerError(RuntimeError):
    """Another rank could not do its part; what it could not do is in its own error. Nothing was
    changed.
    """

    def __init__(
        self,
        message: str = "another rank could not take this step, see its error; nothing was changed",
    ) -> None:
        super().__init__(message)


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


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """int64 (len,): a number per tensor that changes with any of its bits (and their places)."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
        sums.append((bits * (torch.arange(len(bits), device=bits.device) % 8191 + 1)).sum())
    return torch.stack(sums)


def differing(sums: Tensor, group: Any) -> list[int]:
    """Places where the int64 `sums` are not the same on all ranks of `group`; waits for the device."""
    everyone = sums.new_empty(size(group) * len(sums))
    all_gather(everyone, sums, group, "a comparison of replicated state").wait()
    table = everyone.view(-1, len(sums))
    return [int(i) for i in (table != table[0]).any(0).nonzero()]


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


def raise_together(
    problem: Exception | None, group: Any, error: type[Exception] = PeerError
) -> None:
    """Raise `problem` on this rank, and its text as an `error` on the ranks of `group` that have
    none of their own.

    Every rank calls it, with None where all is well: called where an error of one rank would leave
        the others waiting.
    """
    texts = gather_objects(
        None if problem is None else str(problem) or type(problem).__name__, group
    )
    if problem is not None:
        raise problem
    for other, text in enumerate(texts):
        if text is not None:
            raise error(f"rank {other}: {text}")


def together(work: Callable[[], T], group: Any, error: type[Exception] = PeerError) -> T:
    """`work()` of this rank, which calls no collective; what it raises on one rank is raised on
    all, see `raise_together`.
    """
    problem: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as caught:
        problem = caught
    raise_together(problem, group, error)
    done: T = result
    return done
