"""Average gradients over ranks, bucket by bucket while backward goes on. Reads and frees gradients
of the model's parameters.

A round reduces every bucket once, a large one slice by slice, strictly in order: one round per
backward pass on every rank, whichever parameters had a gradient and whenever. It opens with the
first gradient that arrives and is closed when backward ends; without overlap by what needs its
result (the step, whoever looks at `param_groups`) or by the second gradient of one parameter, of
another pass.

With overlap the order in which several reducers send depends on the order in which gradients arrive
on a rank, so that each has process groups of its own, and none makes backward wait for other ranks:
they may be waiting for what another reducer, DDP or the user sends further on in the same pass.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ... import comm
from ...core import trace
from ...core.devices import stream_of
from ...core.pieces import raw_grad, set_raw_grad
from ...core.state import state_dtype
from ...maths import copies
from .aside import Aside
from .buckets import ALIGNMENT, Bucket, BucketParam
from .departed import Departed
from .freed import FreedGradient, gradient_of, make_room
from .nonfinite import Nonfinite
from .others import changed_after_it_left, maxima
from .sharing import Sharing

# Slices of buckets that are on their way at the same time; more would only hold memory. Several
# reducers on GPUs may have more.
#
# On a GPU all that a slice goes through (its copy, the network, the division, pass A) is queued on
# a stream of the reducer's own, in the order of the slices. There the first of two is waited for
# where a third is to leave, so that no more copies are in memory at a time however far ahead the
# host is; the stream of backward waits for nothing before the round is closed. Gradients that are
# freed as they leave (ZeRO-2) must stay until they have been copied, and behind a slow network they
# would pile up; so before a bucket leaves the host waits until those of the last but one have been.
# What it has queued by then keeps the GPU busy meanwhile, and the network has the last one to send.
MAX_IN_FLIGHT = 2


@dataclass(slots=True)
class _Flight:
    """A slice of a bucket's gradients on its way: `mine` (stop - first + ALIGNMENT,), the sum over
    ranks once it has arrived.
    """

    bucket: Bucket
    first: int
    stop: int
    mine: Tensor
    pending: comm.Pending
    over_replicas: bool = False  # whether these have been asked for theirs


_COUNT = itertools.count()  # reducers, in an order that is the same on all ranks
_OVERLAPPING: weakref.WeakSet[GradientReducer] = weakref.WeakSet()


class GradientReducer:
    """Brings each rank its part of the mean gradient.

    Args:
        buckets: in the order in which they are reduced; the list may grow, see `add`.
        frees: whether gradients of the model's parameters are freed as they leave (ZeRO-2), and
            those of several backward passes add up in the shard; otherwise they stay and add up
            there.
        overlap: whether buckets leave while backward goes on, or when the round is closed.
        dtype: in which gradients are added; None: the parameter's, float32 for bfloat16 and
            float16.
        landed: called with a bucket whose gradient has arrived; None: nobody waits for it.

    Attributes:
        synchronizing: whether gradients that arrive open a round; see `no_sync`.
        problem: why this rank's gradients cannot be used, or None.
        nonfinite: what the ranks have said of their gradients.
        lock: held by the thread of autograd whose gradient is being noted.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        sharing: Sharing,
        *,
        frees: bool,
        overlap: bool,
        dtype: torch.dtype | None,
        timeout: float | None,
        landed: Callable[[Bucket], None] | None,
    ) -> None:
        self.buckets = buckets
        self.synchronizing = True
        self.problem: ValueError | None = None
        self.nonfinite = Nonfinite(buckets, sharing)
        self._sharing, self._frees, self._overlap, self._dtype = sharing, frees, overlap, dtype
        self._timeout, self._landed = timeout, landed
        self._arrived: set[tuple[int, int]] = set()
        self._missing: list[int] = []
        # the bucket that leaves next, how many slices of it have left and, once one is to, its
        # gradients by member: as they were found, and flat, those that can be copied
        self._next, self._sent = 0, 0
        self._found: list[Tensor | None] = []
        self._leaving: list[Tensor | None] | None = None
        self._landing: Tensor | None = None  # the shard's gradient of which slices have landed
        self._rounds = 0
        self._flights: deque[_Flight] = deque()
        self._departed = Departed()
        self._freed: dict[int, FreedGradient] = {}  # by id(parameter)
        self._pass = -1  # the backward pass in which the round was opened
        # autograd has a thread for every device, and each calls the hooks of its parameters
        self.lock = threading.RLock()
        self._streams: dict[int, set[torch.Stream]] = {}  # on which a bucket's gradients arrived
        self._aside = Aside(apart=overlap)
        self._number = next(_COUNT)
        self._own: list[comm.OwnGroup] = []
        if overlap and sharing.holders is not None:
            self._take_own_groups()

    def _take_own_groups(self) -> None:
        """Send through process groups of one's own from now on. Collective."""
        names = ("group", "replicate_group")
        given = {name: getattr(self._sharing, name) for name in names}
        for name, group in given.items():
            if group is not None:
                own = comm.own_group(group)
                self._own.append(own)
                self._sharing = replace(self._sharing, **{name: own.group})
                weakref.finalize(self, own.give_back, self._arrived, self._flights)
        _OVERLAPPING.add(self)

    def add(self, first: int) -> None:
        """Watch the parameters of the buckets from `first` on."""
        this = weakref.ref(self)  # a parameter that outlives the optimizer must not keep it alive
        for b, bucket in list(enumerate(self.buckets))[first:]:
            for i, member in enumerate(bucket.members):
                member.param.register_post_accumulate_grad_hook(_arrival_hook(this, b, i))
                if self._frees:
                    make_room(member.param, self._departed.standing)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients of the backward passes inside add up on this rank; they leave with the
        first pass outside.
        """
        before, self.synchronizing = self.synchronizing, False
        try:
            yield
        finally:
            self.synchronizing = before

    # --------------------------------------------------------------------------------------- rounds

    def _arrive(self, b: int, i: int) -> None:
        if not self.synchronizing:
            return
        if (b, i) in self._arrived:
            self.flush()
        if not self._arrived:
            self._missing = [
                sum(member.param.requires_grad for member in bucket.members)
                for bucket in self.buckets
            ]
            self._go_to(0)
            # at the end of this pass: then what a rank sends does not depend on what it does next
            if self._overlap:
                self._pass = torch._C._current_graph_task_id()
                engine = torch.autograd.Variable._execution_engine
                engine.queue_callback(lambda: _end_of_pass(self))
        self._arrived.add((b, i))
        self._missing[b] -= 1
        stream = stream_of(self.buckets[b].flat.device)
        if stream is not None:
            self._streams.setdefault(b, set()).add(stream)
        while (
            self._overlap
            and self._next < len(self.buckets)
            and self._missing[self._next] <= 0
            and self._has_room()
        ):
            self._launch_next()

    def _has_room(self) -> bool:
        """Whether another bucket may leave now, without waiting for other ranks."""
        if len(self._flights) < MAX_IN_FLIGHT:
            return True
        flight = self._flights[0]
        queued = self._aside.is_apart(flight.mine.device)  # what waits is not the host
        # Gradients that are freed as they leave would pile up, so the host waits for them; but not
        # beside another optimizer of ours, which on another rank may wait for this one.
        if len(_OVERLAPPING) <= 1 and (queued or self._frees):
            self._land()
            freed_before = 1 if self._frees and self._leaving is None else None  # by bucket
            self._aside.let_go(most=freed_before)
            return True
        if queued:
            self._aside.let_go()
            return True
        while flight.pending.done():
            if not self._ask_replicas(flight):
                self._land()
                return True
        return False

    def flush(self) -> None:
        """Close the round that is open, if one is: all its gradients are there then."""
        if self._arrived:
            self._close_round()

    def finish(self) -> None:
        """As `flush`; where nothing has been reduced since `forget`, reduce what is there now."""
        left_before = self._rounds > 0 and not self._arrived
        self.flush()
        if self._rounds == 0:
            self._go_to(0)
            self._close_round()
        members = [member for bucket in self.buckets for member in bucket.members]
        for member in members:
            if self._departed.is_other(member.param):
                self.problem = self.problem or changed_after_it_left(member.fqn, member.param)
        if left_before and self._sharing.holders is not None and self.problem is None:
            changed = self._departed.changed_unseen(members)
            if changed is not None:
                self.problem = changed_after_it_left(changed.fqn, changed.param)

    def _go_to(self, b: int) -> None:
        """Bucket `b` leaves next, from its first slice on."""
        self._next, self._sent, self._found, self._leaving = b, 0, [], None

    def _close_round(self) -> None:
        try:
            while self._next < len(self.buckets):
                while len(self._flights) >= MAX_IN_FLIGHT:
                    self._land()
                self._launch_next()
            while self._flights:
                self._land()
        finally:  # whoever reads gradients now, or changes those that are still being copied
            self._aside.join()
        self._arrived.clear()
        self._rounds += 1

    def forget(self) -> None:
        """Drop all gradients of the shards; the next round starts from nothing."""
        self.flush()
        # parameters on their way are asked for nothing but their gradients
        with torch._C.DisableTorchFunctionSubclass():
            for bucket in self.buckets:
                bucket.show_gradient(None)
                for member in bucket.members:
                    member.binding.present = False
                    if type(raw_grad(member.param)) is FreedGradient:
                        set_raw_grad(member.param, None)
        self._rounds = 0
        self.nonfinite.forget()
        self._departed.forget()
        self.problem = None

    # -------------------------------------------------------------------------------------- buckets

    def _launch_next(self) -> None:
        """Queue the next slice behind the gradients of its bucket, wherever backward made them: a
        forward pass may have gone over several streams.
        """
        b, bucket = self._next, self.buckets[self._next]
        if self._leaving is None:
            self._found = [gradient_of(member.param) for member in bucket.members]
        read = self._found if self._sent + 1 == len(bucket.slices) else []
        with self._aside.behind(bucket.flat.device, self._streams.get(b, ()), read):
            self._send_next()

    @trace.phased("reduce: launch")
    @torch.no_grad()
    def _send_next(self) -> None:
        b, bucket = self._next, self.buckets[self._next]
        if self._leaving is None:
            if b == 0 and not self._frees:
                self.nonfinite.forget()  # of gradients that this round replaces
            self._leaving = self._taken(bucket, self._found)
        dtype = _dtype_of_sums(bucket, self._dtype)
        first, stop = bucket.slices[self._sent]
        width = stop - first
        # per rank its part and a warning: 0, or NaN if this rank's gradients cannot be added
        full = bucket.flat.new_empty(self._sharing.ranks, width + ALIGNMENT, dtype=dtype)
        ends = self._pack(bucket, self._leaving, full)
        added = self._sharing.ranks * self._sharing.replicas
        full[:, width:] = ends.mul(added).mul_(0.0).sum()
        # only now: an error above leaves the round as it was
        self._sent += 1
        what = f"the reduce-scatter of gradients, bucket {b}"
        if len(bucket.slices) > 1:
            what = f"{what}, slice {self._sent} of {len(bucket.slices)}"
        if self._sent == len(bucket.slices):
            self._streams.pop(b, None)
            self._go_to(b + 1)
        if self._sharing.group is None:
            done = comm.Pending(None, "", None, (), None)
            self._flights.append(_Flight(bucket, first, stop, full[0], done))
            return
        mine = full.new_empty(width + ALIGNMENT)
        pending = comm.reduce_scatter(mine, full.view(-1), self._sharing.group, what, self._timeout)
        self._flights.append(_Flight(bucket, first, stop, mine, pending))

    def _taken(self, bucket: Bucket, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Note that the gradients of a bucket leave.

        Args:
            found: those of its members; None: there is none.

        Returns:
            Those that can be copied, (numel,) each, None in the place of the others.
        """
        dense = [
            grad
            if grad is not None
            and grad.layout is torch.strided
            and grad.shape == member.param.shape
            and member.offset < member.end
            else None
            for grad, member in zip(found, bucket.members, strict=True)
        ]
        flat = [None if grad is None else grad.reshape(-1).contiguous() for grad in dense]
        left = [grad for grad in flat if grad is not None]
        # before they are copied, or in that reading: whatever changes one meanwhile is noticed
        later = self._frees or copies.serves(left, _dtype_of_sums(bucket, self._dtype))
        marks = iter([] if later else maxima(left))
        for member, grad, copied in zip(bucket.members, found, flat, strict=True):
            self._take(member, grad, None if copied is None else next(marks, None))
        return flat

    def _pack(self, bucket: Bucket, leaving: Sequence[Tensor | None], full: Tensor) -> Tensor:
        """Write the gradients in the slice that leaves to their places in `full` (ranks, its
        columns and ALIGNMENT more, which hold anything afterwards), zeros where there is none.

        Returns:
            Numbers of `full`, of its dtype; one of them is as large as any, or NaN if any is.
        """
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        of_member: list[tuple[BucketParam, int]] = []  # where the sources of each end
        boxes = bucket.boxes[self._sent]
        empty = [*boxes.padding]
        for i, of_it in boxes.members:
            grad = leaving[i]
            if grad is None:
                empty += of_it
                continue
            for box in of_it:
                targets.append(box.place(full))
                sources.append(box.source(grad))
            of_member.append((bucket.members[i], len(sources)))
        for box in empty:
            box.place(full).zero_()
        if not copies.serves(sources, full.dtype):
            if targets:
                torch._foreach_copy_(targets, sources)
            full[:, -ALIGNMENT:].zero_()
            return torch.stack(torch.aminmax(full))
        ends = copies.copy_with_ends(targets, sources)
        if not self._frees:
            largest, begin = ends[:, 1].unbind(), 0
            for member, end in of_member:
                self._departed.note_parts(member.param, largest[begin:end])
                begin = end
        return ends.to(full.dtype)

    def _take(self, member: BucketParam, grad: Tensor | None, mark: Tensor | None) -> None:
        """Note that a parameter's gradient leaves, or that there is none.

        Args:
            mark: see `Departed.note`.
        """
        param = member.param
        present = grad is not None
        member.binding.present = present or (
            self._frees and self._rounds > 0 and member.binding.present
        )
        if grad is None:
            self._departed.note(param, None, None)
            return
        if grad.layout != torch.strided:
            self.problem = self.problem or ValueError(
                f"{member.fqn!r} has a sparse gradient: build its embedding with sparse=False"
            )
        if self._frees:
            if id(param) not in self._freed:
                self._freed[id(param)] = FreedGradient.of(param, grad.dtype)
            if id(param) in self._departed.standing:  # and is not: this pass should have removed it
                self.problem = self.problem or changed_after_it_left(member.fqn, param)
            self._departed.standing.add(id(param))
            param.grad = self._freed[id(param)]
        else:
            self._departed.note(param, grad, mark)

    def _ask_replicas(self, flight: _Flight) -> bool:
        """Once a flight is done, whether it goes on over the replicas."""
        group = self._sharing.replicate_group
        if group is None or flight.over_replicas:
            return False
        with self._broken_by_errors():
            flight.pending.wait()
            flight.pending = comm.all_reduce(
                flight.mine, group, "the sum of gradients over replicas", self._timeout
            )
        flight.over_replicas = True
        return True

    @contextmanager
    def _broken_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for own in self._own:
                own.broken = True
            raise

    def _land(self) -> None:
        with self._aside.behind(self._flights[0].mine.device):
            self._receive_first()

    @trace.phased("reduce: land")
    @torch.no_grad()
    def _receive_first(self) -> None:
        flight, sharing = self._flights.popleft(), self._sharing
        with trace.phase("reduce: wait"), self._broken_by_errors():
            flight.pending.wait()
            if self._ask_replicas(flight):
                flight.pending.wait()
        bucket, mine, width = flight.bucket, flight.mine, flight.stop - flight.first
        copies = sharing.ranks * sharing.replicas
        if copies > 1:
            # once, after the sum: the rounding of an average then does not depend on the backend
            mine.div_(copies)
        self.nonfinite.heard(mine[width])
        dtype = bucket.flat.dtype if bucket.master is None else bucket.master.dtype
        grad = mine[:width].to(dtype)
        # of an earlier backward pass of the same step
        earlier = bucket.grad if self._frees and self._rounds > 0 else None
        if earlier is not None:
            earlier[flight.first : flight.stop].add_(grad)
        elif width < bucket.shard_numel:
            if self._landing is None:
                self._landing = grad.new_empty(bucket.shard_numel)
            self._landing[flight.first : flight.stop] = grad
            grad = self._landing
        if flight.stop < bucket.shard_numel:
            return
        self._landing = None
        if earlier is None:
            bucket.show_gradient(grad)
        else:
            for member in bucket.members:
                if member.piece.grad is None:
                    member.piece.grad = bucket.piece_of(member, earlier)
        if self._landed is not None:
            self._landed(bucket)


def _dtype_of_sums(bucket: Bucket, wanted: torch.dtype | None) -> torch.dtype:
    """In which a bucket's gradients are added."""
    return wanted or state_dtype(bucket.flat.dtype)


def _end_of_pass(reducer: GradientReducer) -> None:
    """Close the rounds of all reducers that this backward pass has opened, this one's among them:
    all send before any waits, and they wait in an order that is the same on all ranks.
    """
    rounds = [r for r in _OVERLAPPING if r._arrived and r._pass == reducer._pass]
    rounds.sort(key=lambda one: one._number)
    if len(rounds) > 1:
        for one in rounds:
            while one._next < len(one.buckets):
                one._launch_next()
    for one in rounds or [reducer]:
        one.flush()


def _arrival_hook(
    reducer: weakref.ref[GradientReducer], b: int, i: int
) -> Callable[[Tensor], None]:
    def hook(_: Tensor) -> None:
        alive = reducer()
        if alive is not None:
            with alive.lock:
                alive._arrive(b, i)

    return hook
