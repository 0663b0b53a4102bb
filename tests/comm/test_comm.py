"""Ranks that fail alone, and processes that meet again in another world: nobody waits, nobody goes
on alone.
"""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pylo_dist
from pylo_dist import comm
from pylo_dist.comm import PeerError, meeting
from support.golden import velo_weights
from support.ranks import run_ranks

ORDERS = ((0, 1, 2), (2, 0, 1))  # ranks of the three processes in the first world, and in the next


def ranks_and_worlds(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"velo": velo_beside_a_bad_gradient(rank), "sums": []}
    dist.barrier()
    found["late"] = late_for_a_meeting(rank, world)
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
    # pairs of other processes in each world
    assert sorted(len(result["sums"]) for result in results) == [1, 1, 2]
    assert {total for result in results for total in result["sums"]} == {3.0}


class ComesNow:
    """A store in which the second rank comes just after the first one has looked for it the last
    time.
    """

    def __init__(self) -> None:
        self.store, self.rank, self.said = dist.HashStore(), 0, {}  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def check(self, keys: list[str]) -> bool:
        there = self.store.check(keys)
        if keys[0].endswith("/here/1") and self.rank == 0:
            self.meet(1, 60.0)
        return bool(there)

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
    monkeypatch.setattr(meeting, "_next_meeting", lambda ranks: "meeting")
    store.meet(0, 0.0)
    assert store.said == {0: "met", 1: "met"}


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
