"""Geometry: the blocks of a shard, its index list, and slicing the global tensor by hand are three
ways to say the same.

Background: rules read and write shards through `Box.view` and broadcast row and column factors
through `Box.window`, so one wrong stride is a silently wrong update. Shapes here are small enough
to try every interval.
"""

from __future__ import annotations

import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from pylo_dist.core.pieces import ShardBinding, bind_shard, bound_shard
from pylo_dist.core.shards import Box, TensorShard, drop_dim, factored_dims

SHAPES = [(), (1,), (5,), (3, 4), (1, 9), (4, 1), (2, 3, 4), (2, 1, 3, 2), (2, 2, 2, 2, 2)]


def elements(shape: tuple[int, ...]) -> Tensor:
    """The global tensor whose every element is its own C-order index."""
    return torch.arange(math.prod(shape)).view(shape)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(
        slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True)
    )


def check_boxes(shard: TensorShard) -> None:
    """The blocks show the right global elements and tile the local ones, in local order."""
    indices, whole, seen = (
        shard.indices(),
        elements(shard.shape),
        torch.zeros(shard.numel, dtype=torch.int64),
    )
    for box in shard.boxes():
        assert torch.equal(box.view(indices), whole[slices(box)]), (shard, box)
        own = box.indices(shard.shape, torch.device("cpu"))
        assert torch.equal(own, whole[slices(box)]), (shard, box)
        box.view(seen).add_(1)
    assert bool((seen == 1).all()), shard


def intervals(shape: tuple[int, ...]) -> list[TensorShard]:
    total = math.prod(shape)
    return [TensorShard.interval("p", shape, a, b) for a, b in combinations(range(total + 1), 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_equal_indices_for_every_interval(shape: tuple[int, ...]) -> None:
    for shard in intervals(shape):
        assert shard.indices().tolist() == list(range(shard.start, shard.start + shard.numel))
        assert len(shard.boxes()) <= max(1, 2 * len(shape) - 1), shard
        check_boxes(shard)
    for start in range(math.prod(shape) + 1):
        empty = TensorShard.interval("p", shape, start, start)
        assert (empty.numel, empty.boxes(), empty.indices().numel()) == (0, (), 0)


def test_whole_tensors_are_one_box() -> None:
    for shape in SHAPES:
        shard = TensorShard.whole("p", shape)
        assert shard.is_whole
        assert [(box.sizes, box.offsets) for box in shard.boxes()] == [(shape, (0,) * len(shape))]
    empty = TensorShard.whole("p", (0, 5))
    assert empty.is_whole
    assert empty.boxes() == ()


def test_view_keeps_leading_dims_and_the_offset_of_its_tensor() -> None:
    shard = TensorShard.interval("p", (3, 4), 2, 11)
    local = torch.stack([shard.indices(), 100 + shard.indices()])
    padded = torch.zeros(2, 15, dtype=torch.int64)
    padded[:, 3:12] = local
    for box in shard.boxes():
        wanted = elements((3, 4))[slices(box)]
        for tensor in (local, padded[:, 3:12]):
            assert torch.equal(box.view(tensor), torch.stack([wanted, 100 + wanted]))


@pytest.mark.parametrize("limit", [1, 2, 5, 7])
def test_split_tiles_a_box_in_order(limit: int) -> None:
    shards = [
        TensorShard.interval("p", (2, 3, 4), a, b) for a, b in ((0, 24), (1, 23), (5, 18), (9, 10))
    ]
    shards += [
        TensorShard.block("p", (3, 4, 2), 1, 1, 3),
        TensorShard.whole("p", ()),
        TensorShard.whole("p", (1, 9)),
    ]
    for shard in shards:
        indices, whole = shard.indices(), elements(shard.shape)
        for box in shard.boxes():
            parts = list(box.split(limit))
            assert all(0 < part.numel <= limit for part in parts)
            for part in parts:
                assert torch.equal(part.view(indices), whole[slices(part)])
            assert (
                torch.cat([part.view(indices).flatten() for part in parts]).tolist()
                == box.view(indices).flatten().tolist()
            )
            assert list(box.split(box.numel)) == [box]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) >= 2], ids=str)
def test_window_broadcasts_the_right_factor_entries(shape: tuple[int, ...]) -> None:
    """A factor has leading dims and the shape without one dim; a block needs its own part of it,
    whichever dim is gone.
    """
    for dropped in range(len(shape)):
        entries = elements(drop_dim(shape, dropped))
        whole = entries.unsqueeze(dropped).expand(shape)
        for shard in intervals(shape)[::3]:
            for box in shard.boxes():
                window = box.window(torch.stack([entries, -entries]), dropped)
                assert window.shape[1 + dropped] == 1
                assert torch.equal(window[0].expand(box.sizes), whole[slices(box)])
                assert torch.equal(window[1], -window[0])
                # also without leading dims
                assert torch.equal(box.window(entries, dropped), window[0])


@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 2), (2, 1, 3), (2, 3, 2, 2)], ids=str)
def test_blocks_are_slices_of_the_global_tensor(shape: tuple[int, ...]) -> None:
    """Shard(k) is a slice of dim k, Shard(k) x Shard(0) also one of dim 0; local elements in the C
    order of the slice.
    """
    whole = elements(shape)
    for dim in range(len(shape)):
        for first, stop in product(range(shape[dim] + 1), repeat=2):
            wanted = whole.narrow(dim, first, max(0, stop - first))
            shard = TensorShard.block("p", shape, dim, first, stop)
            assert shard.indices().tolist() == wanted.flatten().tolist()
            check_boxes(shard)
            for low, high in combinations(range(shape[0] + 1), 2) if dim else ():
                shard = TensorShard.block("p", shape, dim, first, stop, (low, high))
                assert shard.indices().tolist() == wanted[low:high].flatten().tolist()
                check_boxes(shard)


def test_a_block_may_end_within_a_run() -> None:
    """A shard of rows of a pitched box, cut anywhere: (4, 6), columns 1..4, its elements 0..7 of
    12.
    """
    shard = TensorShard("p", (4, 6), start=1, numel=7, run=3, pitch=6)
    assert shard.indices().tolist() == [1, 2, 3, 7, 8, 9, 13]
    check_boxes(shard)


def test_blocks_of_tensors_without_elements() -> None:
    assert TensorShard.block("p", (0, 5), 1, 0, 2, (0, 0)).numel == 0
    assert TensorShard.block("p", (3, 0), 1, 0, 0).numel == 0


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ((-1, 3, 3, 3), "start >= 0"),
        ((0, -1, 1, 1), "numel >= 0"),
        ((10, 3, 3, 3), "beyond the 12 elements"),
        ((13, 0, 1, 1), "empty shard"),
        ((0, 0, 2, 2), "empty shard"),
        ((0, 4, 0, 4), "1 <= run"),
        ((0, 4, 5, 5), "run <= min"),
        ((0, 4, 3, 2), "pitch"),
        ((0, 4, 4, 6), "single run"),
        ((0, 4, 2, 3), "trailing dimensions"),
        ((3, 4, 2, 4), "multiple of the pitch"),
        ((0, 8, 2, 4), "beyond the 12 elements"),
    ],
)
def test_invalid_shards_are_refused_with_the_numbers(
    numbers: tuple[int, int, int, int], why: str
) -> None:
    with pytest.raises(ValueError, match=why) as error:
        TensorShard("layer.weight", (3, 4), *numbers)
    start, numel, run, pitch = numbers
    assert (
        f"'layer.weight': shard (start={start}, numel={numel}, run={run}, pitch={pitch}) of shape "
        "(3, 4)" in str(error.value)
    )


@pytest.mark.parametrize(
    ("dim", "first", "stop", "rows"),
    [
        (1, 5, 6, (0, 2)),
        (1, -1, 0, (1, 3)),
        (1, 0, 6, None),
        (1, 0, 2, (0, 4)),
        (1, 0, 2, (-1, 2)),
        (2, 0, 1, None),
    ],
)
def test_blocks_outside_the_tensor_are_refused(
    dim: int, first: int, stop: int, rows: tuple[int, int] | None
) -> None:
    with pytest.raises(ValueError, match=r"'layer.weight'.*\(3, 5\)"):
        TensorShard.block("layer.weight", (3, 5), dim, first, stop, rows)


def test_two_cuts_of_dimension_0_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'layer.weight' is cut twice on dimension 0"):
        TensorShard.block("layer.weight", (3, 4), 0, 0, 1, (0, 2))


def test_bindings_know_their_tensor() -> None:
    shard = TensorShard.interval("p", (3, 4), 2, 9)
    param = torch.nn.Parameter(torch.zeros(7))
    assert bound_shard(param) is None
    assert bind_shard(param, [shard], 0, None) == ShardBinding(shard, None, [shard], 0)
    binding = bound_shard(param)
    assert binding is not None
    assert binding.shard is shard
    with pytest.raises(
        ValueError, match=r"'p': local tensor has shape \(3, 4\), its shard 7 elements"
    ):
        bind_shard(torch.zeros(3, 4), [shard], 0, None)


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((), None),
        ((13,), None),
        ((7, 5), (1, 0)),
        ((5, 7), (0, 1)),
        ((6, 6), (0, 1)),
        ((1, 9), (0, 1)),
        ((1, 1), (0, 1)),
        ((5, 5, 5), (1, 2)),
        ((3, 4, 5), (1, 2)),
        ((5, 4, 5), (0, 2)),
        ((64, 64, 3, 3), (0, 1)),
        ((3, 3, 64, 64), (2, 3)),
        ((4, 3, 3, 2), (2, 0)),
        ((2, 2, 6, 7), (2, 3)),
    ],
)
def test_factored_dims(shape: tuple[int, ...], dims: tuple[int, int] | None) -> None:
    """(d1, d0): second largest and largest. Ties go by the stable rule, the higher dim counts as
    the larger one.
    """
    assert factored_dims(shape) == dims
