"""Ranks that fail alone, and processes that meet again in another world: nobody waits, nobody goes
on alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from environment import free_port
from torch import nn

import pylo_dist
from pylo_dist import comm
from pylo_dist.comm import PeerError, collectives, meeting
from support.golden import velo_weights
from support.ranks import CONTEXT, run_ranks

ORDERS = ((0, 1, 2), (2, 0, 1))  # ranks of the three processes in the first world, and in the next


def ranks_and_worlds(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"velo": velo_beside_a_bad_gradient(rank), "sums": []}
    dist.barrier()
    found["late"] = late_for_a_meeting(rank, world)
    found["added"] = [added_up(rank, world, dtype) for dtype in DTYPES]
    dist.destroy_process_group()
    for i, order in enumerate(ORDERS):
        place = f"file://{folder}/{i}"
        dist.init_process_group(
            "gloo",
            init_method=place,
            rank=order[rank],
            world_size=world,
            timeout=timedelta(seconds=20),
        )
        if order[rank] < 2:
            total = torch.tensor([float(order[rank] + 1)])
            dist.all_reduce(total, group=comm.group_over((0, 1)))
            comm.meet((0, 1), "this test", ["x"], 20.0)
            found["sums"].append(float(total))
        dist.barrier()
        if i + 1 < len(ORDERS):  # the last one is the caller's to end
            dist.destroy_process_group()
    return found


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parts_of(rank: int, world: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank has for all, (world, 37); one number of rank 1 is none."""
    generator = torch.Generator().manual_seed(rank)
    parts = torch.randn(world, 37, generator=generator, dtype=torch.float64).to(dtype)
    if rank == 1:
        parts[2, 5] = math.nan
    return parts


def added_up(rank: int, world: int, dtype: torch.dtype) -> bool:
    """Whether a reduce-scatter has the bits of a sum in the order of the ranks; what is sent stays
    as it was.
    """
    full, mine = parts_of(rank, world, dtype), torch.empty(37, dtype=dtype)
    comm.reduce_scatter(mine, full.view(-1), dist.group.WORLD, "this test").wait()
    wanted = parts_of(0, world, dtype)[rank]
    for other in range(1, world):
        wanted += parts_of(other, world, dtype)[rank]
    pairs = (mine, wanted), (full, parts_of(rank, world, dtype))
    alike = [torch.equal(a.nan_to_num(1e3), b.nan_to_num(1e3)) for a, b in pairs]
    return all(alike) and bool(mine.isnan().any()) == (rank == 2)


def late_for_a_meeting(rank: int, world: int) -> tuple[str, float]:
    """Two ranks give up waiting for the third, which comes after that; then all meet."""
    said, ranks = "no error", tuple(range(world))
    if rank == world - 1:
        dist.barrier(comm.group_over(ranks))
    start = time.monotonic()
    try:
        comm.meet(ranks, "this test", [], 0.5 if rank < world - 1 else 60.0)
    except comm.CommunicationError as error:
        said = str(error)
    seconds = time.monotonic() - start
    if rank < world - 1:
        dist.barrier(comm.group_over(ranks))
    comm.meet(ranks, "this test", [], 20.0)
    return said, seconds


def velo_beside_a_bad_gradient(rank: int) -> dict[str, Any]:
    """As under DDP: copies of a parameter, of which nothing is reduced but the loss; one rank has a
    gradient it cannot use.
    """
    param = nn.Parameter(torch.ones(8, 6))
    optimizer = pylo_dist.VeLO([("w", param)], weights=velo_weights("small"), num_steps=50)
    for step in range(3):
        param.grad = torch.full((8, 6), 0.5 + step)
        if (step, rank) == (1, 1):
            param.grad = param.grad.to_sparse()
        before, said = param.detach().clone(), ""
        try:
            optimizer.step(torch.tensor(1.0))
        except ValueError as error:
            said = f"ValueError: {error}"
        except PeerError as error:
            said = f"PeerError: {error}"
        if step == 1:
            outcome = {"said": said, "changed": not torch.equal(before, param)}
    return {
        **outcome,
        "param": param.detach().clone(),
        "step": int(optimizer.param_groups[0]["step"]),
    }


def test_ranks_that_fail_alone_and_worlds_that_follow_each_other(tmp_path: Path) -> None:
    results = run_ranks(3, ranks_and_worlds, str(tmp_path))
    velo = [result["velo"] for result in results]
    assert "sparse gradient" in velo[1]["said"]
    assert all(velo[rank]["said"].startswith("PeerError") for rank in (0, 2))
    assert not any(v["changed"] for v in velo)
    assert [v["step"] for v in velo] == [2, 2, 2]
    assert all(torch.equal(v["param"], velo[0]["param"]) for v in velo)
    for said, seconds in (result["late"] for result in results):
        assert re.fullmatch(
            r"rank [01] waited \d s in this test for the ranks \[2\], which did not come", said
        ), said
        assert seconds < 15.0
    assert all(all(result["added"]) for result in results)
    # pairs of other processes in each world
    assert sorted(len(result["sums"]) for result in results) == [1, 1, 2]
    assert {total for result in results for total in result["sums"]} == {3.0}


def beside_a_stopped_host(rank: int, port: int, ready: Any, results: Any) -> None:
    """Rank 0 keeps the store, as under mpirun and srun, and stands still."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=1),
    )
    ready.wait()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)
    buffer = torch.ones(2)
    works: dict[str, Callable[[], Any]] = {
        "lost": lambda: comm.all_reduce(buffer, dist.group.WORLD, "the sums of this test").wait()
    }
    if rank == 1:
        works = {
            "meet": lambda: comm.meet((0, 1), "this meeting", [], 1.0),
            "make": lambda: comm.group_over((0, 1)),
            "asked": lambda: comm.awaited_by(1.0),
            "decline": lambda: comm.decline((0, 1), ValueError("what is not told")),
        }

    def outcome(work: Callable[[], Any]) -> tuple[str, float]:
        start, said = time.monotonic(), "no error"
        try:
            work()
        except comm.CommunicationError as error:
            said = str(error)
        return said, time.monotonic() - start

    with ThreadPoolExecutor() as pool:
        found = dict(zip(works, pool.map(outcome, works.values()), strict=True))
    results.put(found)


def test_a_store_whose_host_stands_still_holds_nobody() -> None:
    ready, results, port = CONTEXT.Barrier(3), CONTEXT.Queue(), free_port()
    processes = [
        CONTEXT.Process(target=beside_a_stopped_host, args=(rank, port, ready, results))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    try:
        found = {**results.get(timeout=60), **results.get(timeout=60)}
        for process in processes[1:]:
            process.join(10)
        assert [process.exitcode for process in processes[1:]] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    silent = "the store of the process group does not answer"
    wanted = {
        "lost": r"rank 2 lost .* in the sums of this test: .* among rank\(s\) 0, 1, which did not",
        "meet": rf"rank 1 waited \d s in this meeting for the ranks \[0\]: {silent}",
        "make": rf"rank 1 waited \d s in the making of a process group .* \[0, 1\]: {silent}",
        "asked": rf"rank 1 asked for 1 s whether others wait for it: {silent}",
        "decline": "no error",
    }
    for name, (said, seconds) in found.items():
        assert re.match(wanted[name], said), said
        assert seconds < 1 + comm.GRACE + 1, name


def test_a_process_without_descriptors_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    handles = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(comm.CommunicationError, match=r"rank 3 .* may have to open 100 files"):
            collectives.new_group(list(range(92)), 1.0, backend="cpu:gloo,cuda:nccl")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(os.listdir("/proc/self/fd")) == handles


class ComesNow:
    """A store in which the second rank comes just after the first one has looked for it the last
    time.
    """

    def __init__(self) -> None:
        self.store, self.rank, self.said = dist.HashStore(), 0, {}  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str) -> bytes:
        there: bytes = self.store.get(key)
        if key.endswith("/here") and self.rank == 0:
            self.meet(1, 60.0)
        return there

    def meet(self, rank: int, timeout: float) -> None:
        before, self.rank = self.rank, rank
        try:
            comm.meet((0, 1), "this test", [], timeout)
            self.said[rank] = "met"
        except comm.CommunicationError as error:
            self.said[rank] = str(error)
        self.rank = before


def test_nobody_goes_on_alone_when_the_last_one_comes_as_the_others_give_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = ComesNow()
    monkeypatch.setattr(dist, "get_rank", lambda: store.rank)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(meeting, "_next_meeting", lambda store, ranks: "meeting")
    store.meet(0, 0.0)
    assert store.said == {0: "met", 1: "met"}


class LastOneLate:
    """A store that counts what is asked of it; of 4096 ranks this one is here, 4094 are too, and
    the last one comes after 0.8 s.
    """

    def __init__(self) -> None:
        self.store, self.calls, self.begin = dist.HashStore(), 0, time.monotonic()
        self.store.append("meeting/here", "".join(f"{rank}," for rank in range(1, 4095)))
        self.store.add("meeting/arrived", 4094)

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        if name == "add" and time.monotonic() > self.begin + 0.8:
            self.begin = math.inf
            self.store.add("meeting/arrived", 1)
        return getattr(self.store, name)


def test_a_rank_that_waits_among_thousands_asks_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    store = LastOneLate()
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(meeting, "_next_meeting", lambda store, ranks: "meeting")
    comm.meet(tuple(range(4096)), "this test", ["entry"], 20.0)
    assert 10 < store.calls < 30
    rank, ranks, entries = json.loads(store.store.get("pylo_dist/awaited/4095"))
    assert (rank, len(ranks), entries) == (0, 4096, ["entry"])
    assert not store.store.check(["pylo_dist/awaited/4094"])


def test_errors_say_what_the_collective_was_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "broadcast", breaks)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", dist.HashStore)
    monkeypatch.setattr(collectives, "ranks_of", lambda group: [0])
    for context, said in (
        (comm.during("the saving of a checkpoint"), r"in a broadcast \(the saving of a check"),
        (nullcontext(), "in a broadcast: Connection closed"),
    ):
        with context, pytest.raises(comm.CommunicationError, match=said):
            comm.broadcast(torch.ones(1), 0, "group")


def test_errors_do_not_list_thousands_of_ranks() -> None:
    assert meeting.listed([1, 2]) == "1, 2"
    shown = meeting.listed(range(4096))
    assert shown.startswith("0, 1, 2, ")
    assert shown.endswith("15, ... (4096 of them)")


def groups_of_some_ranks(rank: int, world: int) -> float:
    if rank < 2:
        comm.group_over((0, 1))
    later = dist.new_group([1, 2])  # of which rank 2 knows nothing of the one before
    total = torch.ones(1)
    if rank:
        dist.all_reduce(total, group=later)
    return float(total)


def test_a_users_groups_are_made_after_ours_of_some_ranks() -> None:
    assert run_ranks(3, groups_of_some_ranks) == [1.0, 2.0, 2.0]
