"""GPT-2's shape, initialisation and forward pass."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from model import GPT, build
from presets import PRESETS, GPTConfig

NANO = PRESETS["nano"]


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        # Published: 50257 tokens, 1024 positions, the output layer tied to the embedding.
        ("124m", 124_439_808),
        ("355m", 354_823_168),
        ("774m", 774_030_080),
        ("1.5b", 1_557_611_200),
        ("nano", 120_576),
        ("micro", 842_496),
    ],
)
@pytest.mark.parametrize("qkv", ["fused", "split"])
def test_parameter_counts(preset: str, count: int, qkv: str) -> None:
    with torch.device("meta"):
        model = GPT(dataclasses.replace(PRESETS[preset], qkv=qkv))
    assert model.num_parameters() == count


def test_split_equals_fused_when_the_weights_are_mapped() -> None:
    fused, split = build(NANO, seed=1), build(dataclasses.replace(NANO, qkv="split"), seed=2)
    mapped = {}
    for name, value in fused.state_dict().items():
        if ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                mapped[name.replace(".qkv.", f".{letter}.")] = part
        else:
            mapped[name] = value
    split.load_state_dict(mapped)
    idx = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))
    (a, loss_a), (b, loss_b) = fused(idx, idx), split(idx, idx)
    # Same sums; the matrix product may block a (3C, C) matrix differently: a few float32 roundings.
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss_a, loss_b, rtol=0, atol=1e-5)


def test_no_token_sees_a_later_one() -> None:
    model = build(NANO, seed=0)
    idx = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 256
    a, b = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=0)
    assert not torch.allclose(a[:, 20:], b[:, 20:])


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model = build(NANO, seed=0)
    idx, targets = torch.randint(256, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    logits, loss = model(idx, targets)
    expected = -F.log_softmax(logits, -1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss, expected)
    assert abs(loss.item() - math.log(256)) < 0.5  # an untrained model knows next to nothing


def test_initialisation_follows_the_seed_and_gpt2() -> None:
    model, again, other = build(NANO, seed=3), build(NANO, seed=3), build(NANO, seed=4)
    for (name, a), b, c in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c), name
    layer = model.blocks[0]
    # The standard deviation of n draws is known to 1 / sqrt(2 n): 1 % and less here.
    assert layer.mlp.fc.weight.std().item() == pytest.approx(NANO.init_std, rel=0.05)
    # sqrt(2 * 2 layers)
    assert layer.mlp.proj.weight.std().item() == pytest.approx(NANO.init_std / 2, rel=0.05)
    assert not layer.mlp.fc.bias.any()
    assert (layer.norm1.weight == 1).all()


def test_generation_is_seeded_and_outruns_the_block() -> None:
    model = build(NANO, seed=0)
    start = torch.zeros(1, 1, dtype=torch.long)
    text = model.generate(start, NANO.block_size + 5, seed=1)
    assert text.shape == (1, NANO.block_size + 6)
    assert torch.equal(text, model.generate(start, NANO.block_size + 5, seed=1))
    assert not torch.equal(text, model.generate(start, NANO.block_size + 5, seed=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"n_head": 5}, "n_embd 64 is not a multiple of n_head 5"), ({"n_layer": 0}, "n_layer is 0")],
)
def test_impossible_shapes_are_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(NANO, **change)


def test_a_sequence_above_the_positions_is_refused() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=10, block_size=4, n_layer=1, n_head=1, n_embd=8))
        with pytest.raises(ValueError, match="5 tokens came; the model holds 4"):
            model(torch.zeros(1, 5, dtype=torch.long))
