"""Every optimizer by its name: the launcher constructs and drives it as a user would by hand."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import gpt2
import pytest
import torch
from data import Tokens
from learner import Learner
from loop import TRAIN
from model import build
from optimizers import ADAMW
from options import parse
from place import Place
from presets import PRESETS, GPTConfig
from torch import nn

import pylo_dist

NANO = PRESETS["nano"]
LEARNED = pylo_dist.registered_optimizers()
OPTIMIZERS = (*LEARNED, ADAMW)
SMALL = ["--preset", "nano", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
HIDDEN = ("attention.qkv.weight", "attention.proj.weight", "mlp.fc.weight", "mlp.proj.weight")

# What a user would write by hand: the class, what it must be told, and the flags that say so.
BY_HAND: dict[str, tuple[type[pylo_dist.LearnedOptimizer], dict[str, Any], list[str]]] = {
    "adafaclo": (pylo_dist.AdafacLO, {}, []),
    "mulo": (
        pylo_dist.MuLO,
        {
            "width_mults": {
                f"blocks.{layer}.{name}": 2.0 for layer in range(NANO.n_layer) for name in HIDDEN
            }
        },
        ["--mup-base-width", "32"],
    ),
    "velo": (pylo_dist.VeLO, {"num_steps": 3}, []),
    "celo": (pylo_dist.Celo, {"num_steps": 3}, []),
    "celo-adam": (pylo_dist.CeloAdam, {"num_steps": 3}, []),
    "elo": (pylo_dist.ELO, {}, []),
    "celo2": (pylo_dist.CELO2, {"embedding_pattern": "tokens|positions"}, []),
    "elo-celo2": (pylo_dist.ELO_CELO2, {"embedding_pattern": "tokens|positions"}, []),
}


def losses_by_hand(name: str, config: GPTConfig, weights: Path, tokens: Path) -> list[float]:
    """Three steps of a plain training loop, with 2 steps of warm-up and a cosine to a tenth."""
    optimizer_class, arguments, _ = BY_HAND[name]
    model = build(config, seed=0)
    optimizer = optimizer_class(model.named_parameters(), weights=weights, **arguments)
    text = Tokens.from_path(tokens, "train", block_size=64, vocab_size=256)
    base_lr, losses = optimizer.param_groups[0]["lr"], []
    for step, factor in enumerate((0.5, 1.0, 0.1), start=1):
        optimizer.param_groups[0]["lr"] = base_lr * factor
        windows = torch.from_numpy(text.read(text.windows(0, TRAIN, step, 4)))
        loss = model(windows[:, :-1], windows[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", LEARNED)
def test_a_run_is_that_of_the_class_by_hand(
    name: str, learned_weights: dict[str, Path], tokens_folder: Path, tmp_path: Path
) -> None:
    weights, flags = learned_weights[name], BY_HAND[name][2]
    command = [
        *SMALL,
        "--optimizer",
        name,
        "--weights",
        str(weights),
        "--data",
        str(tokens_folder),
        *flags,
    ]
    command += [
        "--steps",
        "3",
        "--warmup",
        "2",
        "--schedule",
        "cosine",
        "--eval-every",
        "0",
        "--out",
        str(tmp_path / "o"),
    ]
    assert gpt2.main(command) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()
    ]
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    base_lr = defaults_of(BY_HAND[name][0])["lr"]
    assert [row["lr"] for row in rows] == pytest.approx([0.5 * base_lr, base_lr, 0.1 * base_lr])
    assert config["weights"]["name"] == str(weights)
    assert config["num_steps"] == BY_HAND[name][1].get("num_steps")
    # The same arithmetic in the same process: the same bits.
    model = dataclasses.replace(NANO, mup_base_width=32 if name == "mulo" else None)
    wanted = losses_by_hand(name, model, weights, tokens_folder)
    assert [row["loss"] for row in rows] == wanted
    report = (tmp_path / "o" / "optimizer.txt").read_text().splitlines()
    assert report[0].startswith(f"{BY_HAND[name][0].__name__}, weights ")
    by_adamw = {line.split()[0] for line in report if "adamw" in line.split()}
    vectors = {n for n, p in build(NANO, seed=0).named_parameters() if p.ndim < 2}
    assert by_adamw == (
        {"tokens.weight", "positions.weight", *vectors} if "celo2" in name else set()
    )


def learner(name: str, weights: dict[str, Path], *flags: str) -> Learner:
    chosen = [] if name == "adamw" else ["--weights", str(weights[name])]
    options = parse([*SMALL, "--optimizer", name, *chosen, "--steps", "10", *flags])
    return Learner(options, Place.find(options))


def matrix_after_a_step(name: str, weights: dict[str, Path], *flags: str) -> nn.Parameter:
    made = learner(name, weights, *flags)
    matrix = made.model.blocks[0].mlp.fc.weight
    generator = torch.Generator().manual_seed(3)
    for parameter in made.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    made.step(torch.tensor(5.0))
    return matrix


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_decoupled(name: str, learned_weights: dict[str, Path]) -> None:
    flags = ["--lr", "0.01", "--weight-decay"]
    free, pulled = (
        matrix_after_a_step(name, learned_weights, *flags, decay) for decay in ("0", "0.5")
    )
    before = build(NANO, seed=0).blocks[0].mlp.fc.weight
    # p - lr decay p, of the matrix before the step or after it; both are within the step of each
    # other
    step = float((free - before).abs().max().detach())
    assert step > 0
    torch.testing.assert_close(free - pulled, 0.01 * 0.5 * before, rtol=0, atol=0.005 * step + 1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_flag_bounds_the_gradient(name: str, learned_weights: dict[str, Path]) -> None:
    """A bound below the norm is a smaller gradient, and the state shows it; one above the norm is
    none.
    """
    key = "exp_avg" if name in ("adamw", "celo-adam") else "momentum"
    moments = []
    for flags in ([], ["--max-grad-norm", "1000"], ["--max-grad-norm", "0.5"]):
        made = learner(name, learned_weights, *flags)
        for parameter in made.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        norm = 0.01 * math.sqrt(made.model.num_parameters())  # 3.5
        made.step(torch.tensor(5.0))
        moments.append(made.optimizer.state[made.model.blocks[0].mlp.fc.weight][key])
    default, loose, tight = moments
    clips_by_itself = 1.0 / norm if name == "elo-celo2" else 1.0
    torch.testing.assert_close(default, loose * clips_by_itself, rtol=1e-5, atol=0)
    torch.testing.assert_close(tight, loose * (0.5 / norm), rtol=1e-5, atol=0)


def test_defaults_are_those_of_the_classes() -> None:
    assert set(BY_HAND) == set(LEARNED)
    for name, (optimizer_class, told, _) in BY_HAND.items():
        known, options = defaults_of(optimizer_class), parse(["--optimizer", name, "--steps", "3"])
        assert options.chosen().entry.face is optimizer_class
        assert (options.base_lr(), options.decay()) == (known["lr"], known["weight_decay"])
        bound = known["clip_norm"] if known.get("clip_grad") else known.get("max_grad_norm")
        assert options.clip_norm() == bound
        given = options.learned_arguments()
        wanted = {"lr": known["lr"], "weight_decay": known["weight_decay"]}
        wanted |= {"clip_grad": True, "clip_norm": bound} if bound else {}
        assert {key: given.pop(key) for key in wanted} == wanted
        assert set(given) == set(told), name  # what it must be told, and nothing else


def defaults_of(optimizer_class: type) -> dict[str, Any]:
    """Keyword arguments of a class's constructor and of those it hands them on to, with their
    defaults.
    """
    faces = [
        c for c in reversed(optimizer_class.__mro__) if issubclass(c, pylo_dist.LearnedOptimizer)
    ]
    return {
        key: p.default for c in faces for key, p in inspect.signature(c.__init__).parameters.items()
    }


def test_velo_may_plan_for_a_longer_run() -> None:
    assert parse(["--optimizer", "velo", "--steps", "30"]).learned_arguments()["num_steps"] == 30
    assert (
        parse(["--optimizer", "velo", "--steps", "1", "--num-steps", "900"]).learned_arguments()[
            "num_steps"
        ]
        == 900
    )
