"""ZeroOptimizer with real backward passes on gloo processes: stages 1 and 2, overlap, accumulation,
masters, scalers, faults.

Background: the loss of a model of parts is sum(p * g) with integer-valued g that differ by rank and
micro-batch. Backward then gives exactly g, whatever the parameters are, sums over micro-batches and
ranks are exact in any order, and the loss itself shows at once a parameter that was read before its
values had arrived.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylo_dist
from pylo_dist import comm
from pylo_dist.adapters.zero.freed import FreedGradient
from pylo_dist.adapters.zero.gathering import PendingParameter
from pylo_dist.testing import largest_changes, layout_error
from support.optimizer_cases import snapshot
from support.optimizers import Roles, cases, small_fc
from support.ranks import run_ranks
from support.streams import early_pass_on_a_cpu

STEPS = 6
MICRO = 4  # micro-batches of a step
Gradients = dict[str, Tensor]


class Part(nn.Module):
    """Some parameters whose gradients are given."""

    def __init__(self, name: str, generator: torch.Generator, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.path = name
        for key, shape in shapes.items():
            self.register_parameter(
                key, nn.Parameter(0.1 * torch.randn(shape, generator=generator))
            )

    def forward(self, total: Tensor, wanted: Gradients) -> Tensor:
        for key, param in self.named_parameters():
            if f"{self.path}.{key}" in wanted:
                total = total + (param * wanted[f"{self.path}.{key}"].to(param.dtype)).sum().to(
                    total.dtype
                )
        return total


class Net(nn.Module):
    """Parts with a tied parameter, a 0-d one, odd sizes, one that is unused everywhere and one that
    is used now and then.
    """

    def __init__(self, seed: int = 0, how: str = "plain") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.how = how
        self.first = Part("first", generator, weight=(53, 4), scale=())
        self.second = Part("second", generator, weight=(12, 17), bias=(17,))
        self.third = Part("third", generator, weight=(3, 5, 2), one=(1,), unused=(4, 3))
        self.fourth = Part("fourth", generator, weight=(40, 6), sometimes=(7, 3))
        self.fourth.tied = self.first.weight

    def forward(self, wanted: Gradients) -> Tensor:
        total = torch.zeros((), requires_grad=True)
        for part in (self.first, self.second, self.third, self.fourth):
            if self.how == "plain":
                total = part(total, wanted)
            else:
                total = checkpoint(part, total, wanted, use_reentrant=self.how == "reentrant")
        return total


def wanted(model: nn.Module, step: int, rank: int, micro: int) -> Gradients:
    """Integers / 256; `sometimes` only where rank + micro-batch is odd."""
    generator = torch.Generator().manual_seed(1 + step * 1000 + rank * 100 + micro)
    result = {}
    for fqn, p in model.named_parameters():
        grad = torch.randint(-32, 33, p.shape, generator=generator) / 256.0
        if fqn != "third.unused" and (fqn != "fourth.sometimes" or (rank + micro) % 2):
            result[fqn] = grad
    return result


def total_gradient(model: nn.Module, step: int, world: int, micros: int) -> Gradients:
    """What one process must get: the mean over ranks of the sum over micro-batches."""
    total: Gradients = {}
    for rank in range(world):
        for micro in range(micros):
            for fqn, grad in wanted(model, step, rank, micro).items():
                total[fqn] = total.get(fqn, torch.zeros_like(grad)) + grad
    return {fqn: grad / world for fqn, grad in total.items()}


def reference(
    world: int,
    micros: int,
    scale: Callable[[int], float | None] = lambda step: 1.0,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> list[Gradients]:
    """Parameters after every step of one process; `scale(step)` multiplies the gradients, None
    skips the step.
    """
    optimizer_class = kwargs.pop("optimizer_class", pylo_dist.AdafacLO)
    model = Net().to(dtype).to(torch.float32)  # a master starts from the rounded value
    optimizer = optimizer_class(model.named_parameters(), **kwargs)
    history = [snapshot(model)]
    for step in range(STEPS):
        factor = scale(step)
        grads = total_gradient(model, step, world, micros)
        for fqn, p in model.named_parameters():
            p.grad = None if factor is None or fqn not in grads else grads[fqn] * factor
        if factor is not None:
            optimizer.step(torch.tensor(2.0 - 0.125 * step))
        history.append(snapshot(model))
    return history


def kinds() -> dict[str, dict[str, Any]]:
    some = cases(Roles(widths={}, embedding="^$"), ("AdafacLO", "VeLO_clipped"))
    return {name: {"optimizer_class": case.face, **case.arguments} for name, case in some.items()}


def backward(
    model: Net, optimizer: Any, step: int, rank: int, micros: int, no_sync: bool, run: Any = None
) -> None:
    call = model if run is None else run
    for micro in range(micros):
        if no_sync and micro < micros - 1:
            with optimizer.no_sync():
                call(wanted(model, step, rank, micro)).backward()
        else:
            call(wanted(model, step, rank, micro)).backward()


def num_gradients(model: nn.Module) -> int:
    """How many parameters hold one; not what stands for those that were freed."""
    grads = (p.grad for p in model.parameters())
    return sum(grad is not None and not isinstance(grad, FreedGradient) for grad in grads)


def train(
    rank: int, kind: str, *, micros: int = 1, no_sync: bool = False, model: Any = None, **zero: Any
) -> dict[str, Any]:
    """STEPS steps of ZeroOptimizer; parameters after each, and what was on the model in between."""
    model = model or Net(seed=rank)
    run: Any = zero.pop("run", None)
    optimizer = pylo_dist.ZeroOptimizer(model, bucket_cap_mb=0.0005, **{**kinds()[kind], **zero})
    history, kept, pending = [snapshot(model)], [], []
    for step in range(STEPS):
        backward(model, optimizer, step, rank, micros, no_sync, run)
        kept.append(num_gradients(model))
        optimizer.step(torch.tensor(2.0 - 0.125 * step))
        pending.append(sum(isinstance(p, PendingParameter) for p in model.parameters()))
        optimizer.zero_grad()
        history.append(snapshot(model))
    return {"history": history, "kept": kept, "pending": pending, "buckets": len(optimizer.buckets)}


def ranks_with_backward(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for stage in (1, 2):
        for overlap in (True, False):
            for kind in kinds():
                results[f"{kind} {stage} {overlap}"] = train(
                    rank, kind, stage=stage, overlap=overlap
                )
            for no_sync in (True, False):
                results[f"micro {stage} {overlap} {no_sync}"] = train(
                    rank, "AdafacLO", stage=stage, overlap=overlap, micros=MICRO, no_sync=no_sync
                )
    for how in ("reentrant", "not reentrant"):
        results[how] = train(rank, "AdafacLO", stage=2, model=Net(seed=rank, how=how))
    model = Net(seed=rank)
    results["compiled"] = train(
        rank, "AdafacLO", stage=2, model=model, run=torch.compile(model, backend="aot_eager")
    )
    model = Net(seed=rank)
    compiled = torch.compile(model, backend="aot_eager")
    results["compiled and eager"] = train(
        rank, "AdafacLO", stage=2, model=model, run=lambda grads: (model(grads), compiled(grads))[1]
    )
    results["bf16"] = train(rank, "AdafacLO", stage=2, model=Net(seed=rank).to(torch.bfloat16))
    results["early"] = early_pass(rank)
    results["order"] = order_of_launches(rank)
    results["pieces"] = edited_pieces(rank)
    results["edited"] = edited_gradients(rank)
    results["scaler"] = scaled(rank, world)
    results["replicas"] = damaged_replica(rank, world, "AdafacLO", "row")
    results["rows"] = damaged_replica(rank, world, "VeLO_clipped", "lstm_cell")
    results["build"] = failing_construction(rank)
    results["late"] = late_group(rank)
    return results


def order_of_launches(rank: int) -> dict[str, Any]:
    """When buckets leave, and in which order."""
    model = Net(seed=rank)
    optimizer = pylo_dist.ZeroOptimizer(
        model, pylo_dist.AdafacLO, weights=small_fc(), stage=2, bucket_cap_mb=0.0005
    )
    left: list[str] = []
    original = comm.reduce_scatter

    def recorded(
        shard: Tensor, full: Tensor, group: Any, what: str, timeout: float | None = None
    ) -> comm.Pending:
        left.append(what.split()[-1])
        return original(shard, full, group, what, timeout)

    comm.reduce_scatter = recorded
    try:
        others = {"third.unused": torch.ones(4, 3), "fourth.sometimes": torch.ones(7, 3)}
        model({**wanted(model, 0, rank, 1), **others}).backward()
        in_backward = list(left)
        kept = [num_gradients(model)]
        optimizer.param_groups  # noqa: B018  closes nothing: the round is over
        after_all_used = list(left)
        optimizer.step()
        left.clear()
        # `unused` is in some bucket, which must wait, and those behind it
        model(wanted(model, 1, rank, 0)).backward()
        before_flush = list(left)
        grads = [p.grad is not None for group in optimizer.param_groups for p in group["params"]]
        after_flush = list(left)
        kept.append(num_gradients(model))
    finally:
        comm.reduce_scatter = original
    return {
        "in_backward": in_backward,
        "after_all_used": after_all_used,
        "before_flush": before_flush,
        "after_flush": after_flush,
        "grads": grads,
        "kept": kept,
        "buckets": len(optimizer.buckets),
    }


def early_pass(rank: int) -> list[list[int]]:
    """How many tensors the gradient pass reads during backward, and in the step after one piece was
    changed.
    """
    model = Net(seed=rank)
    with early_pass_on_a_cpu():
        optimizer = pylo_dist.ZeroOptimizer(
            model, pylo_dist.AdafacLO, weights=small_fc(), stage=2, bucket_cap_mb=0.0005
        )
    calls: list[int] = []
    rule = optimizer.inner.rule
    original = rule.gradient_pass

    def counted(batch: Any, indices: Any) -> None:
        indices = list(indices)
        calls.append(len(indices))
        original(batch, indices)

    rule.gradient_pass = counted
    others = {"third.unused": torch.ones(4, 3), "fourth.sometimes": torch.ones(7, 3)}
    pieces, seen = optimizer.param_groups[0]["params"], []
    for step in range(4):
        calls.clear()
        model({**wanted(model, step, rank, 1), **others}).backward()
        seen.append(sum(calls))
        if step == 1:
            optimizer.reduce_gradients()
            pieces[0].grad *= 2.0
        if step == 2:
            optimizer.param_groups  # noqa: B018
        if step == 3:
            optimizer.zero_grad()
            model({**wanted(model, step, rank, 1), **others}).backward()
        optimizer.step()
        seen.append(sum(calls))
    return [seen, [len(pieces)]]


def edited_pieces(rank: int) -> list[Gradients]:
    """Gradients of the pieces may be changed between backward and step."""
    model = Net(seed=rank)
    with early_pass_on_a_cpu():
        optimizer = pylo_dist.ZeroOptimizer(
            model, pylo_dist.AdafacLO, weights=small_fc(), stage=2, bucket_cap_mb=0.0005
        )
    history = [snapshot(model)]
    for step in range(STEPS):
        backward(model, optimizer, step, rank, 1, False)
        for group in optimizer.param_groups:
            for piece in group["params"]:
                piece.grad.mul_(0.5)
        optimizer.step()
        history.append(snapshot(model))
    return history


def edited_gradients(rank: int) -> dict[str, Any]:
    """Full gradients may be changed after backward without overlap; with it this is an error on all
    ranks.
    """
    outcome: dict[str, Any] = {}
    model = Net(seed=rank)
    optimizer = pylo_dist.ZeroOptimizer(
        model, pylo_dist.AdafacLO, weights=small_fc(), overlap=False, bucket_cap_mb=0.0005
    )
    outcome["history"] = [snapshot(model)]
    for step in range(STEPS):
        backward(model, optimizer, step, rank, 1, False)
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= 0.5
        optimizer.step()
        optimizer.zero_grad()
        outcome["history"].append(snapshot(model))
    for stage in (1, 2):
        model = Net(seed=0)
        optimizer = pylo_dist.ZeroOptimizer(
            model, pylo_dist.AdafacLO, weights=small_fc(), stage=stage, bucket_cap_mb=0.0005
        )
        before = snapshot(model)
        backward(model, optimizer, 0, rank, 1, False)
        if rank == 0:
            model.second.weight.grad = torch.ones(12, 17)
        try:
            optimizer.step()
        except (ValueError, pylo_dist.PeerError) as error:
            outcome[f"error {stage}"] = f"{type(error).__name__}: {error}"
        outcome[f"unchanged {stage}"] = all(
            torch.equal(before[fqn], p) for fqn, p in model.named_parameters()
        )
        optimizer.zero_grad()
        backward(model, optimizer, 0, rank, 1, False)
        optimizer.step()  # the error is not remembered
        for name in ("cleared", "cleared, and another pass"):
            optimizer.zero_grad()
            before = snapshot(model)
            backward(model, optimizer, 0, rank, 1, False)
            if rank == 0:
                model.second.weight.grad = None
            if name != "cleared":
                backward(model, optimizer, 0, rank, 1, False)
            try:
                optimizer.step()
                outcome[f"{name} {stage}"] = "stepped"
            except (ValueError, pylo_dist.PeerError) as error:
                same = all(torch.equal(before[fqn], p) for fqn, p in model.named_parameters())
                outcome[f"{name} {stage}"] = f"{type(error).__name__}, unchanged {same}: {error}"
    return outcome


def scaled(rank: int, world: int) -> dict[str, Any]:
    """torch's own GradScaler; in step 2 one rank's gradients hold inf: nobody steps, all scales
    stay equal.
    """
    outcome: dict[str, Any] = {}
    for stage in (1, 2):
        model = Net(seed=rank)
        with early_pass_on_a_cpu():
            optimizer = pylo_dist.ZeroOptimizer(
                model, pylo_dist.AdafacLO, weights=small_fc(), stage=stage, bucket_cap_mb=0.0005
            )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        history, scales = [snapshot(model)], []
        for step in range(STEPS):
            grads = wanted(model, step, rank, 0)
            if step == 2 and rank == world - 1:
                grads["fourth.weight"][0, 0] = float("inf")
            scaler.scale(model(grads)).backward()
            if step == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            history.append(snapshot(model))
            scales.append(scaler.get_scale())
        outcome[f"history {stage}"], outcome[f"scales {stage}"] = history, scales
    return outcome


def damaged_replica(rank: int, world: int, kind: str, name: str) -> list[str]:
    """One bit of one rank's state flips, of what is replicated; every rank that has it too hears of
    it by name at the next comparison.
    """
    model = Net(seed=rank)
    optimizer = pylo_dist.ZeroOptimizer(
        model, **kinds()[kind], check_replicas_every=2, bucket_cap_mb=0.0005
    )
    said = []
    for step in range(4):
        if step == 2 and rank == world - 1:
            member = next(
                m
                for bucket in optimizer.buckets
                for m in bucket.members
                if m.fqn == "second.weight"
            )
            assert member.shard.numel
            optimizer.state[member.piece][name].view(torch.int32).view(-1)[3] ^= 1 << 20
        backward(model, optimizer, step, rank, 1, False)
        try:
            optimizer.step(loss=1.0)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
        optimizer.zero_grad()
    return said


def failing_construction(rank: int) -> dict[str, str]:
    """What one rank alone cannot do is an error on all, and its model is as before."""
    said = {}
    bad: dict[str, Callable[[], Any]] = {
        "weights": lambda: pylo_dist.ZeroOptimizer(
            model, pylo_dist.AdafacLO, weights="/nowhere" if rank == 1 else small_fc()
        ),
        "stage": lambda: pylo_dist.ZeroOptimizer(
            model, pylo_dist.AdafacLO, weights=small_fc(), stage=3 if rank == 1 else 1
        ),
        "model": lambda: pylo_dist.ZeroOptimizer(
            nn.Linear(2, 3 - rank % 2), pylo_dist.AdafacLO, weights=small_fc()
        ),
    }
    for name, build in bad.items():
        model = Net(seed=0)
        before = snapshot(model)
        try:
            build()
            said[name] = "nothing"
        except (ValueError, pylo_dist.PeerError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(before[fqn], p) for fqn, p in model.named_parameters())
        backward(model, None, 0, 0, 1, False)  # no hook of the failed attempt is in the way
    return said


def late_group(rank: int) -> bool:
    """A group added between two steps takes part in the next one, and its parameters were made
    equal.
    """
    model, late = Net(seed=rank), Part("late", torch.Generator().manual_seed(rank), weight=(5, 9))
    optimizer = pylo_dist.ZeroOptimizer(
        model, pylo_dist.AdafacLO, weights=small_fc(), stage=2, bucket_cap_mb=0.0005
    )
    backward(model, optimizer, 0, rank, 1, False)
    optimizer.step()
    optimizer.add_param_group({"params": [("late.weight", late.weight)], "lr": 0.5})
    before = late.weight.detach().clone()
    loss = model(wanted(model, 1, rank, 0)) + late(
        torch.zeros(()), {"late.weight": torch.ones(5, 9)}
    )
    loss.backward()
    optimizer.step()
    return bool((late.weight != before).any()) and late.weight.grad is None


@pytest.fixture(scope="module", params=[2, 3])
def outcome(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Any]]]:
    return request.param, run_ranks(request.param, ranks_with_backward)


def worst(got: list[Gradients], wanted: list[Gradients], alone: bool = False) -> float:
    """In units of the layout tolerance, over all steps and parameters; every parameter that must
    move did.
    """
    changes = largest_changes(wanted)
    assert all(
        float(change) > 0
        for fqn, change in changes.items()
        if fqn != "third.unused" and not (alone and fqn == "fourth.sometimes")
    )
    return max(max(layout_error(a, b, changes).values()) for a, b in zip(got, wanted, strict=True))


def test_stages_and_overlap_equal_one_process(
    outcome: tuple[int, list[dict[str, Any]]], figures: list[str]
) -> None:
    world, ranks = outcome
    for kind, kwargs in kinds().items():
        expected = reference(world, 1, **kwargs)
        for stage in (1, 2):
            for overlap in (True, False):
                errors = [
                    worst(result[f"{kind} {stage} {overlap}"]["history"], expected)
                    for result in ranks
                ]
                assert max(errors) <= 1.0
                figures.append(
                    f"real backward | {kind}, ZeRO-{stage}, overlap {overlap}, {world} ranks | "
                    f"{max(errors):.2g} of the tolerance"
                )


def test_accumulation_equals_one_pass(outcome: tuple[int, list[dict[str, Any]]]) -> None:
    """Integer-valued gradients add up exactly, so k = 4 micro-batches are one with their sum, with
    no_sync() and without.
    """
    world, ranks = outcome
    expected = reference(world, MICRO, **kinds()["AdafacLO"])
    for stage in (1, 2):
        for overlap in (True, False):
            for no_sync in (True, False):
                assert (
                    max(
                        worst(result[f"micro {stage} {overlap} {no_sync}"]["history"], expected)
                        for result in ranks
                    )
                    <= 1.0
                )


def test_stage_2_frees_gradients(outcome: tuple[int, list[dict[str, Any]]]) -> None:
    _, ranks = outcome
    for result in ranks:
        assert min(result["AdafacLO 1 True"]["kept"]) >= 7  # all that are used
        assert max(result["AdafacLO 2 True"]["kept"]) == 0
        assert min(result["AdafacLO 2 False"]["kept"]) >= 7
        assert result["order"]["kept"] == [0, 0]


def test_parameters_arrive_during_the_next_forward_pass(
    outcome: tuple[int, list[dict[str, Any]]],
) -> None:
    """Eager modules wait in their forward pass; compiled code reads parameters unseen, so for it
    the step waits.
    """
    _, ranks = outcome
    for result in ranks:
        assert min(result["AdafacLO 2 True"]["pending"]) == len(snapshot(Net()))
        assert max(result["AdafacLO 2 False"]["pending"]) == 0
        assert max(result["compiled"]["pending"]) == 0


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "compiled", "compiled and eager"])
def test_other_ways_through_the_model(how: str, outcome: tuple[int, list[dict[str, Any]]]) -> None:
    world, ranks = outcome
    expected = reference(world, 1, **kinds()["AdafacLO"])
    assert max(worst(result[how]["history"], expected) for result in ranks) <= 1.0


def test_bfloat16_parameters_have_float32_masters(
    outcome: tuple[int, list[dict[str, Any]]],
) -> None:
    """The masters follow a float32 run on the same gradients; the parameters are their rounding,
    bit for bit.
    """
    world, ranks = outcome
    expected = reference(world, 1, dtype=torch.bfloat16, **kinds()["AdafacLO"])
    for result in ranks:
        for got, exact in zip(result["bf16"]["history"], expected, strict=True):
            for fqn, p in got.items():
                assert p.dtype == torch.bfloat16
                assert torch.equal(p, exact[fqn].to(torch.bfloat16)), fqn


def test_buckets_leave_in_order_during_backward(outcome: tuple[int, list[dict[str, Any]]]) -> None:
    _, ranks = outcome
    for result in ranks:
        order = result["order"]
        every = [str(b) for b in range(order["buckets"])]
        assert order["buckets"] >= 3
        assert order["in_backward"] == every == order["after_all_used"]
        # an unused parameter holds buckets up to the end of backward
        assert order["before_flush"] == every == order["after_flush"]
        assert all(order["grads"])


def test_the_gradient_pass_runs_as_buckets_arrive(
    outcome: tuple[int, list[dict[str, Any]]],
) -> None:
    """Every tensor is read once, before the step; what is changed in between is read again with its
    bucket.
    """
    _, ranks = outcome
    for result in ranks:
        seen, (tensors,) = result["early"]
        assert seen[0] == seen[1] == seen[2] == seen[4] == seen[6] == tensors
        assert tensors < seen[3] < 2 * tensors
        assert seen[5] == seen[7] == 2 * tensors


def test_gradients_may_be_changed_where_it_counts(
    outcome: tuple[int, list[dict[str, Any]]],
) -> None:
    world, ranks = outcome
    halved = reference(world, 1, scale=lambda step: 0.5, weights=small_fc())
    for rank, result in enumerate(ranks):
        assert worst(result["pieces"], halved) <= 1.0
        assert worst(result["edited"]["history"], halved) <= 1.0
        for stage in (1, 2):
            said = result["edited"][f"error {stage}"]
            assert (
                ("ValueError: the gradient of 'second.weight' was changed after" in said)
                if rank == 0
                else "PeerError" in said
            )
            assert result["edited"][f"unchanged {stage}"]
            for name in ("cleared", "cleared, and another pass"):
                said = result["edited"][f"{name} {stage}"]
                if stage == 1 and name != "cleared":  # all is on the parameters, and counts
                    assert said == "stepped"
                    continue
                kind = "ValueError" if rank == 0 else "PeerError"
                assert said.startswith(f"{kind}, unchanged True"), (name, stage, said)


def test_grad_scaler_decides_alike_on_all_ranks(outcome: tuple[int, list[dict[str, Any]]]) -> None:
    """Scaling by powers of two is exact, so the steps are those of one process, without the one
    that overflowed.
    """
    world, ranks = outcome
    expected = reference(
        world, 1, scale=lambda step: None if step == 2 else 1.0, weights=small_fc()
    )
    for result in ranks:
        for stage in (1, 2):
            assert worst(result["scaler"][f"history {stage}"], expected) <= 1.0
            assert result["scaler"][f"scales {stage}"] == [
                2.0**10,
                2.0**11,
                2.0**10,
                2.0**10,
                2.0**11,
                2.0**11,
            ]


def test_a_flipped_bit_in_replicated_state_is_named(
    outcome: tuple[int, list[dict[str, Any]]],
) -> None:
    _, ranks = outcome
    for result in ranks:
        # rows of an LSTM are on the ranks alone that have elements of their tensors
        for case, name in (("replicas", "row"), ("rows", "lstm_cell")):
            said = result[case]
            assert said[:3] == ["", "", ""]
            differs = "replicated state differs between ranks after 4 steps: "
            assert re.search(f"{differs}.*'{name}' of 'second.weight'", said[3]), said[3]


def test_what_one_rank_cannot_build_is_an_error_on_all(
    outcome: tuple[int, list[dict[str, Any]]],
) -> None:
    _, ranks = outcome
    for rank, result in enumerate(ranks):
        said = result["build"]
        assert "/nowhere" in said["weights"]
        assert "stage=3: wanted 1 or 2" in said["stage"]
        assert said["weights"].startswith("WeightsError" if rank == 1 else "PeerError: rank 1: ")
        assert (
            "the ranks disagree on parameter number 1: rank 0 has ['weight', [3, 2]"
            in said["model"]
        )
        assert result["late"]


def test_one_process_frees_and_steps_too() -> None:
    expected = reference(1, 1, **kinds()["AdafacLO"])
    for stage in (1, 2):
        result = train(0, "AdafacLO", stage=stage)
        assert worst(result["history"], expected, alone=True) <= 1.0
        assert max(result["pending"]) == 0
    copy.deepcopy(Net())  # hooks of optimizers are on other models


def test_parameters_that_were_exchanged_or_frozen_late() -> None:
    model = Net()
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc(), stage=2)
    model.second.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backward(model, optimizer, 0, 0, 1, False)
    optimizer.step()
    assert torch.equal(before["second.bias"], model.second.bias)
    assert not torch.equal(before["second.weight"], model.second.weight)
    model.load_state_dict(before)
    backward(model, optimizer, 1, 0, 1, False)
    optimizer.step()
    model.load_state_dict(before, assign=True)
    with pytest.raises(
        ValueError, match=r"Part\.weight is another parameter than when ZeroOptimizer was built"
    ):
        optimizer.step()


# ----------------------------------------------------------------------------------------- replicas


def ranks_with_replicas(rank: int, world: int) -> dict[str, Any]:
    """Two replicas of two ranks each: shards lie on (0, 1) and (2, 3), replicas of a shard on (0,
    2) and (1, 3).
    """
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    groups = {"process_group": rows[rank // 2], "replicate_group": columns[rank % 2]}
    results: dict[str, Any] = {}
    for kind in kinds():
        results[kind] = train(rank, kind, stage=2, check_replicas_every=1, **groups)
    model = Net(seed=rank)
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc(), **groups)
    results["report"] = str(optimizer.report())
    try:
        pylo_dist.ZeroOptimizer(
            Net(),
            pylo_dist.AdafacLO,
            weights=small_fc(),
            process_group=rows[rank // 2],
            replicate_group=rows[rank // 2],
        )
    except ValueError as error:
        results["grid"] = str(error)
    results["timeout"] = left_alone(rank)
    return results


def left_alone(rank: int) -> dict[str, Any]:
    """Rank 3 computes for ever; the others must leave in bounded time and say who was missing and
    where.
    """
    model = Net(seed=0)
    optimizer = pylo_dist.ZeroOptimizer(model, pylo_dist.AdafacLO, weights=small_fc(), timeout=2.0)
    began = time.monotonic()
    if rank == 3:
        time.sleep(6)
        return {}
    try:
        backward(model, optimizer, 0, rank, 1, False)
        optimizer.step()
    except pylo_dist.CommunicationError as error:
        return {"said": str(error), "seconds": time.monotonic() - began}
    return {"said": "nothing", "seconds": 0.0}


def test_replicas_of_shards(figures: list[str]) -> None:
    ranks = run_ranks(4, ranks_with_replicas)
    for kind, kwargs in kinds().items():
        expected = reference(4, 1, **kwargs)
        error = max(worst(result[kind]["history"], expected) for result in ranks)
        assert error <= 1.0
        figures.append(
            f"real backward | {kind}, ZeRO-2, 2 replicas of 2 ranks | {error:.2g} of the tolerance"
        )
    for rank, result in enumerate(ranks):
        assert "2 replicas: each element is stepped and its state kept 2 times" in result["report"]
        assert "do not form a grid" in result["grid"]
        if rank != 3:
            timeout = result["timeout"]
            # busy machines start processes late
            assert timeout["seconds"] < 2.0 + comm.GRACE + 20.0
            assert "the reduce-scatter of gradients, bucket 0" in timeout["said"]
            assert re.search(r"The missing one is among rank\(s\) [0-9, ]*3,", timeout["said"])


@pytest.fixture(autouse=True)
def _no_leftover_hooks() -> Iterator[None]:
    yield
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_compiled_code_meets_freed_gradients() -> None:
    """Dynamo looks at the gradients on parameters where it compiles, and the next pass adds to
    them.
    """

    def after_two_steps(compiled: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        optimizer = pylo_dist.ZeroOptimizer(model, torch.optim.SGD, stage=2, lr=0.1)
        call = torch.compile(model, backend="eager") if compiled else model
        for step in range(2):
            x = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(step))
            model(x[0]).square().mean().backward()
            assert num_gradients(model) == 0
            call(x[1]).square().mean().backward()
            with optimizer.no_sync():
                call(x[2]).square().mean().backward()
            assert num_gradients(model) == 4
            (0.0 * model(x[0]).sum()).backward()
            optimizer.step()
            assert all(param.grad is None for param in model.parameters())
        return snapshot(model)

    compiled, plain = after_two_steps(True), after_two_steps(False)
    assert all(torch.equal(compiled[fqn], p) for fqn, p in plain.items())
