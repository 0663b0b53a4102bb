"""Matrices that travel to their owners and back, whatever the cuts, in few copies."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from pylo_dist.core.cuts import EvenCuts
from pylo_dist.core.pieces import ShardedParam
from pylo_dist.core.requests import Exchange
from pylo_dist.core.shards import TensorShard
from pylo_dist.maths.owners import OwnedMatrices


def dealt(cuts: Sequence[Sequence[TensorShard]], ranks: int) -> list[OwnedMatrices]:
    """As every rank deals them."""
    return [
        OwnedMatrices.deal(
            range(len(cuts)),
            [ShardedParam(peers[r], torch.empty(0), None, True, "g", peers, r) for peers in cuts],
        )
        for r in range(ranks)
    ]


def carried(exchanges: Sequence[Exchange]) -> None:
    """What an all-to-all does."""
    transfers = [exchange.transfers[0] for exchange in exchanges]
    sent = [t.send.split(t.send_counts) for t in transfers]
    for r, transfer in enumerate(transfers):
        assert [parts[r].numel() for parts in sent] == transfer.receive_counts
        transfer.receive.copy_(torch.cat([parts[r] for parts in sent]))


def random_cuts(draw: random.Random, ranks: int) -> list[Sequence[TensorShard]]:
    found: list[Sequence[TensorShard]] = []
    for i in range(draw.randint(1, 6)):
        shape = (draw.randint(1, 9), draw.randint(1, 9))
        numel = shape[0] * shape[1]
        if draw.random() < 0.3:  # Shard(1)
            step = -(-shape[1] // ranks)
            bounds = [min(r * step, shape[1]) for r in range(ranks + 1)]
            found.append(
                [TensorShard.block(f"p{i}", shape, 1, *bounds[r : r + 2]) for r in range(ranks)]
            )
        else:
            part = -(-numel // ranks) + draw.randint(0, 5)
            offset = draw.randint(0, ranks * part - numel)
            found.append(EvenCuts(f"p{i}", shape, part, offset, ranks))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_matrix_is_whole_at_its_owner_and_comes_back(ranks: int) -> None:
    draw = random.Random(ranks)
    for _ in range(40):
        cuts = random_cuts(draw, ranks)
        wholes = [torch.randn(peers[0].shape) for peers in cuts]
        everyone = dealt(cuts, ranks)
        pieces = [
            {i: peers[r].take(wholes[i]) for i, peers in enumerate(cuts)} for r in range(ranks)
        ]
        there = [o.to_owners(p, torch.empty(0)) for o, p in zip(everyone, pieces, strict=True)]
        carried(there)
        mine = [o.assemble(exchange) for o, exchange in zip(everyone, there, strict=True)]
        assert sorted(i for some in mine for i in some) == list(range(len(cuts)))
        for some in mine:
            for i, whole in some.items():
                assert torch.equal(whole, wholes[i])
        back = [
            o.give_back({i: 2 * whole for i, whole in some.items()}, torch.empty(0))
            for o, some in zip(everyone, mine, strict=True)
        ]
        carried(back)
        for o, exchange, some in zip(everyone, back, pieces, strict=True):
            got = o.pieces(exchange)
            assert all(torch.equal(got[i], 2 * some[i]) for i in some)


def test_a_matrix_over_thousands_of_ranks_is_a_few_copies() -> None:
    ranks, shape = 2048, (96, 128)
    # cut by two buckets' boundaries: a head, whole parts, a tail
    cuts = [EvenCuts("a", shape, 16, 5, ranks), EvenCuts("b", shape, 7, 12, ranks)]
    for r in (0, 1):
        owned = OwnedMatrices.deal(
            range(2),
            [ShardedParam(peers[r], torch.empty(0), None, True, "g", peers, r) for peers in cuts],
        )
        assert len(owned.mine) == 1
        assert len(owned.runs) <= 3
        assert not owned.boxes
