"""Parameters and gradients of tests that need no golden numbers, and what a step changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pylo_dist
from support.optimizers import SMALL_FC, VARIANTS, Roles

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "bias": (5,),
    "wide": (3, 7),
    "square": (4, 4),
    "conv": (5, 2, 3, 3),
}
EVERY = {"embedding": (11, 4), **SHAPES}  # what one optimizer or another tells apart
Named = list[tuple[str, nn.Parameter]]


def adafac(params: Any, **kwargs: Any) -> pylo_dist.AdafacLO:
    return pylo_dist.AdafacLO(params, weights=SMALL_FC, **kwargs)


def build(name: str, named: Named, groups: Any = None, **changes: Any) -> Any:
    """An optimizer of the list, on these parameters or on groups of them."""
    widths = {fqn: 2.0 for fqn, _ in named if fqn == "wide"}
    case = VARIANTS[name].on(Roles(widths, embedding="embedding"))
    return case.build(named if groups is None else groups, **changes)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def make_params(
    shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> Named:
    return [
        (fqn, nn.Parameter(0.1 * normal(shape, i, dtype)))
        for i, (fqn, shape) in enumerate(shapes.items())
    ]


def set_gradients(named: Named, step: int) -> None:
    for i, (_, param) in enumerate(named):
        param.grad = 0.01 * normal(tuple(param.shape), 1000 * (step + 1) + i, param.dtype)


def loss_of(step: int) -> Tensor:
    return torch.tensor(2.0 / (step + 1))


def train(optimizer: Any, named: Named, first: int, last: int) -> None:
    """Steps on the gradients and losses of their numbers."""
    for step in range(first, last):
        set_gradients(named, step)
        optimizer.step(loss_of(step))


def values(named: Named) -> dict[str, Tensor]:
    return {
        fqn: param.detach().clone(memory_format=torch.contiguous_format) for fqn, param in named
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return values(list(model.named_parameters()))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[fqn], b[fqn]) for fqn in a)


def everything(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor a step may write: parameters, state, step counts and what else groups hold."""
    found: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor):
                found[f"{i}.{key}"] = value.clone()
        for j, param in enumerate(group["params"]):
            found[f"{i}.{j}"] = param.detach().clone()
            found.update(
                {f"{i}.{j}.{name}": t.clone() for name, t in optimizer.state.get(param, {}).items()}
            )
    return found


def after(steps: int, **kwargs: Any) -> dict[str, Tensor]:
    """The parameters after `steps` plain steps."""
    named = make_params()
    train(adafac(named, **kwargs), named, 0, steps)
    return values(named)
