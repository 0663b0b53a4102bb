"""Stochastic rounding to bfloat16: its random bits are those of the written hash, it is right on
average, and what it must not touch it does not.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pylo_dist.maths.rounding import Rounding, mix, to_bfloat16, to_nearest

# ------------------------------------------------------------------------------------ random bits


def mix_np(x: np.ndarray) -> np.ndarray:
    """The hash again, in the arithmetic of a machine with words of 32 bits."""
    assert x.dtype == np.uint32
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def bits_np(seed: int, step: int, slot: int, index: np.ndarray) -> np.ndarray:
    key = np.full(index.shape, 0x9E3779B9, dtype=np.uint32)
    for word in (seed % 2**32, seed // 2**32, step % 2**32, slot // 2):
        key = mix_np(key ^ np.uint32(word))
    key = mix_np(key ^ (index >> np.uint64(32)).astype(np.uint32))
    word = mix_np((index & np.uint64(0xFFFFFFFF)).astype(np.uint32) + key)
    return word >> np.uint32(16) if slot % 2 else word & np.uint32(0xFFFF)


def bits(seed: int, step: int, slot: int, index: Tensor, numel: int = 1) -> Tensor:
    hyper = {"state_seed": seed, "step": torch.tensor(step)}
    return Rounding.of(hyper, torch.device("cpu")).of_elements(index, numel).bits(slot)


@pytest.mark.parametrize("first", [0, 12345, 2**32 - 50, 2**40 + 7])
def test_the_bits_are_those_of_words_of_32_bits(first: int) -> None:
    """Beyond 2^32 elements too, and across that border."""
    index = torch.arange(first, first + 100)
    for seed in (0, 7, 2**53 - 1):
        for step in (0, 1, 999_999_999):
            for slot in range(4):
                got = bits(seed, step, slot, index, numel=first + 100)
                wanted = bits_np(seed, step, slot, index.numpy().astype(np.uint64))
                np.testing.assert_array_equal(got.numpy(), wanted)


GOLDEN_AT = [(0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 2, 0), (1, 2, 3, 4), (2**33, 5, 0, 2**32 + 9)]
GOLDEN_MIX = [0, 1753845952, 1734902346]
GOLDEN_BITS = [31475, 19570, 10401, 26637, 4708]


def test_golden_words() -> None:
    """The state of a run that is resumed depends on them: they never change."""
    assert [mix(x) for x in (0, 1, 2**32 - 1)] == GOLDEN_MIX
    found = [
        bits(seed, step, slot, torch.tensor([element]), numel=element + 1).item()
        for seed, step, slot, element in GOLDEN_AT
    ]
    assert found == GOLDEN_BITS


def test_the_bits_look_random(figures: list[str]) -> None:
    """Neighbours, steps, slots and seeds do not know of each other, and every value is as likely:
    nothing is further from what chance gives than five standard deviations.
    """
    count = 1 << 18
    index = torch.arange(count)
    series = {
        "element": bits(0, 0, 0, index),
        "next element": bits(0, 0, 0, index + 1),
        "next row": bits(0, 0, 0, index + 1024),
        "other half": bits(0, 0, 1, index),
        "other pair": bits(0, 0, 2, index),
        "next step": bits(0, 1, 0, index),
        "next seed": bits(1, 0, 0, index),
        "over steps": torch.cat([bits(0, step, 0, torch.tensor([5])) for step in range(1 << 10)]),
    }
    worst = 0.0
    for name, x in series.items():
        uniform = (x.double() + 0.5) / 65536
        mean = float(uniform.mean() - 0.5) * math.sqrt(12 * len(x))
        square = float((uniform - 0.5).square().mean() * 12 - 1) * math.sqrt(len(x) / 0.8)
        ones = [float(((x >> bit) & 1).double().mean() - 0.5) * 2 for bit in range(16)]
        worst = max(worst, abs(mean), abs(square), *(abs(o) * math.sqrt(len(x)) for o in ones))
        if name != "element" and len(x) == count:
            base = series["element"].double()
            correlation = float(torch.corrcoef(torch.stack([base, x.double()]))[0, 1])
            worst = max(worst, abs(correlation) * math.sqrt(count))
            both = (series["element"] ^ x) & 1  # of the last bits alone
            worst = max(worst, abs(float(both.double().mean()) - 0.5) * 2 * math.sqrt(count))
    assert worst <= 5.0
    figures.append(f"rounding | random bits: at most {worst:.1f} standard deviations from chance")


# ------------------------------------------------------------------------------------- the rounding


def test_what_bfloat16_holds_stays_and_nothing_becomes_infinite() -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    held = every.view(torch.bfloat16)
    for low in (0, 1, 0xFFFF):
        rounded = to_bfloat16(held.float(), torch.full(held.shape, low))
        assert torch.equal(rounded.isnan(), held.isnan())
        known = ~held.isnan()
        assert torch.equal(rounded[known].view(torch.int16), every[known])
    tiny = torch.tensor([1e-45, -1e-45, 1e-39])  # below what bfloat16 has
    largest = torch.finfo(torch.float32).max
    odd = torch.cat([tiny, torch.tensor([largest, -largest, math.inf, -math.inf])])
    up = to_bfloat16(odd, torch.full(odd.shape, 0xFFFF)).float()
    down = to_bfloat16(odd, torch.zeros(odd.shape, dtype=torch.int64)).float()
    assert torch.equal(up.isfinite(), odd.isfinite())
    assert torch.equal(up.sign(), odd.sign())
    assert bool((down.abs() <= odd.abs()).all())
    assert bool((up[:3].abs() >= odd[:3].abs()).all())
    # a NaN whose mark is in the half that is cut off
    hidden = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert bool(to_bfloat16(hidden, torch.full((2,), 0xFFFF)).isnan().all())


def test_every_number_goes_to_one_of_its_neighbours_with_its_share() -> None:
    x = torch.tensor([1.0 + 3 / 4 * 2**-7, -(1.0 + 1 / 4 * 2**-7), 3e-41])
    for value in x:
        over = to_bfloat16(value.expand(1 << 16), torch.arange(1 << 16)).double()
        assert len(over.unique()) <= 2
        # all bits once: exact
        assert float(over.mean()) == float(value.double())


def test_to_nearest_is_torchs_and_keeps_what_is_finite() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=generator) * 10 ** (
        torch.rand(10_000, generator=generator) * 60 - 30
    )
    assert torch.equal(to_nearest(x), x.to(torch.bfloat16))
    largest = torch.finfo(torch.float32).max
    edge = torch.tensor([largest, -largest, math.inf, -math.inf, math.nan])
    assert torch.equal(to_nearest(edge).isfinite(), edge.isfinite())
    assert torch.equal(to_nearest(edge).isnan(), edge.isnan())


def test_a_slow_mean_reaches_where_it_belongs(figures: list[str]) -> None:
    """An EMA of decay 0.999 that stood at 1 and gets 1.0313 from now on, four units of bfloat16
    more: its steps are below a two hundredth of a unit. To nearest it stands still for ever.
    Rounded by chance it is, on average over the elements and to 4 standard errors of that, where
    the exact mean is, on the way and at the end, and no element strays by more than a few units.
    """
    elements, decay, start, goal, unit = 1 << 10, 0.999, 1.0, 1.0313, 2.0**-7
    index, mean = torch.arange(elements), torch.full((1 << 10,), start, dtype=torch.bfloat16)
    still = mean[:1].clone()
    errors = {}
    for step in range(1, 3001):
        hyper = {"state_seed": 3, "step": torch.tensor(step)}
        draw = Rounding.of(hyper, torch.device("cpu")).of_elements(index, elements)
        mean = draw.rounded(mean.float() * decay + goal * (1 - decay), 0)
        still = (still.float() * decay + goal * (1 - decay)).to(torch.bfloat16)
        if step in (300, 3000):
            there = mean.double()
            exact = goal - (goal - start) * decay**step
            errors[step] = abs(float(there.mean()) - exact)
            assert errors[step] <= 4 * float(there.std()) / math.sqrt(elements), step
            assert float((there - exact).abs().max()) <= 4 * unit
    assert float(still) == start
    assert errors[3000] <= 0.1 * unit
    assert abs(float(mean.double().mean()) - goal) <= 0.3 * unit
    figures.append(
        "rounding | EMA of decay 0.999 from 1 to 1.0313: after 3000 steps on average "
        f"{errors[3000]:.1e} off, to nearest {goal - float(still):.1e}"
    )
