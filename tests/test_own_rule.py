"""A learned rule of a user's own, on every layout there is and by every name that an optimizer of
the package has. docs/own_rule.md walks through it, and the package does not know it.

The rule moves a tensor along its momentum, by a step that a tiny network predicts from sums over
the whole tensor. A rank that took the sums of its own piece instead would take another step.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pylo_dist
from pylo_dist.core.requests import Request, Sum
from pylo_dist.core.rule import Batch, LearnedRule
from pylo_dist.core.shards import TensorShard
from pylo_dist.core.state import StateField
from pylo_dist.maths.reference import commit, gradient_sums, move
from pylo_dist.testing import largest_changes, layout_error, run_virtual
from pylo_dist.weights import Architecture, MetaNetwork, load_weights
from support.ranks import run_ranks
from support.registry import restored
from support.streams import early_pass_on_a_cpu
from support.virtual import golden_problem, random_shards

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "own_rule.md"


def blocks_of(language: str) -> list[str]:
    """The code on the page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


# What registers the optimizer; on the page it is part of the module. Here it must not be known to
# the tests of other files.
(REGISTRATION,) = (block for block in blocks_of("python") if "register_optimizer" in block)


class CompassRule(LearnedRule):
    """p <- p - lr |p| exp(MLP(log |p|, log |m|, c)) m / |m|

    Norms are rms, |p| at least 1e-3; c is a mean cosine of gradient and momentum m.
    """

    name = "compass"

    def __init__(self, network: MetaNetwork) -> None:
        self.network = network

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        return {"momentum": StateField(), "cosine": StateField(replicated=())}

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        a = self.first_sum(batch)
        for i, item in batch.candidates():
            if i not in batch.summed:
                self.audit(a, batch, i)
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

        for i, item in batch.candidates():
            value, momentum, cosine = item.param.value, item.state["momentum"], item.state["cosine"]
            batch.param_squares[i], (mm, mg, gg) = a.vectors[i][0], b.vectors[i]
            c = mg / (mm * gg).sqrt().clamp_min(1e-30)
            commit(cosine, 0.9 * cosine + 0.1 * c, batch.moves[i])
            n = item.param.shard.global_numel
            p_norm = (a.vectors[i] / n).sqrt().clamp_min(1e-3)
            m_norm = (mm[None] / n).sqrt().clamp_min(1e-12)
            features = torch.cat([p_norm.log(), m_norm.log(), cosine.double()])
            size = item.hyper["lr"] * p_norm * self.size_of(features, batch) / m_norm
            old = value.to(momentum.dtype, copy=True)
            new = old - size.to(old.dtype) * momentum
            move(value, old, new, batch.moves[i], batch.update_squares[i])

    def size_of(self, features: Tensor, batch: Batch) -> Tensor:
        """exp(MLP(features)), (1,)."""
        if "w" not in batch.cache:
            tensors = self.network.tensors.items()
            batch.cache["w"] = {k: t.to(batch.device, torch.float64) for k, t in tensors}
        w = batch.cache["w"]
        return (w["out.weight"] @ torch.tanh(w["in.weight"] @ features + w["in.bias"])).exp()

    def first_sum(self, batch: Batch) -> Sum:
        """The first request: p^2 and the gradient's audit of every item."""
        a = batch.reused_sum("A", lambda item: 1, audited=True)
        return a if batch.summed else a.zero_()

    def audit(self, a: Sum, batch: Batch, i: int) -> None:
        param = batch.items[i].param
        gradient_sums(param.grad, param.shard, None, a.vectors[i][:0], a.audits[i])

    def gradient_pass(self, batch: Batch, indices: Iterable[int]) -> None:
        a = self.first_sum(batch)
        for i in indices:
            self.audit(a, batch, i)
            batch.summed.add(i)

    def forget_gradient(self, batch: Batch, i: int) -> None:
        self.first_sum(batch).audits[i].zero_()
        batch.summed.discard(i)


TINY = Architecture("compass", {"in.weight": (4, 3), "in.bias": (4,), "out.weight": (1, 4)})


class Compass(pylo_dist.LearnedOptimizer):
    """Moves every tensor along its momentum, by a step that a network predicts."""

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 0.02,
        weights: Any = "compass-untrained",
        max_grad_norm: float | None = None,
        **others: Any,
    ) -> None:
        network, settings = load_weights(weights, TINY), {"lr": lr, "max_grad_norm": max_grad_norm}
        super().__init__(params, CompassRule(network), network, settings, **others)


def weights() -> dict[str, Tensor]:
    """What meta-training would begin with."""
    generator = torch.Generator().manual_seed(0)
    return {k: 0.3 * torch.randn(shape, generator=generator) for k, shape in TINY.shapes.items()}


def test_every_cut_gives_the_uncut_run() -> None:
    rng = random.Random(0)
    params = {"matrix": torch.randn(12, 7), "bias": torch.randn(12), "scalar": torch.randn(())}
    grads = [{fqn: torch.randn_like(p) for fqn, p in params.items()} for _ in range(10)]
    uncut = run_virtual(Compass, params, 1, grads, weights=weights())
    change = largest_changes([params, *uncut.history])
    for ranks in (2, 3, 8):
        cuts = {
            fqn: sorted(rng.choices(range(p.numel() + 1), k=ranks - 1)) for fqn, p in params.items()
        }
        run = run_virtual(Compass, params, cuts, grads, weights=weights())
        assert run.reductions == [2] * 10
        assert max(layout_error(run.params, uncut.params, change).values()) <= 1.0


def register() -> None:
    exec(REGISTRATION, globals())


@pytest.fixture
def registered() -> Generator[None, None, None]:
    """The optimizer is registered, for one test."""
    with restored():
        register()
        yield


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
def test_virtual_ranks_follow_the_plain_run(
    setting: str, dtype: torch.dtype, figures: list[str]
) -> None:
    """Also for pitched boxes, empty shards and a step in which a tensor has no gradient."""
    params, grads, _ = golden_problem(dtype)
    history, optimizer, named = plain_run(params, grads, **SETTINGS[setting])
    change = largest_changes([params, *history])
    assert all(float(c) > 0 for c in change.values())
    rng, worst, worst_state, cuts = random.Random(1), 0.0, 0.0, 0
    for ranks in (2, 3, 5, 8):
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
        f"own rule | {setting} {str(dtype)[6:]} | {cuts} cuts of 2 to 8 virtual ranks, "
        f"{len(grads)} steps | {worst:.2f} of the layout tolerance, state {worst_state:.3f}"
    )


def test_clipping_scales_the_gradient_it_sees() -> None:
    params, grads = {"w": torch.full((3, 4), 0.5)}, [{"w": torch.full((3, 4), 2.0)}]
    run = run_virtual(Compass, params, 2, grads, weights=weights(), max_grad_norm=0.1)
    # a norm of 2 sqrt(12), and a tenth of the gradient after one step
    torch.testing.assert_close(
        run.state["w"]["momentum"], torch.full((3, 4), 0.1 * 0.1 / 12**0.5), rtol=1e-5, atol=0
    )


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
    """What ZeroOptimizer makes of the rule on this rank, by setting; and a step that must not
    happen.
    """
    found: dict[str, Any] = {}
    for name, kwargs in SETTINGS.items():
        named = {fqn: torch.nn.Parameter(p) for fqn, p in initial().items()}
        optimizer = pylo_dist.ZeroOptimizer(
            named.items(), Compass, weights=weights(), nonfinite="skip", **kwargs
        )
        for step in range(STEPS):
            for fqn, parameter in named.items():
                parameter.grad = gradient(fqn, step, rank)
            optimizer.step()
        params = {fqn: p.detach().clone() for fqn, p in named.items()}
        states = [
            {k: s.clone() for k, s in optimizer.state[m.piece].items()}
            for b in optimizer.buckets
            for m in b.members
        ]
        cosines = {
            m.fqn: s["cosine"]
            for m, s in zip((m for b in optimizer.buckets for m in b.members), states, strict=True)
        }
        if rank == 0:  # one NaN, on one rank, in one tensor: nobody moves
            named["square"].grad[3, 3] = torch.nan
        optimizer.step()
        after = [optimizer.state[m.piece] for b in optimizer.buckets for m in b.members]
        unchanged = all(torch.equal(params[fqn], p) for fqn, p in named.items())
        unchanged &= all(
            torch.equal(a[k], b[k]) for a, b in zip(states, after, strict=True) for k in a
        )
        local = sum(s["momentum"].numel() for s in after)
        found[name] = {"params": params, "cosines": cosines, "unchanged": unchanged, "local": local}
    return found


def means() -> list[dict[str, Tensor | None]]:
    """The mean gradients of two ranks, step by step."""
    grads = []
    for step in range(STEPS):
        parts = {
            fqn: [g for g in (gradient(fqn, step, rank) for rank in range(2)) if g is not None]
            for fqn in SHAPES
        }
        grads.append({fqn: sum(part) / 2 if part else None for fqn, part in parts.items()})
    return grads


def test_real_ranks_follow_the_plain_run(figures: list[str]) -> None:
    ranks = run_ranks(2, zero_ranks)
    grads = means()
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
            torch.testing.assert_close(
                first["cosines"][fqn], optimizer.state[parameter]["cosine"], rtol=1e-5, atol=1e-7
            )
        assert torch.equal(first["params"]["unused"], initial()["unused"])
        errors = layout_error(first["params"], history[-1], change)
        assert max(errors.values()) <= 1.0, errors
        figures.append(
            f"own rule | {name} on 2 real ranks | {STEPS} steps: {max(errors.values()):.2f} of the "
            "layout tolerance"
        )


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
    models = [
        torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        for _ in range(2)
    ]
    first, second = (Compass(model.named_parameters(), weights=weights()) for model in models)
    losses = run(models[0], first, 150)
    assert (
        losses[-1] < losses[0] / 100
    )  # measured: 350 times; 240 times at a quarter of the step, 27 times at four times it
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(first.state_dict())
    assert run(models[0], first, 5) == run(models[1], second, 5)
    assert all(0 < float(s["update_ratio"]) < 0.1 for s in first.stats().values())
    assert "compass" in str(first.report())


def test_the_package_knows_nothing_of_it() -> None:
    assert len(inspect.getsource(CompassRule).splitlines()) <= 80
    for path in (ROOT / "pylo_dist").rglob("*.py"):
        assert "compass" not in path.read_text().lower(), path


# ----------------------------------------------------------------------------------- the early pass


def early_ranks(rank: int, world: int) -> dict[str, Any]:
    """Steps whose gradients come out of backward; how often the rule saw them before the step."""
    named = {fqn: torch.nn.Parameter(p) for fqn, p in initial().items()}
    # small buckets, so that there is more than one
    with early_pass_on_a_cpu():
        optimizer = pylo_dist.ZeroOptimizer(
            named.items(), Compass, weights=weights(), bucket_cap_mb=0.002, max_grad_norm=1.0
        )
    calls: list[int] = []
    rule, read = optimizer.inner.rule, CompassRule.gradient_pass

    def counted(self: CompassRule, batch: Batch, indices: Iterable[int]) -> None:
        calls.append(len(indices := list(indices)))
        read(self, batch, indices)

    type(rule).gradient_pass = counted  # type: ignore[method-assign]
    for step in range(STEPS):
        parts = {fqn: gradient(fqn, step, rank) for fqn in named}
        sum((named[fqn] * g).sum() for fqn, g in parts.items() if g is not None).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"params": {fqn: p.detach().clone() for fqn, p in named.items()}, "calls": calls}


def test_gradients_read_early_give_the_same_steps() -> None:
    grads = means()
    history, _, _ = plain_run(initial(), grads, max_grad_norm=1.0)
    change = largest_changes([initial(), *history])
    for found in run_ranks(2, early_ranks):
        assert max(layout_error(found["params"], history[-1], change).values()) <= 1.0
        if hasattr(LearnedRule, "gradient_pass"):  # any rule may have an early pass
            assert len(found["calls"]) >= STEPS


# -------------------------------------------------------------------------------------- its weights


@pytest.mark.usefixtures("registered")
def test_its_weights_are_saved_and_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = pylo_dist.save_weights("weights/compass", weights(), "compass", licence="mit")
    params = [torch.nn.Parameter(torch.ones(3, 4))]
    for found in ("weights/compass", "compass-untrained", saved):
        optimizer = Compass(params, weights=found)
        assert optimizer.weights.digest == saved.digest
    assert Compass(params).weights.name == "compass-untrained"
    assert pylo_dist.load_weights("weights/compass").architecture == "compass"  # as its card says
    assert pylo_dist.load_weights(weights()).architecture == "compass"  # by its tensors
    again = pylo_dist.save_weights("again", optimizer.weights)
    assert (again.digest, again.licence) == (saved.digest, "mit")
    card = (tmp_path / "again" / "README.md").read_text()
    assert f"from {__name__} import Compass\n" in card
    assert 'optimizer = Compass(model.parameters(), weights="THIS REPOSITORY OR FOLDER")\n' in card
    with pytest.raises(
        pylo_dist.WeightsError, match="are for compass, this optimizer needs small_fc"
    ):
        pylo_dist.AdafacLO(params, weights="compass-untrained")


def test_weights_of_an_unregistered_architecture_say_how_to_register_it(tmp_path: Path) -> None:
    nameless = Architecture("nameless", {"w": (2,)})
    network = load_weights({"w": torch.ones(2)}, nameless)
    with pytest.raises(
        pylo_dist.WeightsError, match=r"'nameless': wanted one of .*register_optimizer"
    ):
        pylo_dist.save_weights(tmp_path / "folder", network)
    assert not (tmp_path / "folder").exists()


# ---------------------------------------------------------------------------------------- DeepSpeed


def deepspeed_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    """A run of DeepSpeed by the JSON on the page, and one of an optimizer that is registered after
    the import.
    """
    from support import deepspeed_cases as cases

    register()
    deepspeed = cases.import_deepspeed()
    import pylo_dist.deepspeed as door

    late = type("LateCompass", (Compass,), {"__module__": __name__})
    pylo_dist.register_optimizer(pylo_dist.Registration("late-compass", late, TINY))
    entry = json.loads(blocks_of("json")[0])
    entry["optimizer"]["params"]["weights"] = folder
    found: dict[str, Any] = {}
    for name, stage in (("Compass", 2), ("LateCompass", 1)):
        entry["optimizer"]["type"] = name
        model = cases.Model()
        config = {**cases.Case(stage).json(cases.write_weights(Path(folder).parent)), **entry}
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        cases.train(engine, 0, 5)
        found[name] = {
            "masters": cases.masters(engine),
            "report": str(engine.basic_optimizer.report()),
        }
        engine.destroy()
    model = cases.Model()
    entry["optimizer"]["type"] = "LateCompass"
    door.unregister()
    found["left"] = [
        name for name in ("Compass", "LateCompass", "VeLO") if hasattr(torch.optim, name)
    ]
    engine, *_ = door.initialize(model=model, model_parameters=model.parameters(), config=config)
    found["without a name"] = type(engine.basic_optimizer).__name__
    engine.destroy()
    return found


@pytest.mark.usefixtures("registered")
def test_deepspeeds_json_knows_it(tmp_path: Path) -> None:
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is not installed: launch/setup.sh launch,dev,deepspeed"
    )
    from support import deepspeed_cases as cases

    pylo_dist.save_weights(tmp_path / "compass", weights(), "compass")
    ranks = run_ranks(2, deepspeed_ranks, str(tmp_path / "compass"))
    start = {
        fqn: p.detach().clone() for fqn, p in cases.Model().named_parameters() if p.requires_grad
    }
    history, _, _ = plain_run(start, [cases.mean_gradients(step, 1, 2) for step in range(5)])
    change = largest_changes([start, *history])
    for name in ("Compass", "LateCompass"):
        errors = layout_error(
            cases.joined([rank[name]["masters"] for rank in ranks]), history[-1], change
        )
        assert max(errors.values()) <= 1.0, errors
        assert ranks[0][name]["report"].startswith(f"{name}, weights ")
    assert [rank["left"] for rank in ranks] == [[], []]
    assert ranks[0]["without a name"] == "LateCompass"


# ----------------------------------------------------------------------------------------- the page


def test_the_page_shows_this_code_and_it_runs() -> None:
    own = Path(__file__).read_text()
    imports, *blocks = blocks_of("python")
    assert set(imports.splitlines()) <= set(own.splitlines())
    assert [block for block in blocks if block not in own] == [REGISTRATION]
    found: dict[str, Any] = {"__name__": "compass"}
    with restored():
        exec("\n".join([imports, *blocks]), found)  # all that a reader needs is on the page
        assert pylo_dist.registered_optimizers()["compass"].face is found["Compass"]
    found["test_every_cut_gives_the_uncut_run"]()
    lines = inspect.getsource(CompassRule).splitlines()
    assert [line for line in lines if line not in "".join(blocks)] == []


def test_the_commands_on_the_page_run(tmp_path: Path) -> None:
    (tmp_path / "compass.py").write_text("\n".join(blocks_of("python")[:-1]))
    commands = [shlex.split(line) for block in blocks_of("bash") for line in block.splitlines()]
    assert [words[1] for words in commands] == ["-c", "-m", "-m", "launch/gpt2.py"]
    said = []
    for python, *words in commands:
        if words[0].endswith("gpt2.py"):
            words[0] = str(ROOT / words[0])
            words += ["--steps", "3", "--batch-size", "4", "--device", "cpu", "--out", "out"]
        assert python == "python"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[1].startswith("weights/compass: compass weights, digest ")
    assert "name: compass-untrained\nnote: random numbers\n" in said[2]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["optimizer"], config["lr"], config["max_grad_norm"]) == ("compass", 0.02, None)
    assert config["weights"]["name"] == "compass-untrained"
    assert (
        (tmp_path / "out" / "optimizer.txt")
        .read_text()
        .startswith("Compass, weights compass-untrained ")
    )
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3
