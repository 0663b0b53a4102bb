"""What ranks hold as a formula: every element once, as the layouts that cut so have it."""

from __future__ import annotations

import itertools
import random
from itertools import pairwise

import pytest
import torch

from pylo_dist.core.cuts import Cuts, EvenCuts, GridCuts
from pylo_dist.core.shards import TensorShard


def test_even_cuts_are_the_intervals_of_a_flat_tensor() -> None:
    draw = random.Random(0)
    for _ in range(300):
        ranks, part = draw.randint(1, 9), draw.randint(1, 40)
        shape = (draw.randint(0, 6), draw.randint(1, 7))
        numel = shape[0] * shape[1]
        if ranks * part < numel:
            continue
        offset = draw.randint(0, ranks * part - numel)
        bounds = [min(max(rank * part - offset, 0), numel) for rank in range(ranks + 1)]
        wanted = [TensorShard.interval("w", shape, a, b) for a, b in pairwise(bounds)]
        cuts = EvenCuts("w", shape, part, offset, ranks)
        assert [*cuts] == wanted == cuts[:]
        assert cuts[-1] == wanted[-1]
        assert sum(shard.numel for shard in cuts) == numel


def test_grid_cuts_are_chunks_of_chunks() -> None:
    whole = torch.arange(11 * 6).view(11, 6)
    order = (5, 0, 3, 1, 4, 2)
    # dimension 0 by the second axis and then by the first, or dimensions 0 and 1
    for axes in (((0, (1, 0)),), ((0, (0,)), (1, (1,)))):
        cuts = GridCuts("w", (11, 6), (2, 3), axes)
        found = [shard.indices() for shard in cuts]
        assert torch.cat(found).sort().values.tolist() == list(range(66))
        for place, (i, j) in enumerate(itertools.product(range(2), range(3))):
            if len(axes) == 1:
                rows = whole.split(4)[j].split(-(-len(whole.split(4)[j]) // 2))
                wanted = rows[i]
            else:
                wanted = whole.chunk(2, 0)[i].chunk(3, 1)[j]
            assert torch.equal(found[place], wanted.flatten()), (axes, place)
        turned = GridCuts("w", (11, 6), (2, 3), axes, order)
        assert [turned[rank] for rank in range(6)] == [cuts[place] for place in order]


@pytest.mark.parametrize(
    "cuts", [EvenCuts("w", (4,), 2, 0, 2), GridCuts("w", (4,), (2,), ((0, (0,)),))]
)
def test_only_ranks_that_exist_have_a_shard(cuts: Cuts) -> None:
    assert len(cuts) == 2
    for rank in (2, -3):
        with pytest.raises(IndexError, match=f"rank {rank} of 2"):
            cuts[rank]


def test_two_inner_dimensions_cannot_be_cut() -> None:
    cuts = GridCuts("w", (4, 4, 4), (2, 2), ((1, (0,)), (2, (1,))))
    with pytest.raises(ValueError, match=r"'w'.*cut on dimensions \[1, 2\]"):
        cuts[0]
