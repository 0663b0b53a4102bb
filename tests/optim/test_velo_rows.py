"""VeLO's LSTM rows under cuts: where they are computed and kept, how they are saved and loaded, and
that those of a tensor on several ranks are the same there.

That any cut is the uncut run to the layout tolerance: tests/contracts/test_virtual_ranks.py.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from pylo_dist.core.cuts import EvenCuts
from pylo_dist.core.pieces import bind_shard
from pylo_dist.core.shards import TensorShard
from pylo_dist.maths.lstm import LSTM, TensorRows
from pylo_dist.optimizer.sharded_state import ShardedState
from pylo_dist.testing import VirtualGroup, VirtualRun, largest_changes, layout_error, run_virtual
from support.golden import velo_weights
from support.optimizers import VELO

ROWS = ("lstm_hidden", "lstm_cell")
# in two buckets: large tensors, which several ranks hold, among small ones, of which one has many
BUCKETS = (
    {"a": (40, 9), "b": (5,), "c": (3, 3), "d": (11,), "e": (2, 2), "f": (90,), "g": (4, 5)},
    {"h": (6, 7), "i": (1,), "j": (8, 30), "k": (9,), "l": (13, 2)},
)
SHAPES = {fqn: shape for bucket in BUCKETS for fqn, shape in bucket.items()}
STEPS = 4


def cuts(ranks: int) -> dict[str, EvenCuts]:
    """As ZeRO has them: at every border between ranks a tensor may lie on both."""
    found = {}
    for bucket in BUCKETS:
        part = -(-sum(map(math.prod, bucket.values())) // ranks)
        offset = 0
        for fqn, shape in bucket.items():
            found[fqn] = EvenCuts(fqn, shape, part, offset, ranks)
            offset += math.prod(shape)
    return found


def dealt(ranks: int) -> dict[str, list[TensorShard]]:
    """Whole tensors, in turns."""
    return {
        fqn: [
            TensorShard.interval(fqn, s, 0, math.prod(s) * (i % ranks == r)) for r in range(ranks)
        ]
        for i, (fqn, s) in enumerate(SHAPES.items())
    }


def run(
    layout: Any, weights: Any = VELO, dtype: torch.dtype = torch.float32
) -> tuple[VirtualRun, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def tensors() -> dict[str, Tensor]:
        return {
            fqn: 0.1 * torch.randn(shape, generator=generator, dtype=dtype)
            for fqn, shape in SHAPES.items()
        }

    params, grads = tensors(), [tensors() for _ in range(STEPS)]
    grads[1].pop("d")  # of which no rank has a gradient: its row goes on
    losses = [2.0 - 0.1 * t for t in range(STEPS)]
    arguments = {"weights": weights, "num_steps": 50}
    return run_virtual(pylo_dist.VeLO, params, layout, grads, losses=losses, **arguments), params


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every call of the cell computed."""
    counts: list[int] = []
    original = LSTM.step

    def step(self: LSTM, mixed: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(len(hidden))
        return original(self, mixed, hidden, cell)

    monkeypatch.setattr(LSTM, "step", step)
    return counts


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
@pytest.mark.parametrize("alone", [True, False], ids=["by themselves", "among zeros"])
def test_a_rank_computes_and_keeps_the_rows_of_its_tensors(
    ranks: int, alone: bool, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By themselves where that rounds as all together do, which is up to the machine: else tensors
    on several ranks would differ there. Of 16 ranks some have no tensor.
    """
    monkeypatch.setattr(TensorRows, "_rounds_alike", lambda *_: alone)
    layout: Any = dealt(ranks) if alone else cuts(ranks)
    found, params = run({fqn: list(shards) for fqn, shards in layout.items()})
    held = [{fqn for fqn, shards in layout.items() if shards[r].numel} for r in range(ranks)]
    rows = sum(map(len, held)) if alone else sum(len(SHAPES) for mine in held if mine)
    assert sum(computed) == STEPS * rows
    for optimizer, mine in zip(found.optimizers, held, strict=True):
        for binding, param in optimizer.layouts():
            for name in ROWS:
                kept = optimizer.state[param][name].numel() > 0
                assert kept == (binding.shard.fqn in mine), (name, binding.shard)
        # what it does not compute it does not know
        known = {f for f, row in optimizer.stats().items() if row["lr_mult"].isfinite()}
        assert known == mine
    assert found.reductions == [2] * STEPS
    whole, _ = run(1)
    change = largest_changes([params, *whole.history])
    assert max(layout_error(found.params, whole.params, change).values()) <= 1.0
    for fqn, state in whole.state.items():
        assert not torch.equal(state["lstm_hidden"], VELO["lstm_init_state.0"][0])
        wanted = {name: state[name] for name in ROWS}
        largest = {name: row.abs().max() for name, row in wanted.items()}
        assert max(layout_error(found.state[fqn], wanted, largest).values()) <= 1.0, fqn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_row_has_the_same_bits_on_all_of_its_ranks(dtype: torch.dtype) -> None:
    """With the published sizes, at which a product of few rows rounds otherwise than one of many:
    each rank has others beside it.
    """
    found, _ = run({f: list(c) for f, c in cuts(4).items()}, velo_weights("release"), dtype)
    keepers: Counter[int] = Counter()
    for fqn in SHAPES:
        states = [
            next(o.state[p] for b, p in o.layouts() if b.shard.fqn == fqn) for o in found.optimizers
        ]
        for name in ROWS:
            kept = [state[name] for state in states if state[name].numel()]
            assert all(torch.equal(row, kept[0]) for row in kept), (fqn, name)
        keepers[len(kept)] += 1
    assert {*keepers} >= {1, 2, 3}


def test_rows_are_tried_anew_with_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a product that rounds alike on one thread and not on two, ranks would keep other bits."""
    mixed, steps, tried = LSTM.mixed, [0], []

    def counted(self: LSTM, inputs: Tensor) -> Tensor:
        steps[0] += 1
        return mixed(self, inputs)

    def rounds_alike(*_: Any) -> bool:
        tried.append(torch.get_num_threads())
        return True

    monkeypatch.setattr(LSTM, "mixed", counted)
    monkeypatch.setattr(TensorRows, "_rounds_alike", rounds_alike)
    # of two ranks, from the third step on
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + steps[0] // 4)
    run({fqn: list(c) for fqn, c in cuts(2).items()})
    assert tried == [1, 1, 2, 2]


def built(ranks: int, rank: int) -> pylo_dist.VeLO:
    group, named = VirtualGroup(ranks), []
    for fqn, c in cuts(ranks).items():
        piece = nn.Parameter(torch.zeros(c[rank].numel))
        bind_shard(piece, c, rank, group)
        named.append((fqn, piece))
    return pylo_dist.VeLO(named, weights=VELO, num_steps=50, process_group=False)


def test_rows_are_loaded_by_the_ranks_that_keep_them() -> None:
    """From whole tensors, and from any cut in which this rank has them; else it is said."""
    params = [(fqn, nn.Parameter(torch.zeros(shape))) for fqn, shape in SHAPES.items()]
    whole = pylo_dist.VeLO(params, weights=VELO, num_steps=50, process_group=False)
    for i, state in enumerate(whole.state.values()):
        for name in ROWS:
            state[name].copy_(torch.arange(float(state[name].numel())) + 100 * i)
    given = whole.state_dict()
    for rank in range(3):
        optimizer = built(3, rank)
        optimizer.load_state_dict(given)
        saved = optimizer.state_dict()
        for i, c in enumerate(cuts(3).values()):
            for name in ROWS:
                row, wanted = saved["state"][i][name], given["state"][i][name]
                assert isinstance(row, ShardedState)
                assert tuple(row.shape) == tuple(wanted.shape)
                assert len(row.__create_write_items__("row", row)) == bool(c[rank].numel)
                assert not c[rank].numel or torch.equal(row.local, wanted)
        again = built(3, rank)
        again.load_state_dict(copy.deepcopy(saved))
        for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    other = built(2, 0)
    saved = built(4, 3).state_dict()
    saved["state"] = {
        i: {k: v if k in ROWS else given["state"][i][k] for k, v in state.items()}
        for i, state in saved["state"].items()
    }
    with pytest.raises(ValueError, match=r"'lstm_hidden' of 'a': \d+ elements of this rank are on"):
        other.load_state_dict(saved)
