"""Where the elements of DTensors lie. What is made of them: tests/contracts/test_real_ranks.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from pylo_dist.layouts.dtensor import _shard_at


class Fake:
    """A DTensor's layout, without its mesh's processes."""

    def __init__(
        self, shape: tuple[int, ...], sizes: tuple[int, ...], placements: list[Any]
    ) -> None:
        self.shape, self.placements, self.device_mesh, self.sizes = shape, placements, self, sizes
        self.ndim = len(sizes)

    def size(self, axis: int) -> int:
        return self.sizes[axis]


def test_geometry_of_three_axes() -> None:
    """HSDP over FSDP2 over TP needs eight ranks; where their elements lie does not."""
    whole = torch.arange(11 * 6).view(11, 6)
    for tp_dim, placements in (
        (0, [Replicate(), _StridedShard(0, split_factor=3), Shard(0)]),
        (1, [Replicate(), Shard(0), Shard(1)]),
    ):
        for dp, tp in itertools.product(range(2), range(3)):
            # TP first, in chunks of ceil(11 / 3)
            column = whole.tensor_split(3, 1)[tp] if tp_dim == 1 else whole.split(4)[tp]
            rows = column.split(-(-len(column) // 2))
            wanted = rows[dp].flatten() if dp < len(rows) else whole.new_empty(0)
            for copy in range(2):
                shard = _shard_at("w", Fake((11, 6), (2, 2, 3), placements), (copy, dp, tp))
                assert torch.equal(shard.indices(), wanted), (placements, dp, tp)
    for placements in (
        [Shard(1), Shard(2)],
        [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)],
    ):
        with pytest.raises(ValueError, match=r"'w'.*(cut on dimensions \[1, 2\]|cut in strides)"):
            _shard_at("w", Fake((4, 4, 4), (2, 2), placements), (0, 0))
