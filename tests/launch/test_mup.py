"""muP of the GPT: table 8 of arXiv 2203.03466, number by number, and what it is for: widths that
move alike.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from model import GPT, build
from options import parse
from presets import PRESETS, GPTConfig
from torch import Tensor

import pylo_dist

NANO = PRESETS["nano"]  # 64 channels in 4 heads
IDX = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))


def with_base(width: int | None, **changes: object) -> GPTConfig:
    return dataclasses.replace(NANO, mup_base_width=width, **changes)


@pytest.mark.parametrize("qkv", ["fused", "split"])
def test_at_its_own_base_width_a_model_is_the_standard_one(qkv: str) -> None:
    standard, scaled = (
        build(with_base(None, qkv=qkv), seed=1),
        build(with_base(NANO.n_embd, qkv=qkv), seed=1),
    )
    assert all(
        torch.equal(a, b) for a, b in zip(standard.parameters(), scaled.parameters(), strict=True)
    )
    (logits, loss), (mup_logits, mup_loss) = standard(IDX, IDX), scaled(IDX, IDX)
    assert torch.equal(logits, mup_logits)
    assert torch.equal(loss, mup_loss)
    assert set(standard.width_mults().values()) == set(scaled.width_mults().values()) == {1.0}


@pytest.mark.parametrize("qkv", ["fused", "split"])
def test_multipliers_are_those_of_the_dimensions_that_grow(qkv: str) -> None:
    """mup's rule: two dimensions that grow, and the multiplier is how much the input of the matrix
    grew.
    """
    config = with_base(16, qkv=qkv)
    with torch.device("meta"):
        model, base = GPT(config), GPT(dataclasses.replace(config, n_embd=16))
    wanted = {}
    for (name, a), b in zip(model.named_parameters(), base.parameters(), strict=True):
        grew = [
            large / small for large, small in zip(a.shape, b.shape, strict=True) if large != small
        ]
        assert grew, name
        wanted[name] = grew[1] if len(grew) == 2 else 1.0
    assert model.width_mults() == wanted
    assert sorted(set(wanted.values())) == [1.0, 4.0]


@pytest.mark.parametrize("qkv", ["fused", "split"])
def test_mup_itself_finds_the_same_multipliers(qkv: str) -> None:
    """What `mup.set_base_shapes` leaves on the parameters, MuLO reads as the model's own numbers,
    and steps alike.
    """
    mup = pytest.importorskip("mup", reason="no mup: launch/setup.sh installs it, alone")

    def of_width(width: int) -> GPT:
        return build(with_base(16, qkv=qkv, n_embd=width), seed=1)

    models = of_width(64), of_width(64)
    mup.set_base_shapes(models[0], of_width(16), delta=of_width(32), rescale_params=False)
    optimizers = (
        pylo_dist.MuLO(models[0].named_parameters(), weights="demo"),
        pylo_dist.MuLO(
            models[1].named_parameters(), weights="demo", width_mults=models[1].width_mults()
        ),
    )
    assert optimizers[0].param_groups[0]["width_mults"] == models[1].width_mults()
    for model, optimizer in zip(models, optimizers, strict=True):
        model(IDX, IDX)[1].backward()
        optimizer.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )


def test_only_hidden_matrices_start_smaller() -> None:
    model, base = build(with_base(16), seed=1), build(NANO, seed=1)
    for (name, a), b in zip(model.named_parameters(), base.parameters(), strict=True):
        hidden = a.ndim == 2 and name.startswith("blocks.")
        # variance times 1 / m with m = 4; halves are exact
        assert torch.equal(a, b / 2 if hidden else b), name


def by_the_book(model: GPT, idx: Tensor, m: float, attention_scale: float) -> Tensor:
    """GPT-2's logits with muP's two factors, without the fused attention of PyTorch."""
    length, heads = idx.shape[1], model.config.n_head
    x = model.tokens.weight[idx] + model.positions.weight[:length]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for block in model.blocks:
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2)
            for t in block.attention.qkv(block.norm1(x)).chunk(3, -1)
        )
        scores = (q @ k.mT * attention_scale).masked_fill(future, -math.inf)
        x = x + block.attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))
        x = x + block.mlp(block.norm2(x))
    return model.norm(x) @ model.tokens.weight.T / m


@pytest.mark.parametrize(
    ("base_width", "base_heads", "m", "attention_scale"),
    [
        (None, None, 1.0, 1 / math.sqrt(16)),
        # as many heads: 4 channels each in the base model, 16 here
        (16, None, 4.0, math.sqrt(4) / 16),
        (16, 1, 4.0, 1 / math.sqrt(16)),  # heads as wide, and four times as many
        (128, None, 0.5, math.sqrt(32) / 16),  # a base model that is wider
    ],
)
def test_logits_and_attention_are_scaled(
    base_width: int | None, base_heads: int | None, m: float, attention_scale: float
) -> None:
    model = build(with_base(base_width, mup_base_heads=base_heads), seed=2)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight *= 8  # scores that matter
        wanted = by_the_book(model, IDX, m, attention_scale)
        # the same sums in another order: a few roundings of float32
        torch.testing.assert_close(model(IDX)[0], wanted, rtol=0, atol=1e-5)
        assert not torch.allclose(
            by_the_book(model, IDX, m, 1.5 * attention_scale), wanted, rtol=0, atol=1e-3
        )


def moved(optimizer_class: type[pylo_dist.AdafacLO], config: GPTConfig) -> float:
    """How far one step moves the logits, rms."""
    model = build(config, seed=0)
    arguments = {"width_mults": model.width_mults()} if optimizer_class is pylo_dist.MuLO else {}
    optimizer = optimizer_class(model.named_parameters(), weights="demo", **arguments)
    before, loss = model(IDX[:, :-1], IDX[:, 1:])
    loss.backward()
    optimizer.step()
    return float((model(IDX[:, :-1])[0] - before).detach().square().mean().sqrt())


def test_a_wider_model_moves_as_far_only_with_mup() -> None:
    """The coordinate check of muP's authors, for one doubling of the width."""
    scaled, standard = (
        moved(optimizer_class, with_base(base, n_embd=256))
        / moved(optimizer_class, with_base(base, n_embd=128))
        for optimizer_class, base in ((pylo_dist.MuLO, 32), (pylo_dist.AdafacLO, None))
    )
    # Measured: 0.83, 0.88 for the next doubling, so the limit is near. Without the smaller rates it
    # is 1.4; standard: 2.5.
    assert 0.7 < scaled < 1.1
    assert standard > 1.8


def test_flags_make_the_configuration() -> None:
    argv = [
        "--preset",
        "nano",
        "--optimizer",
        "mulo",
        "--n-embd",
        "96",
        "--n-head",
        "6",
        "--mup-base-width",
        "32",
    ]
    config = parse([*argv, "--mup-base-heads", "2"]).config()
    assert config == dataclasses.replace(
        NANO, n_embd=96, n_head=6, mup_base_width=32, mup_base_heads=2
    )
    # heads of 16 channels in both
    assert (config.width_mult, config.attention_scale) == (3.0, 0.25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mup_base_width": 30}, "mup_base_width 30 is not a multiple of its 4 heads"),
        ({"mup_base_width": 32, "mup_base_heads": 5}, "not a multiple of its 5 heads"),
        ({"mup_base_width": 0}, "mup_base_width is 0"),
        ({"mup_base_heads": 2}, "mup_base_heads 2 came without mup_base_width"),
    ],
)
def test_impossible_base_models_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(NANO, **changes)
