"""What is particular to Celo and Celo-Adam: their one LSTM, which tensors share and do not know of
each other through, a run of 300 steps, Celo-Adam against its equations. What holds for all:
tests/contracts; golden steps: test_parity.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pylo_dist
from pylo_dist.maths import lstm
from pylo_dist.optim import celo
from support.golden import Arrays, celo_weights, load
from support.optimizer_cases import EVERY, everything, make_params, same, set_gradients, train
from support.optimizers import CELO, CELO_ADAM, VELO
from support.ranks import run_ranks

Build = Callable[..., Any]
FACES = {"Celo": (pylo_dist.Celo, CELO), "CeloAdam": (pylo_dist.CeloAdam, CELO_ADAM)}
every_face = pytest.mark.parametrize("name", FACES)


def build(name: str, params: Any, **changes: Any) -> Any:
    face, weights = FACES[name]
    return face(params, **{"weights": weights, "num_steps": 20, **changes})


# ---------------------------------------------------------------------------- against its equations


class Oracle:
    """Celo-Adam's equations in NumPy, float64 but for the nine fractions."""

    def __init__(
        self, weights: dict[str, Tensor], num_steps: int, params: list[np.ndarray]
    ) -> None:
        self.w = {name: t.double().numpy() for name, t in weights.items()}
        self.num_steps, self.t, self.params = num_steps, 0, params
        self.gamma = np.exp(-1.0 / np.logspace(1.0, np.log10(num_steps), 10))
        self.mean, self.least = np.zeros(10), np.full(10, 999999999999.0)
        self.h, self.c = (self.w[f"lstm_init_state.{i}"][0] for i in (0, 1))
        self.m, self.v = ([np.zeros_like(p) for p in params] for _ in range(2))

    def size(self, loss: float) -> float:
        unbiased = self.mean / (1.0 - self.gamma ** (self.t + 1))
        top = loss if self.t == 0 else unbiased.max()
        self.mean = self.gamma * self.mean + (1.0 - self.gamma) * min(2.0 * abs(top), loss)
        unbiased = self.mean / (1.0 - self.gamma ** (self.t + 1))
        self.least = np.minimum(self.least, unbiased)
        above = (unbiased[:-1] - self.least[:-1]) / np.maximum(1e-8, unbiased[1:] - self.least[:-1])
        losses = np.clip(above - 1.0, -1.0, 1.0) if self.t >= 2 else np.zeros(9)
        share = np.float32(self.t) / np.float32(self.num_steps)
        at = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1], np.float32)
        x = np.concatenate([np.tanh(np.float32(10.0) * (share - at)).astype(float), losses])
        y = self.linear("final_mix_layer", x) + np.maximum(self.linear("mix_layer2", x), 0.0)
        i, g, f, o = np.split(self.linear("lstm.linear", np.concatenate([y, self.h])), 4)
        self.c = sigmoid(f + 1.0) * self.c + sigmoid(i) * np.tanh(g)
        self.h = sigmoid(o) * np.tanh(self.c)
        return 0.1 * math.exp(self.linear("step_size", self.h)[0])

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"]
        return y

    def step(self, grads: list[np.ndarray], loss: float) -> float:
        size = self.size(loss)
        self.t += 1
        for p, g, m, v in zip(self.params, grads, self.m, self.v, strict=True):
            g = np.clip(g, -1000.0, 1000.0)
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            root = np.sqrt(v / (1.0 - 0.999**self.t) + 1e-10)
            p -= size * 1e-3 * (m / (1.0 - 0.9**self.t)) / (1e-8 + root)
        return size


def sigmoid(x: np.ndarray) -> np.ndarray:
    y: np.ndarray = 1.0 / (1.0 + np.exp(-x))
    return y


@pytest.mark.parametrize("seed", [0, 1])
def test_celo_adam_follows_its_equations(seed: int) -> None:
    """Beyond the end of the run, with gradients and losses of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = celo.ADAM_ARCHITECTURE.shapes
    sizes: dict[int | str, int] = {"H": 24, "2H": 48, "4H": 96}
    weights = {
        name: 0.3 * torch.randn([sizes.get(n, n) for n in shape], generator=generator)  # type: ignore[misc]
        for name, shape in shapes.items()
    }
    params = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in EVERY.values()
    ]
    oracle = Oracle(weights, 10, [p.detach().numpy().copy() for p in params])
    optimizer = pylo_dist.CeloAdam(params, num_steps=10, weights=weights)
    for t in range(16):
        loss = float(torch.rand((), generator=generator)) * 10.0 ** (t % 4 - 1)
        for p in params:
            scale = 10.0 ** float(torch.randint(-5, 5, (), generator=generator))
            p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        before = [p.copy() for p in oracle.params]
        size = oracle.step([p.grad.numpy() for p in params], loss)  # type: ignore[union-attr]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the end of the run
            optimizer.step(loss)
        for lr_mult in (row["lr_mult"] for row in optimizer.stats().values()):
            assert float(lr_mult) == pytest.approx(size, rel=1e-6)
        for ours, wanted, old in zip(params, oracle.params, before, strict=True):
            error = np.linalg.norm(ours.detach().numpy() - wanted)
            assert error <= 1e-6 * np.linalg.norm(wanted - old)
            ours.detach().copy_(torch.tensor(wanted))


@pytest.mark.parametrize(
    ("face", "weights"), [(pylo_dist.Celo, CELO), (pylo_dist.VeLO, VELO)], ids=["Celo", "VeLO"]
)
def test_a_tensor_that_starts_at_zero_hardly_moves(face: Any, weights: Any) -> None:
    """A step is in proportion to sqrt(<p^2> + 1e-9), 3e-5 of a tensor of zeros: as published, see
    docs/coming-from-adamw.md.
    """
    generator = torch.Generator().manual_seed(0)
    starts = {
        "zero": torch.zeros(40, 30, dtype=torch.float64),
        "other": torch.randn(40, 30, generator=generator, dtype=torch.float64),
    }
    params = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
    optimizer = face(list(params.items()), num_steps=100, weights=weights)
    for _ in range(20):
        grad = torch.randn(40, 30, generator=generator, dtype=torch.float64)
        for p in params.values():
            p.grad = grad.clone()
        optimizer.step(1.0)
    moved = {
        name: float((p.detach() - starts[name]).square().mean().sqrt())
        for name, p in params.items()
    }
    assert 0.0 < moved["zero"] < 1e-4 * moved["other"]


# --------------------------------------------------------------------------------- a run, and ranks


def network(file: Arrays) -> nn.ParameterList:
    """The MLP of the curve's file, weights as (in, out)."""
    return nn.ParameterList([nn.Parameter(torch.tensor(file[f"p0.{i}"])) for i in range(6)])


def loss_of(model: nn.ParameterList, x: Tensor, y: Tensor) -> Tensor:
    w = list(model)
    for i in (0, 2):
        x = torch.relu(x @ w[i] + w[i + 1])
    return nn.functional.cross_entropy(x @ w[4] + w[5], y, reduction="sum")


def curve(rank: int, world: int, steps: int) -> dict[str, Any]:
    """The run of the curve's file, the batch dealt out by rows: the loss of every batch before its
    step, and the parameters after all.
    """
    file = load("celo_curve")
    model, x, y = network(file), torch.tensor(file["x"]), torch.tensor(file["y"])
    settings = {
        "weights": celo_weights(load("celo_f32")),
        "num_steps": int(file["num_steps"]),
        "tie_break": "as_given",
    }
    optimizer: Any = (
        pylo_dist.Celo(list(model.named_parameters()), **settings)
        if world == 1
        else pylo_dist.ZeroOptimizer(model, pylo_dist.Celo, bucket_cap_mb=0.002, **settings)
    )
    losses = []
    for rows in file["batch"][:steps]:
        mine = torch.tensor(rows)[rank::world]
        loss = loss_of(model, x[mine], y[mine]) * world / len(rows)
        loss.backward()
        losses.append(float(loss.detach()) / world)
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    with torch.no_grad():
        full = float(loss_of(model, x, y)) / len(x)
    return {"losses": losses, "full": full, "params": [p.detach().clone() for p in model]}


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_is_that_of_the_reference(world: int, figures: list[str]) -> None:
    """300 steps in float32 with the released weights: 1e-4 of the loss, which goes from 3.5 to
    0.13. The run is not chaotic: noise of 1e-9 in the first parameters grows to 4e-9 of the loss.
    """
    file = load("celo_curve")
    load("celo_f32")  # has the weights
    ranks = [curve(0, 1, 300)] if world == 1 else run_ranks(world, curve, 300)
    losses = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64).sum(0)
    wanted = torch.tensor(file["losses_f64"])
    error = float(((losses - wanted) / wanted).abs().max())
    assert error <= 1e-4
    for rank in ranks:
        assert rank["full"] == pytest.approx(float(file["full_losses_f64"][-1]), rel=1e-4)
        for i, param in enumerate(rank["params"]):
            assert torch.equal(param, ranks[0]["params"][i])
            reference = torch.tensor(file[f"p300_f64.{i}"])
            torch.testing.assert_close(param.double(), reference, rtol=1e-4, atol=1e-5)
    figures.append(f"parity | Celo | celo_curve on {world} | {error:.1e} of the loss, 300 steps")


# ------------------------------------------------------------------------------------- of the run


@every_face
def test_one_schedule_serves_all_groups(name: str) -> None:
    """Whichever tensors there are, in whichever groups and order, frozen or late: the state of the
    run depends on the losses alone, and every group has all of it.
    """
    named, alone = make_params(EVERY), make_params({"bias": (5,)})
    halves = [{"params": named[:2]}, {"params": named[2:4], "lr": 0.5}]
    for _, param in named[:2]:
        param.requires_grad_(False)
    optimizer, other = build(name, halves), build(name, alone)
    train(optimizer, named[2:4], 0, 2)
    optimizer.add_param_group({"params": named[4:]})
    for _, param in named[:2]:
        param.requires_grad_(True)
    train(optimizer, named, 2, 4)
    train(other, alone, 0, 4)
    run = other.param_groups[0]
    for key in optimizer.rule.group_state():
        for group in optimizer.param_groups:
            assert torch.equal(group[key], run[key]), key
    sizes = {float(row["lr_mult"]) for o in (optimizer, other) for row in o.stats().values()}
    assert len(sizes) == 1
    assert sizes.pop() > 0


@every_face
def test_a_run_of_other_shapes_is_refused(name: str) -> None:
    """On loading: torch.optim.Optimizer would take it, and the next step end somewhere inside."""
    optimizer = build(name, make_params(EVERY))
    for key, value in optimizer.rule.group_state().items():
        for other in (value[:3], "x", value.to(torch.complex64)):
            state = optimizer.state_dict()
            state["param_groups"][0][key] = other
            before = everything(optimizer)
            with pytest.raises(ValueError, match=f"group 0 of the state has {key}="):
                optimizer.load_state_dict(state)
            assert same(everything(optimizer), before)


@every_face
def test_a_refused_step_leaves_the_run_as_it_was(name: str) -> None:
    named = make_params(EVERY)
    optimizer = build(name, named)
    train(optimizer, named, 0, 2)
    before = everything(optimizer)
    set_gradients(named, 2)
    with pytest.raises(pylo_dist.NonFiniteGradientError, match="the loss is inf or NaN"):
        optimizer.step(float("nan"))
    assert same(everything(optimizer), before)


@every_face
def test_the_length_of_the_run_is_one(name: str) -> None:
    named = make_params(EVERY)
    groups = [{"params": named[:2]}, {"params": named[2:], "num_steps": 30}]
    said = "num_steps=30 beside num_steps=20 in parameter group 0: wanted the same in all"
    with pytest.raises(ValueError, match=said):
        build(name, groups)
    optimizer = build(name, [{"params": named[:2]}, {"params": named[2:]}])
    train(optimizer, named, 0, 1)
    before = everything(optimizer)
    for changed in (0, 1):
        optimizer.param_groups[changed]["num_steps"] = 30
        set_gradients(named, 1)
        with pytest.raises(ValueError, match=r"beside num_steps=.*the step was not taken"):
            optimizer.step(1.0)
        optimizer.param_groups[changed]["num_steps"] = 20
    assert same(everything(optimizer), before)
    optimizer.extend(30)
    assert [group["num_steps"] for group in optimizer.param_groups] == [30, 30]
    train(optimizer, named, 1, 2)
    with pytest.raises(ValueError, match="num_steps=1"):
        optimizer.extend(1)


@every_face
def test_beyond_the_end_time_goes_on(name: str) -> None:
    """The share of the run is not held at 1, as VeLO's is here."""
    named = make_params(EVERY)
    optimizer = build(name, named, num_steps=2)
    train(optimizer, named, 0, 2)
    with pytest.warns(UserWarning, match=r"taken all num_steps=2 steps.*beyond it"):
        train(optimizer, named, 2, 3)
    assert float(lstm.progress(optimizer.param_groups[0])) == 1.5
    sizes = []
    for step in (3, 4):
        train(optimizer, named, step, step + 1)
        sizes.append(float(optimizer.stats()["bias"]["lr_mult"]))
    assert sizes[0] != sizes[1]


def test_a_run_longer_than_any_in_meta_training_is_warned_of() -> None:
    network = pylo_dist.load_weights(CELO, celo.ARCHITECTURE)
    object.__setattr__(network, "horizon", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("Celo", make_params(), weights=network, num_steps=2000)
        build("Celo", make_params(), num_steps=100_000)  # of weights that say nothing of it
    with pytest.warns(UserWarning, match="Celo was meta-trained on runs of up to 2000 steps"):
        build("Celo", make_params(), weights=network, num_steps=2001)


# ---------------------------------------------------------------------------------------- weights


def test_weights_with_the_same_names_are_told_apart(tmp_path: Any) -> None:
    """VeLO's and Celo's tensors have the same names: the LSTM's inputs, or the card, tell."""
    assert VELO.keys() == CELO.keys()
    for tensors, architecture in ((VELO, "velo"), (CELO, "celo"), (CELO_ADAM, "celo_adam")):
        assert pylo_dist.load_weights(tensors).architecture == architecture
    params = make_params()
    said = r"wanted floating point \('H', 18\).*these are tensors of velo"
    with pytest.raises(pylo_dist.WeightsError, match=said):
        pylo_dist.Celo(params, num_steps=9, weights=VELO)
    said = r"wanted floating point \('H', 30\).*these are tensors of celo"
    with pytest.raises(pylo_dist.WeightsError, match=said):
        pylo_dist.VeLO(params, num_steps=9, weights=CELO)
    with pytest.raises(pylo_dist.WeightsError, match=r"missing.*these are tensors of celo_adam"):
        pylo_dist.Celo(params, num_steps=9, weights=CELO_ADAM)
    saved = pylo_dist.save_weights(tmp_path / "celo", CELO)
    assert saved.architecture == "celo"
    with pytest.raises(pylo_dist.WeightsError, match="are for celo, this optimizer needs velo"):
        pylo_dist.VeLO(params, num_steps=9, weights=tmp_path / "celo")
    with pytest.raises(pylo_dist.WeightsError, match="are for velo, this optimizer needs celo"):
        pylo_dist.Celo(params, num_steps=9, weights=pylo_dist.load_weights(VELO))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("Celo", {"num_steps": 10.5}, "num_steps=10.5"),
        ("Celo", {"tie_break": "reference"}, "tie_break='reference'"),
        ("Celo", {"max_grad_norm": 2000.0}, "max_grad_norm=2000.0: wanted at most 1000"),
        ("CeloAdam", {"betas": (0.9, 1.0)}, "betas"),
        ("CeloAdam", {"eps": 0.0}, "eps=0.0"),
        ("CeloAdam", {"step_mult": -1.0}, "step_mult=-1.0"),
    ],
)
def test_what_is_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, make_params(), **kwargs)


@every_face
def test_gradients_beyond_the_clamp_are_numbers(name: str) -> None:
    """Their squares leave float32, and are never taken."""
    named, other = make_params(EVERY), make_params(EVERY)
    optimizer, clamped = build(name, named), build(name, other)
    for params, value in ((named, 1e30), (other, 1000.0)):
        set_gradients(params, 0)
        dict(params)["conv"].grad[1, 0, 2, 1] = value
    optimizer.step(1.0)
    clamped.step(1.0)
    assert same(everything(optimizer), everything(clamped))
