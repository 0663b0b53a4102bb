"""What is sent of a bucket: its gradients in their places, and a warning if they cannot be added.

The same with the kernel, which copies and looks in one reading, and with torch's operations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylo_dist
from pylo_dist.adapters.zero import reduction
from pylo_dist.adapters.zero.buckets import ALIGNMENT
from pylo_dist.maths import compiled
from support.copies import same_bits
from support.fake_ranks import world_of
from support.optimizers import small_fc

RANKS = 3
SHAPES = [(7, 5), (3,), (), (40, 9), (1, 2), (64,), (0, 4), (33, 3)]
NUMEL = sum(math.prod(shape) for shape in SHAPES) - 3  # one has no gradient
# gradients whose numbers do not lie one behind the other: a column, one number, another order
LAID_OUT = {
    5: lambda x: torch.stack([x, x], 1)[:, 0],
    4: lambda x: x[:, 1:].expand(1, 2),
    7: lambda x: x.t().contiguous().t(),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _three_ranks() -> Iterator[None]:
    with world_of(RANKS, rank=1):
        yield


class Reader(TorchDispatchMode):
    """Operations that were given as many float32 numbers as all gradients have."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            given = [x for x in leaves if isinstance(x, Tensor) and x.dtype == torch.float32]
            if sum(x.numel() for x in given) >= NUMEL:
                self.read.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def sent(
    patch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    fill: dict[int, float],
    slices: bool = False,
    **settings: Any,
) -> tuple[list[Tensor], list[str]]:
    """What leaves, (ranks, part and warning) each, and what read much."""
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = pylo_dist.ZeroOptimizer(
        [(f"p{i}", p) for i, p in enumerate(params)],
        pylo_dist.AdafacLO,
        weights=small_fc(),
        bucket_cap_mb=100,
        **settings,
    )
    if slices:
        for bucket in optimizer.buckets:
            bounds = [*range(0, bucket.shard_numel, 48), bucket.shard_numel]
            bucket.slices = [*itertools.pairwise(bounds)]
    left = list[Tensor]()

    def reduce_scatter(shard: Tensor, full: Tensor, *_: Any) -> Any:
        left.append(full.clone().view(RANKS, -1))
        shard.zero_()
        return pylo_dist.comm.Pending(None, "", None, (), None)

    patch.setattr(reduction.comm, "reduce_scatter", reduce_scatter)
    for i, p in enumerate(params):
        numbers = torch.randn(p.shape, generator=generator)
        numbers = (-numbers.abs() if i == 3 else numbers).to(dtype)
        if i in fill:
            numbers.view(-1)[numbers.numel() // 2] = fill[i]
        if i in LAID_OUT:
            numbers = LAID_OUT[i](numbers)
        p.grad = None if i == 1 else numbers  # one has none
    with Reader() as reader:
        optimizer.reduce_gradients()
    return left, reader.read


@pytest.mark.parametrize(
    ("dtype", "wanted", "in_slices"),
    [
        *((dtype, wanted, False) for dtype in DTYPES for wanted in (None, *DTYPES[1:])),
        *((dtype, None, True) for dtype in DTYPES),
    ],
)
def test_what_leaves_is_the_same_with_and_without_the_kernel(
    dtype: torch.dtype,
    wanted: torch.dtype | None,
    in_slices: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of finite numbers, and where one is none or, times the ranks, too large for the sums."""
    sums = wanted or torch.float32
    large = min(torch.finfo(dtype).max, torch.finfo(sums).max) * 0.9
    overflows = large * RANKS > torch.finfo(sums).max
    inf, nan = float("inf"), float("nan")
    cases = [({}, False), ({3: large}, overflows), ({0: -large}, overflows)]
    cases += [({2: inf}, True), ({7: -inf}, True), ({5: nan}, True)]
    settings = {"stage": 1, "reduce_dtype": wanted}
    settings |= {"stage": 2, "slices": True} if in_slices else {}
    for fill, bad in cases:
        found = []
        for enabled in (True, False):
            with compiled.use_kernels(enabled), monkeypatch.context() as patch:
                found.append(sent(patch, dtype, fill, **settings)[0])
        assert len(found[0]) == len(found[1]) > (1 if in_slices else 0)
        assert all(map(same_bits, *found)), (fill, dtype, wanted)
        warnings = torch.cat([full[:, -ALIGNMENT] for full in found[0]])
        assert bool(warnings.isnan().any()) == bad, (fill, dtype, wanted)
        assert bool((warnings.nan_to_num(0.0) == 0.0).all())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_copy_into_the_bucket_is_all_that_reads_the_whole_gradient(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = sent(monkeypatch, torch.float32, {}, stage=stage)[1]
    assert read.count("copy_pass") == 1
    # the stand-in for the network takes a copy; memory for the bucket is not read
    assert {*read} == {"copy_pass", "clone", "new_empty"}
    with compiled.use_kernels(False), monkeypatch.context() as patch:
        plain = sent(patch, torch.float32, {}, stage=stage)[1]
    assert ("_foreach_max" in plain) == (stage == 1)
    assert "aminmax" in plain
