"""Checks of `copy_pass`, whoever computes it: what is copied, and the ends of what was read."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Copy = Callable[[list[Tensor], list[Tensor], Tensor], object]
INTEGERS = {4: torch.int32, 2: torch.int16}
# one, about a store of 128 bits, more than a thread copies at once, and than a job
SIZES = (1, 3, 7, 8, 9, 16, 31, 256, 2049, 20011)


def check_pairs(copy: Copy, device: str) -> None:
    """Every pair of dtypes: tensors of many sizes, their addresses aligned alike or not, rows that
    are apart, NaN, inf and numbers that do not fit.
    """
    rng = random.Random(5)
    for given, wanted in itertools.product(DTYPES, DTYPES):
        generator = torch.Generator().manual_seed(rng.randrange(1000))
        sources, targets = list[Tensor](), list[Tensor]()
        for number, size in enumerate((*SIZES, *SIZES)):
            at = rng.randrange(9)
            sources.append(_numbers(size + 16, rng, generator).to(device, given)[at:][:size])
            first = at % 8 if number < len(SIZES) else rng.randrange(9)
            targets.append(
                torch.full((size + 20,), 7.0, dtype=wanted, device=device)[first:][:size]
            )
        rows = _numbers(3 * 40, rng, generator).to(device, given).view(3, 40)
        sources.append(rows[:, 2:35])
        targets.append(torch.full((3, 50), 7.0, dtype=wanted, device=device)[:, 5:38])
        ends = torch.zeros(len(targets) + 1, 2, device=device)
        copy(targets, sources, ends)
        for target, source, found in zip(targets, sources, ends.cpu(), strict=False):
            case = f"{given} to {wanted}, {tuple(source.shape)}"
            assert same_bits(target.cpu(), source.cpu().to(wanted)), case
            whole = target if target._base is None else target._base
            assert int((whole != 7.0).sum()) <= source.numel(), f"{case}: more was written"
            low_high = torch.stack(torch.aminmax(source.cpu().float()))
            torch.testing.assert_close(found, low_high, rtol=0, atol=0, equal_nan=True, msg=case)


def check_many(copy: Copy, device: str) -> None:
    """More tensors than an argument of a kernel holds."""
    numbers = torch.arange(3.0 * 1000, device=device).view(1000, 3)
    copied, ends = torch.zeros_like(numbers), torch.zeros(1001, 2, device=device)
    copy([*copied], [*numbers], ends)
    assert torch.equal(copied, numbers)
    assert torch.equal(ends[:-1], numbers[:, ::2])


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Which NaN it is left aside where another dtype is written."""
    kind = INTEGERS[x.element_size()]
    numbers = ~(x.isnan() & y.isnan())
    return torch.equal(x[numbers].view(kind), y[numbers].view(kind))


def _numbers(size: int, rng: random.Random, generator: torch.Generator) -> Tensor:
    numbers = torch.randn(size, generator=generator) * rng.choice([1e-7, 1.0, 3e4])
    if rng.random() < 0.3:
        numbers[rng.randrange(size)] = rng.choice([float("inf"), -float("inf"), float("nan"), 1e38])
    return -numbers.abs() if rng.random() < 0.2 else numbers
