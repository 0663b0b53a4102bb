"""Others beside a ZeroOptimizer in one backward pass: a second one, DDP, the user's collectives, on
ranks that reach different parameters in another order; and whoever changes what was sent.

A hook delays a rank's gradients now and then, so that arrivals interleave differently.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pylo_dist
from pylo_dist import comm
from pylo_dist.adapters.zero.gathering import PendingParameter
from pylo_dist.testing import largest_changes, layout_error
from support.optimizer_cases import snapshot
from support.optimizers import small_fc
from support.ranks import run_ranks

STEPS = 3
SMALL = 1e-4  # MB of a bucket: about one tensor
Values = dict[str, Tensor]


class Branches(nn.Module):
    """A net of which a rank uses one branch or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head = nn.Linear(8, 13), nn.Linear(13, 3)
        self.x, self.y = nn.Linear(13, 13), nn.Linear(13, 13)

    def forward(self, data: Tensor, use: str) -> Tensor:
        hidden = torch.tanh(self.a(data))
        for name in use:
            hidden = hidden + getattr(self, name)(hidden)
        return self.head(hidden)


def loss_of(model: nn.Module, step: int, rank: int, use: str | None = None) -> Tensor:
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
    use = ("xy" if (step + rank) % 2 else "x") if use is None else use
    return model(data, use).square().mean()


def learned(params: Any, **kwargs: Any) -> Any:
    return pylo_dist.ZeroOptimizer(params, pylo_dist.AdafacLO, weights=small_fc(), **kwargs)


def split(model: nn.Module) -> tuple[list[Any], list[Any]]:
    named = list(model.named_parameters())
    return [p for p in named if p[1].dim() == 2], [p for p in named if p[1].dim() != 2]


def of_one_process(world: int, use: str | None = None, split_too: bool = True) -> Values:
    model = Branches()
    matrices, rest = split(model) if split_too else (list(model.named_parameters()), [])
    optimizers: list[torch.optim.Optimizer] = [
        pylo_dist.AdafacLO(matrices, weights=small_fc(), process_group=False)
    ]
    if rest:
        optimizers.append(torch.optim.AdamW([p for _, p in rest], lr=1e-3))
    for step in range(STEPS):
        model.zero_grad()
        torch.stack([loss_of(model, step, r, use) for r in range(world)]).mean().backward()
        for param in (param for _, param in rest):
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        for optimizer in optimizers:
            optimizer.step()
    return snapshot(model)


def away(values: Values, wanted: Values) -> float:
    first = snapshot(Branches())
    return max(layout_error(values, wanted, largest_changes([first, wanted])).values())


def delay(model: nn.Module, rank: int) -> None:
    """Gradients of every other parameter are late, of others on each rank."""
    for i, param in enumerate(model.parameters()):
        if i % 2 == rank % 2:
            param.register_hook(lambda _: time.sleep(0.005))


def two_optimizers(rank: int, **kwargs: Any) -> Values:
    model = Branches()
    delay(model, rank)
    matrices, rest = split(model)
    first = learned(matrices, **kwargs)
    second = pylo_dist.ZeroOptimizer(rest, torch.optim.AdamW, lr=1e-3, **kwargs)
    for step in range(STEPS):
        for optimizer in (first, second):
            optimizer.zero_grad()
        loss_of(model, step, rank).backward()
        for optimizer in (second, first):
            optimizer.step()
    return snapshot(model)


def beside_collectives(rank: int) -> Values:
    """The user's own all_reduce, which waits, as the gradients of some parameters arrive; DDP
    averages a second model in the same pass.
    """
    model, other = Branches(), DistributedDataParallel(nn.Linear(3, 2), bucket_cap_mb=1e-5)
    optimizer = learned(model, bucket_cap_mb=SMALL)
    delay(model, rank)
    sums = torch.zeros(3)
    for bias in (model.a.bias, model.head.bias):
        bias.register_post_accumulate_grad_hook(lambda _: dist.all_reduce(sums.fill_(1.0)))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step, rank)
        (loss + 0.0 * other(torch.ones(1, 3) * loss.detach()).sum()).backward()
        optimizer.step()
    assert torch.equal(sums, torch.full((3,), 2.0))
    return snapshot(model)


def inside_ddp(rank: int, **kwargs: Any) -> Values:
    model = Branches()
    wrapped = DistributedDataParallel(model)
    optimizer = learned(wrapped, **kwargs)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, step, rank, "xy").backward()
        optimizer.step()
    return snapshot(model)


def with_groups(rank: int) -> tuple[Values, list[str], int]:
    """Decay groups without names, and the module they are of."""
    model = Branches()
    matrices, rest = split(model)
    groups = [{"params": [p for _, p in part], "weight_decay": 0.0} for part in (matrices, rest)]
    optimizer, pending = learned(groups, module=model), 0
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, rank, "xy").backward()
        optimizer.step()
        pending += sum(isinstance(param, PendingParameter) for param in model.parameters())
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    return snapshot(model), names, pending


def said_by(
    rank: int,
    change: Callable[[nn.Module, Any], None],
    wrap: bool = False,
    kind: Any = pylo_dist.AdafacLO,
    **kwargs: Any,
) -> str:
    """What a step says after the gradients were changed; nothing may have moved."""
    model = Branches()
    run: nn.Module = DistributedDataParallel(model) if wrap else model
    if kind is pylo_dist.AdafacLO:
        kwargs["weights"] = small_fc()
    optimizer = pylo_dist.ZeroOptimizer(model, kind, **kwargs)
    before = snapshot(model)
    loss_of(run, 0, rank, "xy").backward()
    try:
        change(model, optimizer)
        optimizer.step()
    except (ValueError, comm.PeerError) as error:
        assert all(torch.equal(before[fqn], p) for fqn, p in snapshot(model).items())
        return f"{type(error).__name__}: {error}"
    return "taken"


def pieces_of(optimizer: Any) -> list[Tensor]:
    return [piece for group in optimizer.param_groups for piece in group["params"]]


def clip_pieces(model: nn.Module, optimizer: Any) -> None:
    """As Lightning does it."""
    nn.utils.clip_grad_norm_(pieces_of(optimizer), 1e-3)


def clip_nothing(model: nn.Module, optimizer: Any) -> None:
    """A bound that no rank's own norm reaches, which leaves no trace."""
    nn.utils.clip_grad_norm_((piece for piece in pieces_of(optimizer)), 1e9)


def clip_by_hand(model: nn.Module, optimizer: Any) -> None:
    pieces = pieces_of(optimizer)
    norm = nn.utils.get_total_norm([piece.grad for piece in pieces if piece.grad is not None])
    nn.utils.clip_grads_with_norm_(pieces, 1e-3, norm)


def clip_model(model: nn.Module, optimizer: Any) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clip_values(model: nn.Module, optimizer: Any) -> None:
    """Elementwise: exact on pieces."""
    nn.utils.clip_grad_value_(pieces_of(optimizer), 1e9)


def scale_pieces(model: nn.Module, optimizer: Any) -> None:
    """By one number on all ranks, then elementwise on one of them; both are the user's to do."""
    for group in optimizer.param_groups:
        for piece in group["params"]:
            piece.grad.mul_(0.3)
            if dist.get_rank():
                piece.grad.clamp_(-1e-3, 1e-3)


def add_up(model: nn.Module, optimizer: Any) -> None:
    for param in model.parameters():
        dist.all_reduce(param.grad)


def groups_made(world: int) -> tuple[int, int]:
    """Process groups after three optimizers at a time, and after twelve one after the other."""
    kept = [learned(Branches()) for _ in range(3)]
    many = len(dist.distributed_c10d._world.pg_map)
    del kept
    for _ in range(12):
        gc.collect()
        learned(Branches())
    return many, len(dist.distributed_c10d._world.pg_map)


def wrong_module() -> str:
    try:
        learned([{"params": Branches().parameters()}], module=Branches())
    except ValueError as error:
        return str(error)
    return "taken"


def others(rank: int, world: int) -> dict[str, Any]:
    gc.disable()  # ranks that collect garbage at other times must not matter
    every = itertools.product((1, 2), (SMALL, 25), (True, False))
    found: dict[str, Any] = {
        f"stage {stage}, buckets of {cap} MB, overlap {overlap}": two_optimizers(
            rank, stage=stage, bucket_cap_mb=cap, overlap=overlap, timeout=20.0
        )
        for stage, cap, overlap in every
    }
    alone = [dist.new_group([member]) for member in range(world)][rank]
    found["stage 2, whole replicas"] = two_optimizers(
        rank, stage=2, process_group=alone, replicate_group=dist.group.WORLD, bucket_cap_mb=SMALL
    )
    found["collectives"] = beside_collectives(rank)
    found["ddp"] = inside_ddp(rank)
    found["groups"] = with_groups(rank)
    found["said"] = [
        said_by(rank, add_up),
        said_by(rank, lambda *_: None, wrap=True),
        said_by(rank, lambda *_: None),
    ]
    kinds: tuple[Any, ...] = (pylo_dist.AdafacLO, torch.optim.AdamW)
    found["clipped"] = [
        said_by(rank, change, kind=kind, stage=stage, overlap=overlap)
        for kind in kinds
        for stage, overlap in ((1, True), (2, True), (1, False))
        for change in (clip_pieces, clip_by_hand)
    ] + [said_by(rank, clip_nothing, kind=kind, stage=2) for kind in kinds]
    found["freed"] = [
        said_by(rank, change, kind=kind, stage=2)
        for kind in kinds
        for change in (clip_model, lambda model, _: model.zero_grad(set_to_none=False))
    ]
    found["scaled"] = [
        said_by(rank, change)
        for change in (
            scale_pieces,
            lambda _, optimizer: pylo_dist.clip_grad_norm_(optimizer, 1e-3),
            clip_values,
        )
    ]
    found["wrong module"] = wrong_module()
    try:
        inside_ddp(rank, stage=2)
    except ValueError as error:
        found["stage 2"] = str(error)
    if rank:
        gc.collect()  # this rank has groups free that the other one still holds
    found["made"] = groups_made(world)
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(2, others)


def test_two_optimizers_of_one_group_step_as_one_process_in_every_order_of_arrival(
    results: list[dict[str, Any]],
) -> None:
    wanted = of_one_process(2)
    for result in results:
        for case, values in result.items():
            if case.startswith("stage ") and case != "stage 2":
                assert away(values, wanted) <= 1.0, case


def test_ddp_and_collectives_of_the_user_may_send_in_the_same_pass(
    results: list[dict[str, Any]],
) -> None:
    wanted, both = (of_one_process(2, use, split_too=False) for use in (None, "xy"))
    for result in results:
        assert away(result["collectives"], wanted) <= 1.0
        assert away(result["ddp"], both) <= 1.0
        assert "train that without DDP" in result["stage 2"]


def test_groups_with_their_module_overlap_and_have_its_names(
    results: list[dict[str, Any]],
) -> None:
    both = of_one_process(2, "xy", split_too=False)
    names = [fqn for part in split(Branches()) for fqn, _ in part]
    for values, found, pending in (result["groups"] for result in results):
        assert away(values, both) <= 1.0
        assert (found, pending > 0) == (names, True)
    assert all("is none of module=Branches" in result["wrong module"] for result in results)


def test_gradients_changed_after_they_left_are_refused_and_say_by_whom(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        summed, in_ddp, alone = result["said"]
        assert "a collective of your own" in summed
        assert "DistributedDataParallel averages" in in_ddp or in_ddp.startswith("PeerError")
        assert alone == "taken"
    assert any("DistributedDataParallel" in result["said"][1] for result in results)


def test_pieces_clipped_by_each_rank_for_itself_are_refused_and_scaled_alike_are_not(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        assert all("pylo_dist.clip_grad_norm_" in said for said in result["clipped"])
        assert result["scaled"] == ["taken", "taken", "taken"]


def test_gradients_that_stage_2_has_freed_are_not_taken_for_none(
    results: list[dict[str, Any]],
) -> None:
    for result in results:
        assert len(result["freed"]) == 4
        for said in result["freed"]:
            assert said.startswith("ValueError: ZeroOptimizer, stage 2, has averaged"), said
            assert "optimizer.zero_grad()" in said


def test_process_groups_of_collected_optimizers_are_used_again(
    results: list[dict[str, Any]],
) -> None:
    for many, later in (result["made"] for result in results):
        assert later <= many + 1
