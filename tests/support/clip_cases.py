"""Clipping in every layout, and what a step and clipping send: run by the ranks of test_shard.py,
and compared there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import pylo_dist
from pylo_dist.core.pieces import bound_shard
from support.collectives import Collectives, Counts
from support.dtensors import build
from support.optimizers import small_fc
from support.sharded_model import Net, mean_gradients, snapshot, trainable, whole

Results = dict[str, Any]


def message(action: Any) -> str:
    """The error that `action` raises, by type and text."""
    try:
        action()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def calls_per_step(layout: str, world: int) -> dict[int, tuple[Counts, Counts]]:
    """By number of tensors, what a step and clipping send; a third of them 1-D, with the gradients
    of sequence parallelism.
    """
    half = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    if layout == "hsdp":
        half = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    tensor = (
        init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        if layout == "tp"
        else half["tp"]
        if "tp" in layout
        else None
    )
    results = {}
    for count in (10, 300):
        params = [
            nn.Parameter(torch.zeros(4 + i % 5, 4) if i % 3 else torch.zeros(8))
            for i in range(count)
        ]
        if tensor is not None:
            params = [
                nn.Parameter(
                    distribute_tensor(
                        p.detach(), tensor, [Shard(1) if p.dim() == 2 else Replicate()]
                    )
                )
                for p in params
            ]
        many = nn.ParameterList(params)
        many.ignored = nn.ParameterList(
            [nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(3))]
        )
        ignored = set(many.ignored.parameters())
        if layout in ("fsdp2", "hsdp", "tp_fsdp2"):
            mesh = (
                init_device_mesh("cpu", (world,))
                if layout == "fsdp2"
                else half
                if layout == "hsdp"
                else half["dp"]
            )
            fully_shard(many, mesh=mesh, ignored_params=ignored)
        optimizer = pylo_dist.AdafacLO(many.named_parameters(), weights=small_fc())
        steps = []
        for action in (
            optimizer.step,
            functools.partial(pylo_dist.clip_grad_norm_, optimizer, 0.5),
        ):
            for p in many.parameters():
                p.grad = torch.ones_like(p)
                if layout == "tp" and p.dim() == 1 and p not in ignored:
                    p.grad = DTensor.from_local(torch.ones(8), tensor, [Partial()], run_check=False)
            with Collectives() as calls:
                action()
            steps.append(calls.counts)
        results[count] = steps[0], steps[1]
    return results


def check_calls(results: dict[str, dict[int, tuple[Counts, Counts]]]) -> None:
    """Two sums, and before them the mean gradients of ignored parameters (none under DDP), or the
    sums of partial ones.
    """
    for layout, by_count in results.items():
        step, clip = (0, 0) if layout == "ddp" else (3, 2)
        assert by_count[10] == by_count[300], (layout, by_count)
        assert tuple(map(dict, by_count[300])) == tuple(
            {"allreduce_": n} if n else {} for n in (step, clip)
        ), (layout, by_count)


def clip_ranks(rank: int, world: int, layouts: list[str]) -> Results:
    """Norm and clipped gradients of every way to name the parameters."""
    results: Results = {}
    for layout in layouts:
        model, called, place, ranks = build(layout, world)
        adafac = pylo_dist.AdafacLO(trainable(model), weights=small_fc())
        adamw = torch.optim.SGD([p for _, p in trainable(model)])
        for how, named in (
            ("learned", adafac),
            ("torch", adamw),
            ("params", [p for _, p in trainable(model)]),
        ):
            model.zero_grad()
            called(1, place).backward()
            norm = pylo_dist.clip_grad_norm_(named, 0.5)
            # what was clipped before stays so, and no layout is asked for again
            if how != "params":
                with Collectives() as calls:
                    pylo_dist.clip_grad_norm_(named, 0.6)
                results[f"{layout}/{how} calls"] = calls.counts.total()
            grads = {fqn: None if p.grad is None else whole(p.grad) for fqn, p in trainable(model)}
            results[f"{layout}/{how}"] = ranks, norm, grads
        before = snapshot(model)
        adafac.step()
        results[f"{layout}/step"] = all(
            torch.equal(p, before[fqn]) for fqn, p in snapshot(model).items()
        )
    return results


def check_clip(results: list[Results]) -> None:
    for key in (key for key in results[0] if not key.endswith(("/step", "calls"))):
        if f"{key} calls" in results[0]:  # the mean gradients of ignored parameters, and the norm
            # under tensor parallelism alone there is nothing to average, and what was partial is so
            # no more
            wanted_calls = {"ddp": 0, "tp": 1}.get(key.split("/")[0], 2)
            assert results[0][f"{key} calls"] == wanted_calls, key
        ranks = results[0][key][0]
        wanted = mean_gradients(ranks)[1]
        params = [nn.Parameter(torch.zeros_like(g)) for g in wanted.values() if g is not None]
        for p, g in zip(params, (g for g in wanted.values() if g is not None), strict=True):
            p.grad = g
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in params]).double())
        scale = (0.5 / (norm + 1e-6)).float()
        for result in results:
            _, got, grads = result[key]
            assert torch.equal(got, norm.float()), key
            assert [fqn for fqn, g in grads.items() if g is None] == [
                fqn for fqn, g in wanted.items() if g is None
            ], key
            for fqn, g in grads.items():
                if g is not None:
                    # one rounding
                    torch.testing.assert_close(g, wanted[fqn] * scale, rtol=1.2e-7, atol=0)


def clipped_pieces(rank: int) -> Results:
    """AdamW over ZeroOptimizer's pieces, clipped in a hook where they have their gradients."""
    model = Net()
    optimizer = pylo_dist.ZeroOptimizer(model, torch.optim.SGD, lr=1.0)
    early = message(lambda: pylo_dist.clip_grad_norm_(optimizer, 0.5))
    norms = []
    optimizer.inner.register_step_pre_hook(
        lambda inner, *_: norms.append(pylo_dist.clip_grad_norm_(inner, 0.5))
    )
    before = snapshot(model)
    model(1, rank).backward()
    optimizer.step()
    assert all(
        bound_shard(p) is not None for group in optimizer.param_groups for p in group["params"]
    )
    return {
        "early": early,
        "norm": norms[0],
        "moved": {fqn: before[fqn] - p for fqn, p in snapshot(model).items()},
    }


def check_pieces(results: list[Results]) -> None:
    wanted = mean_gradients(2)[1]
    norm = torch.linalg.vector_norm(
        torch.cat([g.flatten() for g in wanted.values() if g is not None]).double()
    )
    for result in results:
        assert "averages gradients in its step" in result["early"]
        assert torch.equal(result["norm"], norm.float())
        for fqn, g in wanted.items():
            moved = (
                torch.zeros_like(result["moved"][fqn])
                if g is None
                else g * (0.5 / (norm + 1e-6)).float()
            )
            # p - (p - g) near 1
            torch.testing.assert_close(result["moved"][fqn], moved, rtol=1e-6, atol=2.4e-7)
