"""What many small tensors cost the host in a plain optimizer: counted calls, Python's and C's, for
every tensor more.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pylo_dist.core.pieces import bind_shard
from pylo_dist.core.shards import TensorShard
from support.optimizers import OPTIMIZERS

SHAPES = ((8, 8), (16,), (4, 16), (2, 4, 8))


def named(tensors: int) -> list[tuple[str, nn.Parameter]]:
    found = [(f"p{i}", nn.Parameter(torch.ones(SHAPES[i % 4]))) for i in range(tensors)]
    for _, param in found:
        param.grad = torch.ones_like(param)
    return found


def calls_of(work: Callable[[], Any]) -> int:
    counted = 0

    def count(frame: Any, event: str, of: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # else it calls what others have registered
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return counted


def costs(name: str, tensors: int) -> dict[str, int]:
    case, params = OPTIMIZERS[name], named(tensors)

    def build() -> Any:
        return case.face(params, **case.arguments)

    def step() -> None:
        optimizer.step(torch.tensor(1.0))

    optimizer = build()
    for _ in range(3):  # the first ones make tables
        step()
    saved = optimizer.state_dict()
    counted = {
        "step": calls_of(step),
        "state_dict": calls_of(optimizer.state_dict),
        "load": calls_of(lambda: optimizer.load_state_dict(saved)),
    }
    return {**counted, "construct": calls_of(build)}


# per tensor, each with up to six tensors of state; torch's own share among them
LIMITS = {"state_dict": 8, "load": 90, "construct": 140}
STEP = {"AdafacLO": 13, "VeLO": 18, "CELO2": 50}


@pytest.mark.parametrize("name", ["AdafacLO", "VeLO", "CELO2"])
def test_a_tensor_more_costs_few_calls(name: str) -> None:
    few, many = costs(name, 40), costs(name, 240)
    more = {what: (many[what] - few[what]) / 200 for what in few}
    limits = {**LIMITS, "step": STEP[name]}
    assert all(more[what] <= limits[what] for what in more), more


def test_a_piece_of_a_flat_tensor_costs_a_step_no_more_than_a_whole_tensor() -> None:
    whole = named(240)
    pieces = [(name, nn.Parameter(param.detach().clone().view(-1))) for name, param in whole]
    for (name, param), (_, piece) in zip(whole, pieces, strict=True):
        bind_shard(piece, [TensorShard.whole(name, tuple(param.shape))], 0, None)
        piece.grad = torch.ones_like(piece)
    case, counted = OPTIMIZERS["AdafacLO"], []
    for params in (whole, pieces):
        optimizer = case.face(params, **case.arguments)
        for _ in range(3):
            optimizer.step()
        counted.append(calls_of(optimizer.step))
    assert counted[1] <= 1.05 * counted[0], counted
