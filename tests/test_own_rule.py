"""A learned rule of a user's own, on every layout there is. docs/own_rule.md walks through it, and the package does not know it.

The rule moves a tensor along its momentum, by a step that a tiny network predicts from sums over the whole tensor. A rank that
took the sums of its own piece instead would take another step.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pylo_dist
from pylo_dist.core.requests import Request
from pylo_dist.core.rule import Batch, LearnedRule
from pylo_dist.core.shards import TensorShard
from pylo_dist.core.state import StateField
from pylo_dist.maths.reference import commit, gradient_sums, move
from pylo_dist.testing import largest_changes, layout_error, run_virtual
from pylo_dist.weights import Architecture, MetaNetwork, load_weights
from support.ranks import run_ranks
from support.virtual import golden_problem, random_shards

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "own_rule.md"


class CompassRule(LearnedRule):
    """p <- p - lr |p| exp(MLP(log |p|, log |m|, c)) m / |m|; norms are rms, |p| at least 1e-3, c a mean cosine of g and m."""

    name = "compass"

    def __init__(self, network: MetaNetwork) -> None:
        self.network = network

    def dims(self, shape: tuple[int, ...]) -> None:
        return None  # no row and column factors

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        return {"momentum": StateField(), "cosine": StateField(replicated=())}

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        a = batch.new_sum("A", lambda item: 1, audited=True)
        for i, item in batch.candidates():
            gradient_sums(item.param.grad, item.param.shard, None, a.vectors[i][:0], a.audits[i])
            a.vectors[i] += item.param.value.double().square().sum()
        yield a
        b = batch.new_sum("B", lambda item: 3)
        for i, item in batch.candidates():
            momentum = item.state["momentum"]
            g = item.param.grad.to(momentum.dtype) * batch.scale[i].to(momentum.dtype)
            commit(momentum, 0.9 * momentum + 0.1 * g, batch.moves[i])
            g, m = g.double(), momentum.double()
            b.vectors[i] += torch.stack([m @ m, m @ g, g @ g])
        yield b
        if "w" not in batch.cache:
            batch.cache["w"] = {name: w.to(batch.device, torch.float64) for name, w in self.network.tensors.items()}
        w = batch.cache["w"]
        for i, item in batch.candidates():
            momentum, cosine, n = item.state["momentum"], item.state["cosine"], item.param.shard.global_numel
            batch.param_squares[i], (mm, mg, gg) = a.vectors[i][0], b.vectors[i]
            commit(cosine, 0.9 * cosine + 0.1 * mg / (mm * gg).sqrt().clamp_min(1e-30), batch.moves[i])
            p_norm, m_norm = (a.vectors[i] / n).sqrt().clamp_min(1e-3), (mm[None] / n).sqrt().clamp_min(1e-12)
            hidden = torch.tanh(w["in.weight"] @ torch.cat([p_norm.log(), m_norm.log(), cosine.double()]) + w["in.bias"])
            size = item.hyper["lr"] * p_norm * (w["out.weight"] @ hidden).exp() / m_norm
            old = item.param.value.to(momentum.dtype, copy=True)
            move(item.param.value, old, old - size.to(old.dtype) * momentum, batch.moves[i], batch.update_squares[i])


TINY = Architecture("compass", {"in.weight": (4, 3), "in.bias": (4,), "out.weight": (1, 4)}, decays={})


class Compass(pylo_dist.LearnedOptimizer):
    def __init__(self, params: Any, *, weights: Any, lr: float = 0.02, max_grad_norm: float | None = None, **others: Any) -> None:
        network = load_weights(weights, TINY)
        super().__init__(params, CompassRule(network), network, {"lr": lr, "max_grad_norm": max_grad_norm}, **others)


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in TINY.shapes.items()}


def test_every_cut_gives_the_uncut_run() -> None:
    rng = random.Random(0)
    params = {"matrix": torch.randn(12, 7), "bias": torch.randn(12), "scalar": torch.randn(())}
    grads = [{fqn: torch.randn_like(p) for fqn, p in params.items()} for _ in range(10)]
    uncut = run_virtual(Compass, params, 1, grads, weights=weights())
    change = largest_changes([params, *uncut.history])
    for ranks in (2, 3, 8):
        cuts = {fqn: sorted(rng.choices(range(p.numel() + 1), k=ranks - 1)) for fqn, p in params.items()}
        run = run_virtual(Compass, params, cuts, grads, weights=weights())
        assert run.reductions == [2] * 10
        assert max(layout_error(run.params, uncut.params, change).values()) <= 1.0


SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "clipped": {"max_grad_norm": 1.0}}


def plain_run(
    params: dict[str, Tensor], grads: list[dict[str, Tensor | None]], **kwargs: Any
) -> tuple[list[dict[str, Tensor]], Compass, dict[str, torch.nn.Parameter]]:
    """The parameters after each step of a plain loop, its optimizer and its parameters."""
    named = {fqn: torch.nn.Parameter(p.clone()) for fqn, p in params.items()}
    optimizer = Compass(named.items(), weights=weights(), **kwargs)
    history = []
    for step_grads in grads:
        for fqn, parameter in named.items():
            parameter.grad = step_grads.get(fqn)
        optimizer.step()
        history.append({fqn: p.detach().clone() for fqn, p in named.items()})
    return history, optimizer, named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_virtual_ranks_follow_the_plain_run(setting: str, dtype: torch.dtype, figures: list[str]) -> None:
    """Also for pitched boxes, empty shards and a step in which a tensor has no gradient."""
    params, grads, _ = golden_problem(dtype)
    history, optimizer, named = plain_run(params, grads, **SETTINGS[setting])
    change = largest_changes([params, *history])
    assert all(float(c) > 0 for c in change.values())
    rng, worst, worst_state, cuts = random.Random(1), 0.0, 0.0, 0
    for ranks in (2, 3, 5, 8) * 3:
        shards = {fqn: random_shards(rng, fqn, tuple(p.shape), ranks) for fqn, p in params.items()}
        run = run_virtual(Compass, params, shards, grads, weights=weights(), **SETTINGS[setting])
        assert run.reductions == [2] * len(grads)
        assert run.exchanges == [0] * len(grads)
        cuts += len(shards)
        worst = max(worst, *layout_error(run.params, history[-1], change).values())
        for fqn, parameter in named.items():
            state = optimizer.state[parameter]
            largest = {key: s.abs().max() for key, s in state.items()}
            worst_state = max(worst_state, *layout_error(run.state[fqn], state, largest).values())
    assert worst <= 1.0
    assert worst_state <= 1.0
    figures.append(
        f"own rule | {setting} {str(dtype)[6:]} | {cuts} cuts of 2 to 8 virtual ranks, {len(grads)} steps | "
        f"{worst:.2f} of the layout tolerance, state {worst_state:.3f}"
    )


def test_clipping_scales_the_gradient_it_sees() -> None:
    params, grads = {"w": torch.full((3, 4), 0.5)}, [{"w": torch.full((3, 4), 2.0)}]
    run = run_virtual(Compass, params, 2, grads, weights=weights(), max_grad_norm=0.1)
    # a norm of 2 sqrt(12), and a tenth of the gradient after one step
    torch.testing.assert_close(run.state["w"]["momentum"], torch.full((3, 4), 0.1 * 0.1 / 12**0.5), rtol=1e-5, atol=0)


SHAPES = {
    "embedding": (53, 4),
    "square": (24, 24),
    "conv": (4, 3, 3, 3),
    "bias": (41,),
    "one": (1,),
    "scalar": (),
    "unused": (6, 5),
}
STEPS = 10


def initial() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {fqn: 0.1 * torch.randn(shape, generator=generator) for fqn, shape in SHAPES.items()}


def gradient(fqn: str, step: int, rank: int) -> Tensor | None:
    """Integers over a power of two: their sum over ranks is exact in any order."""
    if fqn == "unused" or (fqn == "bias" and rank == 1):
        return None
    generator = torch.Generator().manual_seed(1000 * list(SHAPES).index(fqn) + 10 * step + rank)
    return torch.randint(-64, 65, SHAPES[fqn], generator=generator) / 1024.0


def zero_ranks(rank: int, world: int) -> dict[str, Any]:
    """What ZeroOptimizer makes of the rule on this rank, by setting; and a step that must not happen."""
    found: dict[str, Any] = {}
    for name, kwargs in SETTINGS.items():
        named = {fqn: torch.nn.Parameter(p) for fqn, p in initial().items()}
        optimizer = pylo_dist.ZeroOptimizer(named.items(), Compass, weights=weights(), nonfinite="skip", **kwargs)
        for step in range(STEPS):
            for fqn, parameter in named.items():
                parameter.grad = gradient(fqn, step, rank)
            optimizer.step()
        params = {fqn: p.detach().clone() for fqn, p in named.items()}
        states = [{k: s.clone() for k, s in optimizer.state[m.piece].items()} for b in optimizer.buckets for m in b.members]
        cosines = {m.fqn: s["cosine"] for m, s in zip((m for b in optimizer.buckets for m in b.members), states, strict=True)}
        if rank == 0:  # one NaN, on one rank, in one tensor: nobody moves
            named["square"].grad[3, 3] = torch.nan
        optimizer.step()
        after = [optimizer.state[m.piece] for b in optimizer.buckets for m in b.members]
        unchanged = all(torch.equal(params[fqn], p) for fqn, p in named.items())
        unchanged &= all(torch.equal(a[k], b[k]) for a, b in zip(states, after, strict=True) for k in a)
        local = sum(s["momentum"].numel() for s in after)
        found[name] = {"params": params, "cosines": cosines, "unchanged": unchanged, "local": local}
    return found


def test_real_ranks_follow_the_plain_run(figures: list[str]) -> None:
    ranks = run_ranks(2, zero_ranks)
    grads = []
    for step in range(STEPS):
        parts = {fqn: [g for g in (gradient(fqn, step, rank) for rank in range(2)) if g is not None] for fqn in SHAPES}
        grads.append({fqn: sum(part) / 2 if part else None for fqn, part in parts.items()})
    for name, kwargs in SETTINGS.items():
        history, optimizer, named = plain_run(initial(), grads, **kwargs)
        change = largest_changes([initial(), *history])
        first, second = (rank[name] for rank in ranks)
        assert first["unchanged"]
        assert second["unchanged"]
        total = sum(p.numel() for p in named.values())
        assert first["local"] + second["local"] == total
        assert abs(first["local"] - second["local"]) < 0.1 * total
        for fqn, parameter in named.items():
            assert torch.equal(first["params"][fqn], second["params"][fqn]), fqn
            assert torch.equal(first["cosines"][fqn], second["cosines"][fqn]), fqn
            torch.testing.assert_close(first["cosines"][fqn], optimizer.state[parameter]["cosine"], rtol=1e-5, atol=1e-7)
        assert torch.equal(first["params"]["unused"], initial()["unused"])
        errors = layout_error(first["params"], history[-1], change)
        assert max(errors.values()) <= 1.0, errors
        figures.append(f"own rule | {name} on 2 real ranks | {STEPS} steps: {max(errors.values()):.2f} of the layout tolerance")


def test_it_is_an_optimizer() -> None:
    """It fits a small regression, and goes on from a saved state as if never stopped."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = torch.sin(0.3 * (x @ torch.randn(8, 1, generator=generator)))

    def run(model: torch.nn.Module, optimizer: Compass, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)) for _ in range(2)]
    first, second = (Compass(model.named_parameters(), weights=weights()) for model in models)
    losses = run(models[0], first, 150)
    assert losses[-1] < losses[0] / 100  # measured: 350 times; 240 times at a quarter of the step, 27 times at four times it
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    assert run(models[0], first, 5) == run(models[1], second, 5)
    assert all(0 < float(s["update_ratio"]) < 0.1 for s in first.stats().values())
    assert "compass" in str(first.report())


def test_the_package_knows_nothing_of_it() -> None:
    assert len(inspect.getsource(CompassRule).splitlines()) <= 40
    for path in (ROOT / "pylo_dist").rglob("*.py"):
        assert "compass" not in path.read_text().lower(), path


def test_the_page_shows_this_code_and_it_runs() -> None:
    own = Path(__file__).read_text()
    imports, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert set(imports.splitlines()) <= set(own.splitlines())
    assert [block for block in blocks if block not in own] == []
    shown: dict[str, Any] = {}
    exec(imports + "\n".join(blocks), shown)  # all that a reader needs is on the page
    shown["test_every_cut_gives_the_uncut_run"]()
    assert [line for line in inspect.getsource(CompassRule).splitlines() if line not in "".join(blocks)] == []
