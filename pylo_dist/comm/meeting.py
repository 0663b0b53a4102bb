"""What ranks tell each other through the store, in no process group: meetings, and who is lost.
Writes keys of the store, nothing else.

RANKS is a digest of the ranks that meet, N the number of their meeting:

    pylo_dist/met/RANKS/RANK       how many meetings of theirs RANK has gone to, or declined
    pylo_dist/made/RANKS/RANK      how many process groups of theirs RANK has made
    pylo_dist/meeting/RANKS/N/     here (a list of ranks), arrived (a count, see `_OVER`), problem
                                   (of who declined), outcome
    pylo_dist/awaited/RANK         who waits for RANK, the ranks that meet there, its entries
    pylo_dist/gave_up              the ranks that have lost others in a collective

A rank that waits asks for one number and ever more rarely; who is missing it learns from one list.
So thousands of ranks may wait for one without keeping the store from answering it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from .store import Store, StoreError

GRACE = 2.5  # seconds in which ranks that lost a peer find out which one it was
PATIENCE = 0.5  # seconds that ranks wait for another before they tell it

_SHOWN = 16  # ranks that an error lists; of more of them the first ones, and how many there are
_LONGEST_PAUSE = 0.5  # seconds between two questions whether all are there
_OVER = 1 << 32  # added to the count of a meeting where its problem or outcome is known
_MET = "met"  # the outcome of a meeting, or who gave it up and why
_MEETINGS: list[tuple[int, ...]] = []  # the ranks of each that this one has gone to, or declined


class CommunicationError(RuntimeError):
    """Other ranks did not take part in a collective: they died, hang, or went another way. The
    process group is unusable then.
    """


class Declined(ValueError):
    """What another rank does not come to a meeting for, in its words."""


def digest(content: Any) -> str:
    """Of JSON-able content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def counted(store: Store, what: str, ranks: tuple[int, ...], more: int) -> int:
    """How often this rank did `what` with these, `more` times now. Counted by the store: ranks of a
    later world are others.
    """
    return store.add(f"pylo_dist/{what}/{digest(ranks)}/{dist.get_rank()}", more)


def listed(ranks: Sequence[int]) -> str:
    """Ranks as errors show them."""
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    return shown if len(ranks) <= _SHOWN else f"{shown}, ... ({len(ranks)} of them)"


def timeout_of(group: Any, device: torch.device) -> float:
    """Seconds that the ranks of `group` wait for each other; the store's where the backend does not
    say.
    """
    try:
        return float(group._get_backend(device).options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return float(dist.distributed_c10d._get_default_store().timeout.total_seconds())  # type: ignore[attr-defined]


def meetings() -> int:
    """How many meetings this rank has gone to, or declined."""
    return len(_MEETINGS)


def _place(ranks: tuple[int, ...], number: int) -> str:
    """Where the store keeps a meeting of these ranks."""
    return f"pylo_dist/meeting/{digest(ranks)}/{number}"


def _next_meeting(store: Store, ranks: tuple[int, ...]) -> str:
    _MEETINGS.append(ranks)
    return _place(ranks, counted(store, "met", ranks, 1))


def meet(ranks: tuple[int, ...], what: str, entries: list[Any], timeout: float) -> None:
    """Wait until all these ranks are here, before collectives that a rank with an error of its own
    would never come to.

    Through the store: no process group is left out of step by whoever does not come.

    Args:
        ranks: rising; this one among them.
        entries: JSON-able; shown to those that are late, see `awaited_by`.
        timeout: seconds to wait for the last one.

    Raises:
        Declined: with what another rank has declined with.
        CommunicationError: one did not come in time; on all who come at all.
    """
    late, start = [rank for rank in ranks if rank != dist.get_rank()], time.monotonic()
    try:
        _meet(Store(timeout + GRACE), ranks, what, entries, timeout, late)
    except StoreError as error:
        raise CommunicationError(
            f"rank {dist.get_rank()} waited {time.monotonic() - start:.0f} s in {what} for the "
            f"ranks [{listed(late)}]: {error}"
        ) from error


def _meet(
    store: Store,
    ranks: tuple[int, ...],
    what: str,
    entries: list[Any],
    timeout: float,
    late: list[int],
) -> None:
    """See `meet`. `late` becomes the ranks that were not there when last looked for (modified in
    place).
    """
    mine = dist.get_rank()
    place = _next_meeting(store, ranks)
    start, pause, told = time.monotonic(), 0.001, False
    store.append(f"{place}/here", mine)
    arrived = store.add(f"{place}/arrived", 1)
    while True:
        if arrived >= _OVER and store.has(f"{place}/problem"):
            raise Declined(store.get(f"{place}/problem"))
        waited = time.monotonic() - start
        given_up, outcome = waited > timeout, _MET if arrived >= len(ranks) else ""
        if not outcome and (given_up or (waited > PATIENCE and not told)):
            here = set(store.ranks(f"{place}/here"))
            late[:] = [rank for rank in ranks if rank not in here]
            if given_up:
                outcome = (
                    f"rank {mine} waited {waited:.0f} s in {what} for the ranks [{listed(late)}], "
                    "which did not come"
                )
            else:
                told = True
                for rank in late:
                    store.set(f"pylo_dist/awaited/{rank}", json.dumps([mine, ranks, entries]))
        if outcome:
            # the first one holds for all, or one of them went on alone
            outcome = store.first(f"{place}/outcome", outcome)
            if outcome == _MET:
                return
            store.add(f"{place}/arrived", _OVER)
            raise CommunicationError(outcome)
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
        arrived = store.add(f"{place}/arrived", 0)


def decline(ranks: tuple[int, ...], problem: Exception) -> None:
    """Tell these ranks that this one does not come to the next meeting with them, and why."""
    store, text = Store(GRACE), f"rank {dist.get_rank()}: {problem}"
    with suppress(StoreError):  # then they learn no more than that it did not come
        place = _next_meeting(store, ranks)
        store.set(f"{place}/problem", text)
        store.add(f"{place}/arrived", _OVER)


def awaited_by(timeout: float) -> tuple[int, tuple[int, ...], list[Any]] | None:
    """A rank that waits for this one, the ranks that meet there, and its entries; None if nobody
    does.

    Raises:
        CommunicationError: the store did not answer within `timeout` seconds.
    """
    store, mine = Store(timeout), dist.get_rank()
    try:
        if not store.has(f"pylo_dist/awaited/{mine}"):
            return None
        rank, ranks, entries = json.loads(store.get(f"pylo_dist/awaited/{mine}"))
        place = _place(tuple(ranks), counted(store, "met", tuple(ranks), 0) + 1)
        # else this one came meanwhile
        waits = store.has(f"{place}/here") and rank in store.ranks(f"{place}/here")
        return (rank, tuple(ranks), entries) if waits else None
    except StoreError as error:
        raise CommunicationError(
            f"rank {mine} asked for {timeout:.0f} s whether others wait for it: {error}"
        ) from error


def lost(what: str, ranks: Sequence[int], error: Exception) -> CommunicationError:
    """Tell the other survivors among `ranks` that this one has given up, and name those that say
    nothing.
    """
    mine = dist.get_rank()
    # whoever lost a peer too says so; one that died or went another way does not
    silent = [rank for rank in ranks if rank != mine]
    with suppress(StoreError):  # it may have died with its rank; what is known is said all the same
        store, until, pause = Store(GRACE), time.monotonic() + GRACE, 0.05
        store.append("pylo_dist/gave_up", mine)
        while silent and time.monotonic() < until:
            said = set(store.ranks("pylo_dist/gave_up"))
            silent = [rank for rank in silent if rank not in said]
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
    who = (
        f"The missing one is among rank(s) {listed(silent)}, which did not report the same"
        if silent
        else ""
    )
    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CommunicationError(
        f"rank {mine} lost the other ranks of its group in {what}: {cause}. {who}".strip()
    )
