"""What a step of ZeroOptimizer costs the host: counted calls, on rank 0 of a world that is not
there.
"""

from __future__ import annotations

import gc
import itertools
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pylo_dist
from pylo_dist.adapters.zero.boxes import boxes_by_slice, boxes_in
from support.fake_ranks import world_of
from support.optimizers import OPTIMIZERS


def built(name: str, tensors: int) -> tuple[list[nn.Parameter], pylo_dist.ZeroOptimizer]:
    """Four tensors a bucket."""
    case = OPTIMIZERS[name]
    params = [nn.Parameter(torch.zeros(16, 32)) for _ in range(tensors)]
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    optimizer = pylo_dist.ZeroOptimizer(
        named,
        case.face,
        stage=2,
        bucket_cap_mb=4 * 512 * 4 / 2**20,
        **{**case.arguments, "nonfinite": "skip"},  # nothing is received: the sums hold anything
    )
    assert len(optimizer.buckets) == tensors // 4
    return params, optimizer


def counted_calls(work: Callable[[], object]) -> int:
    counted = 0

    def count(frame: Any, event: str, of: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted


def calls_of_a_step(name: str, tensors: int) -> int:
    params, optimizer = built(name, tensors)
    counted = 0
    for _ in range(3):  # the first ones make tables
        for param in params:
            param.grad = torch.zeros_like(param)
        counted = counted_calls(lambda: optimizer.step(torch.tensor(1.0)))
    return counted


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "CELO2"])
def test_a_step_costs_the_host_the_same_whatever_the_ranks(name: str) -> None:
    counted = {}
    for ranks in (8, 256):
        with world_of(ranks):
            counted[ranks] = calls_of_a_step(name, 16)
    # rank 0's part of a bucket holds parts of two of its tensors, or of one
    assert counted[256] <= 1.05 * counted[8], counted


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO"])
def test_a_step_costs_the_host_as_much_per_tensor_in_many_buckets_as_in_few(name: str) -> None:
    with world_of(8):
        few, many = calls_of_a_step(name, 16), calls_of_a_step(name, 128)
    assert many <= 1.05 * 8 * few, (few, many)


def calls_of_sending(in_slices: bool) -> int:
    """A large tensor that leaves in slices of 1 MB, and many small ones beside it."""
    params = [nn.Parameter(torch.zeros(n)) for n in (5 * 2**20, *[16] * 400)]
    optimizer = pylo_dist.ZeroOptimizer(params, torch.optim.SGD, stage=2, bucket_cap_mb=1.0)
    (bucket,) = optimizer.buckets
    assert len(bucket.slices) == 20
    if not in_slices:
        bucket.slices = [(0, bucket.shard_numel)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return counted_calls(optimizer.reduce_gradients)


def test_small_tensors_beside_a_large_one_cost_the_host_no_more_for_its_slices() -> None:
    with world_of(8):
        slices, one = calls_of_sending(True), calls_of_sending(False)
    assert slices <= 1.5 * one, (slices, one)


def test_what_thousands_of_ranks_hold_takes_no_memory() -> None:
    taken = {}
    for ranks in (8, 2048):
        with world_of(ranks):
            built("AdafacLO", 8)  # modules are imported, caches filled
            gc.collect()
            tracemalloc.start()
            kept = built("AdafacLO", 64)
            gc.collect()
            taken[ranks] = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            del kept
    assert taken[2048] < 1.2 * taken[8], taken


def test_gradients_find_their_places_whatever_the_cuts() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(300):
        ranks, part, gap = drawn(1, 9), drawn(1, 9), drawn(1, 9)
        total = ranks * part
        begin, end = sorted(drawn(0, total + 1) for _ in range(2))
        first, stop = sorted(drawn(0, part + 1) for _ in range(2))
        flat = torch.arange(float(begin), float(end))
        full = torch.full((ranks, stop - first + gap), -1.0)
        boxes = boxes_in(part, (first, stop), begin, end)
        assert len(boxes) <= 3
        places = [box.place(full) for box in boxes]
        parts = [box.source(flat) for box in boxes]
        if places:
            torch._foreach_copy_(places, parts)
        wanted = torch.full((total,), -1.0)
        wanted[begin:end] = flat
        where = (ranks, part, gap, begin, end, first, stop)
        assert torch.equal(full[:, : stop - first], wanted.view(ranks, part)[:, first:stop]), where
        assert torch.equal(full[:, stop - first :], torch.full((ranks, gap), -1.0)), where


def test_slices_hold_every_member_and_the_padding_once() -> None:
    generator = torch.Generator().manual_seed(1)

    def cuts(total: int, most: int) -> list[tuple[int, int]]:
        inner = torch.randint(0, total + 1, (most,), generator=generator).tolist()
        return [*itertools.pairwise(sorted({0, *inner, total}))]

    for _ in range(300):
        ranks, part = (int(torch.randint(1, 9, (), generator=generator)) for _ in range(2))
        extents, slices = cuts(ranks * part, 6)[:5], cuts(part, 3)
        end = extents[-1][1]
        flats = [torch.arange(float(first), float(stop)) for first, stop in extents]
        found = boxes_by_slice(extents, end, part, ranks, slices)
        sent = []
        for (first, stop), inside in zip(slices, found, strict=True):
            full = torch.full((ranks, stop - first + 2), -1.0)
            for i, boxes in inside.members:
                assert boxes
                for box in boxes:
                    box.place(full).copy_(box.source(flats[i]))
            for box in inside.padding:
                box.place(full).zero_()
            assert torch.equal(full[:, stop - first :], torch.full((ranks, 2), -1.0))
            sent.append(full[:, : stop - first])
        wanted = torch.cat([torch.arange(float(end)), torch.zeros(ranks * part - end)])
        assert torch.equal(torch.cat(sent, 1), wanted.view(ranks, part)), (ranks, part, extents)
