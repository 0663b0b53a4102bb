"""State dicts of sharded optimizers: elements of whole tensors, other cuts, formats, torch's own
functions, masters.
"""

from __future__ import annotations

import copy
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import pylo_dist
from pylo_dist import checkpoint
from pylo_dist.core.pieces import PieceParameter, bind_shard
from pylo_dist.core.shards import TensorShard
from pylo_dist.optimizer.sharded_state import ShardedState, copy_elements
from support.layouts import (
    LEARNED,
    PLAIN,
    STEPS,
    Model,
    Run,
    differing,
    fresh,
    snapshot,
)
from support.optimizers import small_fc


def pieces(cuts: list[int], rank: int) -> tuple[list[tuple[str, nn.Parameter]], Model]:
    """This rank's pieces of a model, each parameter cut at these shares of eight."""
    model, named = Model(), []
    for fqn, p in model.trainable():
        bounds = [0, *(p.numel() * cut // 8 for cut in cuts), p.numel()]
        peers = [TensorShard.interval(fqn, p.shape, a, b) for a, b in pairwise(bounds)]
        piece = PieceParameter(peers[rank].take(p.detach()), p)
        bind_shard(piece, peers, rank, FakeGroup())
        named.append((fqn, piece))
    return named, model


class FakeGroup:
    """Stands in for a process group where no collective is called."""

    def size(self) -> int:
        return 2


def sharded(cuts: list[int], rank: int) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO(pieces(cuts, rank)[0], weights=small_fc(), process_group=False)


def filled(optimizer: torch.optim.Optimizer) -> Any:
    for i, state in enumerate(optimizer.state.values()):
        for name, tensor in state.items():
            values = torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
            tensor.copy_(values + 1000 * i + 0.25 * len(name))
    return optimizer


def whole() -> Any:
    return filled(pylo_dist.AdafacLO(Model().trainable(), weights=small_fc(), process_group=False))


def test_a_rank_takes_its_elements_out_of_whole_tensors() -> None:
    donor = whole()
    for rank in (0, 1, 2):
        optimizer = sharded([3, 3], rank)  # the second rank has nothing
        optimizer.load_state_dict(donor.state_dict())
        for i, (fqn, p) in enumerate(Model().trainable()):
            if not p.numel():
                continue
            state = optimizer.state_dict()["state"][i]
            mine, theirs = state["momentum"], donor.state_dict()["state"][i]["momentum"]
            assert tuple(mine.shape) == tuple(theirs.shape), fqn
            flat = theirs.reshape(3, -1)
            start = mine.shard.start
            assert torch.equal(mine.local, flat[:, start : start + mine.shard.numel]), fqn
            assert type(state.get("row", state.get("diag"))) is (
                Tensor if "row" in state else ShardedState
            )


def test_what_is_saved_is_said_of_the_whole_tensor() -> None:
    whole = TensorShard.interval("a", (6, 4), 4, 14)
    state = ShardedState(torch.zeros(10, dtype=torch.float64), (), whole)
    items = state.__create_write_items__("a", state)
    assert [tuple(item.tensor_data.chunk.sizes) for item in items] == [(2, 4), (1, 2)]
    for item in items:
        properties = item.tensor_data.properties
        assert (tuple(item.tensor_data.size), properties.dtype) == ((6, 4), torch.float64)
        assert getattr(properties, "strides", (4, 1)) == (4, 1)  # which torch 2.15 notes


def test_another_cut_serves_where_it_covers() -> None:
    donor = whole()
    larger, smaller = sharded([6], 0), sharded([3], 0)
    larger.load_state_dict(donor.state_dict())
    smaller.load_state_dict(larger.state_dict())
    wanted = sharded([3], 0)
    wanted.load_state_dict(donor.state_dict())
    assert not differing(*(dict(flat_local(o)) for o in (smaller, wanted)))
    before = dict(flat_local(larger))
    with pytest.raises(
        ValueError, match=r"'momentum' of 'embedding': \d+ elements of this rank are on other ranks"
    ):
        larger.load_state_dict(smaller.state_dict())
    assert not differing(dict(flat_local(larger)), before)


def flat_local(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        (f"{i}.{n}", t.clone())
        for i, state in enumerate(optimizer.state.values())
        for n, t in state.items()
    ]


def test_sharded_state_refuses_what_it_cannot_do() -> None:
    state = filled(sharded([3], 0)).state_dict()["state"][0]["momentum"]
    assert repr(state).startswith("ShardedState(79 of 212 elements of (3, 53, 4)")
    with pytest.raises(TypeError, match="full_state_dict"):
        torch.add(state, 1.0)
    with pytest.raises(TypeError, match="full_state_dict"):
        state.view(-1)
    with pytest.raises(TypeError, match="part of it"):
        torch.save(state, io.BytesIO())
    with pytest.raises(TypeError, match="same shape"):
        state.new_empty((2, 2))
    with pytest.raises(TypeError, match="full_state_dict"):
        torch.zeros(state.shape).copy_(state)
    copied = copy.deepcopy({"a": state, "b": state})
    assert copied["a"] is copied["b"]
    assert torch.equal(copied["a"].local, state.local)
    assert copied["a"].local.data_ptr() != state.local.data_ptr()
    wide = state.to(torch.float64)
    assert isinstance(wide, ShardedState)
    assert wide.dtype == wide.local.dtype == torch.float64
    target = torch.zeros_like(state)
    assert not target.local.any()
    target.copy_(state.detach().clone())
    assert torch.equal(target.local, state.local)
    target.copy_(torch.ones(state.shape))
    assert bool((target.local == 1.0).all())
    with pytest.raises(ValueError, match="are on other ranks"):
        copy_elements(filled(sharded([3], 1)).state_dict()["state"][0]["momentum"], target)


def test_the_state_says_its_format_rule_and_weights() -> None:
    state = whole().state_dict()
    group = state["param_groups"][0]
    assert group["state_format"] == 1
    assert group["state_rule"] == "small_fc"
    assert re.fullmatch(r"[0-9a-f]{64}", group["state_weights"])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    # numbers and strings, no pickle of ours
    assert json.dumps({k: v for k, v in loaded["param_groups"][0].items() if k != "step"})
    for key, message in (
        ("state_format", "state_format 7, this optimizer 1; it was saved by another version"),
        ("state_weights", "weights it was saved with"),
        ("state_rule", "build the optimizer that saved it"),
    ):
        broken = copy.deepcopy(loaded)
        broken["param_groups"][0][key] = 7
        with pytest.raises(ValueError, match=message):
            whole().load_state_dict(broken)
        del broken["param_groups"][0][key]
        with pytest.raises(ValueError, match=f"has no '{key}'"):
            whole().load_state_dict(broken)


def test_state_of_another_dtype_or_order_is_refused() -> None:
    state = copy.deepcopy(whole().state_dict())
    state["state"][0]["momentum"] = state["state"][0]["momentum"].to(torch.float16)
    with pytest.raises(
        ValueError, match=r"'momentum' of 'embedding': found torch.float16, wanted torch.float32"
    ):
        whole().load_state_dict(state)
    state = whole().state_dict()
    names = state["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]
    with pytest.raises(ValueError, match="'row' in the place of 'embedding'"):
        whole().load_state_dict(state)
    state["param_groups"][0]["param_names"] = [
        f"module._orig_mod.{fqn}" for fqn, _ in Model().trainable()
    ]
    optimizer = whole()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["param_names"] == [fqn for fqn, _ in Model().trainable()]


@pytest.mark.parametrize("kind", LEARNED)
def test_torch_functions_on_a_plain_optimizer(kind: str) -> None:
    """With a frozen, a tied, a 0-d and an empty parameter, strict, in every option that needs no
    second rank.
    """
    run = Run(PLAIN, kind, None)
    run.advance(STEPS)
    wanted = copy.deepcopy(snapshot(run))
    for options in (
        {},
        {"flatten_optimizer_state_dict": True},
        {"cpu_offload": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
    ):
        given = StateDictOptions(**options)
        theirs = get_optimizer_state_dict(run.model, run.optimizer, options=given)
        ours = pylo_dist.get_optimizer_state_dict(run.model, run.optimizer, options=given)
        assert repr(theirs) == repr(ours)
        other = fresh(kind)
        set_optimizer_state_dict(other.model, other.optimizer, theirs, options=given)
        other.model.load_state_dict(run.model.state_dict())
        assert not differing(snapshot(other), wanted), options
        # reading it, and torch's step with zero gradients, changed nothing
        assert not differing(snapshot(run), wanted), options


def test_parameters_without_names_load_by_position(tmp_path: Path) -> None:
    """`AdafacLO(model.parameters())` has no names to save; ZeroOptimizer always has them."""
    model = Model()
    unnamed = filled(
        pylo_dist.AdafacLO(
            [p for _, p in model.trainable()], weights=small_fc(), process_group=False
        )
    )
    sharded_one = pylo_dist.ZeroOptimizer(
        Model(1), pylo_dist.AdafacLO, weights=small_fc(), process_group=False
    )
    for source, target in ((unnamed, sharded_one), (filled(sharded_one), unnamed)):
        folder = tmp_path / type(source).__name__
        dcp.save({"o": source.state_dict()}, checkpoint_id=folder, no_dist=True)
        for state in target.state.values():
            for tensor in state.values():
                tensor.zero_()
        contents = {"o": target.state_dict()}
        dcp.load(contents, checkpoint_id=folder, no_dist=True)
        target.load_state_dict(contents["o"])
        assert not differing(*(dict(flat_local(o)) for o in (source, target)))
    # names that were loaded stay: the next save has them
    names = [fqn for fqn, _ in model.trainable()]
    assert unnamed.param_groups[0]["param_names"] == names
    assert sharded_one.param_groups[0]["param_names"] == [fqn for fqn, _ in model.trainable()]


def with_masters(model: nn.Module, **kwargs: Any) -> Any:
    return pylo_dist.ZeroOptimizer(
        model,
        pylo_dist.AdafacLO,
        weights=small_fc(),
        process_group=False,
        master_weights=True,
        **kwargs,
    )


def test_masters_travel_where_both_sides_have_them(tmp_path: Path) -> None:
    """Only some layouts keep float32 masters of bfloat16 parameters: others ignore them; who misses
    them takes the parameter.
    """

    def stepped(optimizer: Any, model: Model) -> None:
        for fqn, p in model.trainable():
            p.grad = torch.full_like(p, 0.125 * (1 + len(fqn)))
        optimizer.step()

    def masters(optimizer: Any) -> dict[str, Tensor]:
        state = optimizer.state_dict()["state"]
        return {str(i): entry["master"].clone() for i, entry in state.items() if "master" in entry}

    models = {
        name: Model(i).to(torch.bfloat16)
        for i, name in enumerate(("sharded", "again", "plain", "back"))
    }
    first = with_masters(models["sharded"])
    stepped(first, models["sharded"])
    assert {t.dtype for t in masters(first).values()} == {torch.float32}
    checkpoint.save(tmp_path / "a", {"model": models["sharded"], "optimizer": first})

    again = with_masters(models["again"])
    checkpoint.load(tmp_path / "a", {"model": models["again"], "optimizer": again})
    assert not differing(masters(again), masters(first))
    rounded = {i: t.to(torch.bfloat16).to(torch.float32) for i, t in masters(first).items()}
    assert differing(masters(first), rounded)  # they hold more than the parameters

    plain = pylo_dist.AdafacLO(models["plain"].trainable(), weights=small_fc(), process_group=False)
    checkpoint.load(tmp_path / "a", {"model": models["plain"], "optimizer": plain})
    assert not differing(models["plain"].state_dict(), models["sharded"].state_dict())
    checkpoint.save(tmp_path / "b", {"model": models["plain"], "optimizer": plain})
    back = with_masters(models["back"])
    checkpoint.load(tmp_path / "b", {"model": models["back"], "optimizer": back})
    stepped(back, models["back"])
    fresh_model = Model(7).to(torch.bfloat16)
    fresh_model.load_state_dict(models["plain"].state_dict())
    wanted = with_masters(fresh_model)
    wanted.load_state_dict(plain.state_dict())
    stepped(wanted, fresh_model)
    assert not differing(masters(back), masters(wanted))


def test_a_piece_is_its_parameter_as_a_key() -> None:
    named, model = pieces([3], 0)
    piece, param = named[0][1], model.embedding
    assert {param: "whole"}[piece] == "whole"
    assert {piece: "piece"}[param] == "piece"
    assert piece in {param}
    assert named[1][1] not in {param}
    assert torch.equal(piece == piece.detach().clone(), torch.ones(piece.shape, dtype=torch.bool))
