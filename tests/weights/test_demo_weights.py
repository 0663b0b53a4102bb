"""The built-in demo weights: reproduced to the byte, loaded as a user does, and wired as
benchmarks/demo_weights.py says.

The outputs of the network are computed here from the stored tensors, in float64, so that its claims
(an odd direction, a schedule that depends on the step only) hold for what is shipped and not for
the table it was made from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import demo_weights
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import pylo_dist
from pylo_dist.maths.reference import TIME_SCALES, time_features
from pylo_dist.optim.adafac import ARCHITECTURE as SMALL_FC
from pylo_dist.weights import CARD_KEY, load_weights

ROOT = Path(__file__).resolve().parents[2]
NUM_FEATURES = SMALL_FC.shapes["network.input.weight"][1] - len(TIME_SCALES)
# g, m x3, m q x3, F(g) x3, F(m) x3: the features that change sign with the gradient
SIGNED = [0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 25, 26, 27]


def outputs(features: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """(o0, o1), each (N,), of normalised features (N, 28) after `steps` (N,)."""
    w = {name: tensor.double() for name, tensor in load_weights("demo", SMALL_FC).tensors.items()}
    time = torch.stack([time_features(step) for step in steps]).double()
    h = torch.cat([features.double(), time], dim=1)
    for layer in ("network.input", "network.linear_0"):
        h = (h @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]).relu()
    out = h @ w["network.output.weight"].T + w["network.output.bias"]
    return out[:, 0], out[:, 1]


def test_the_script_writes_the_committed_file_to_the_byte() -> None:
    # in a process of its own: neither its hash seed nor what was imported before may show in the
    # bytes
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "demo_weights.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_notices_one_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = bytearray(demo_weights.TARGET.read_bytes())
    changed[-1] ^= 1
    monkeypatch.setattr(demo_weights, "TARGET", tmp_path / "changed.safetensors")
    assert demo_weights.main(["--check"]) == 1  # not there
    demo_weights.TARGET.write_bytes(changed)
    assert demo_weights.main(["--check"]) == 1


def test_the_decays_of_the_card_are_in_effect() -> None:
    with safe_open(str(demo_weights.TARGET), framework="pt") as file:
        card = json.loads(file.metadata()[CARD_KEY])
    stored = {name: tuple(offsets) for name, offsets in card["decays"].items()}
    assert set(stored) == set(SMALL_FC.decays)
    assert card["architecture"] == "small_fc"

    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = pylo_dist.AdafacLO([("p", parameter)], weights="demo")
    # the latter is what a file without a card implies
    assert optimizer.weights.decays == stored != SMALL_FC.decays
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    state = optimizer.state[parameter]
    # one step from zero leaves (1 - decay) of the gradient 1; offsets 0 stand for 0.9, 0.99, 0.999
    # and 0.999
    for name, decays in (
        ("momentum", (0.9, 0.99, 0.999)),
        ("row", (0.9, 0.99, 0.999)),
        ("rms", (0.999,)),
    ):
        wanted = 1 - torch.tensor(decays, dtype=torch.float64)
        got = state[name].double().reshape(len(decays), -1)
        torch.testing.assert_close(got, wanted[:, None].expand_as(got), rtol=1e-6, atol=0)


def test_the_schedule_warms_up_and_never_grows_again() -> None:
    steps = torch.cat([torch.arange(5000), torch.logspace(3.7, 6, 400).round()]).to(torch.float64)
    _, o1 = outputs(torch.zeros(len(steps), NUM_FEATURES), steps)
    multiplier = (0.001 * o1).exp()
    peak = int(multiplier.argmax())
    assert 20 <= peak <= 150
    assert multiplier[0] < 0.25 * multiplier[peak]
    assert (multiplier[1 : peak + 1].diff() > 0).all()
    # the time features are float32, whose rounding moves the multiplier by some 1e-6 of itself
    after = multiplier[peak:]
    assert (after[1:] <= after[:-1] * (1 + 2e-6)).all()
    assert 0 < multiplier[-1] < 0.05 * multiplier[peak]
    wanted = torch.tensor(
        demo_weights.multipliers(demo_weights.DEFAULT, steps.int().tolist()), dtype=torch.float64
    )
    torch.testing.assert_close(multiplier, wanted, rtol=1e-5, atol=0)


def test_the_direction_is_odd_and_the_magnitude_knows_only_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(500, NUM_FEATURES, generator=generator)
    mirrored = features.clone()
    mirrored[:, SIGNED] *= -1
    steps = torch.randint(0, 10**5, (500,), generator=generator)
    direction, magnitude = outputs(features, steps)
    other_direction, other_magnitude = outputs(mirrored, steps)
    assert direction.abs().max() > 0.1
    torch.testing.assert_close(other_direction, -direction, rtol=1e-12, atol=1e-12)
    assert torch.equal(other_magnitude, magnitude)
    assert torch.equal(outputs(torch.zeros_like(features), steps)[1], magnitude)


def test_it_fits_a_small_regression() -> None:
    """Loss falls 200 times in 200 steps (measured: 1000 times; 25 times at a third of the step, 100
    times at ten times it).
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = torch.sin(0.3 * (x @ torch.randn(8, 1, generator=generator)))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 1))
    optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
    losses = []
    for _ in range(200):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 200
