"""A model whose gradients are exact whatever the layout: integers over a power of two, through a
real backward.

Every parameter enters the loss linearly, with coefficients that depend on the step and on the
data-parallel rank. Linear layers do so in matrix products, so that tensor parallelism cuts them as
it does in a transformer.
"""

from __future__ import annotations

from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

import pylo_dist
from support.optimizers import VARIANTS, Roles, cases

STEPS = 20


def integers(*key: Any, shape: tuple[int, ...]) -> Tensor:
    """Multiples of 3/64: also the third of one is exact."""
    generator = torch.Generator().manual_seed(
        hash(sum(ord(c) * (i + 1) for i, c in enumerate(repr(key)))) % 2**31
    )
    return torch.randint(-16, 17, shape, generator=generator) * 3 / 64.0


class Scale(nn.Module):
    """Stands in for a norm: sequence parallelism replicates its parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Probe(nn.Module):
    """Parameters of any shape, each with a coefficient per element."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(shape)))
        self.unused = nn.Parameter(torch.randn(6, 5))
        self.always = False
        self.names = list(shapes)

    def forward(self, step: int, rank: int) -> Tensor:
        total = torch.zeros(())
        for name in self.names:
            p = getattr(self, name)  # in a flat parameter there is none of this name
            if self.always or name != "sometimes" or rank == 0:
                total = (
                    total + (p * integers(name, step, rank, shape=tuple(p.shape)).to(p.dtype)).sum()
                )
        return total


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Scale(width)
        self.sequence = Scale(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.odd = Probe(
            {
                "conv": (5, 3, 3, 3),
                "row": (1, 37),
                "tiny": (3, 2),
                "bias": (41,),
                "square": (12, 12),
            }
        )
        # which part of the sequence this tensor-parallel rank sees, and of how many
        self.part = (0, 1)

    def forward(self, step: int, rank: int) -> Tensor:
        width = self.norm.weight.numel()
        x = integers("x", step, rank, shape=(2, 12, width))
        total = (self.norm(x) * integers("n", step, rank, shape=(2, 12, width))).sum()
        mine = x.chunk(self.part[1], dim=1)[self.part[0]].contiguous()
        scaled = self.sequence(mine)
        if isinstance(scaled, DTensor):
            scaled = scaled.redistribute(placements=[Replicate()]).to_local()
        total = total + (scaled * integers("s", step, rank, shape=(2, 12, width))).sum()
        total = total + (self.up(x) * integers("u", step, rank, shape=(2, 12, 3 * width))).sum()
        wide = integers("w", step, rank, shape=(2, 12, 3 * width))
        total = total + (self.down(wide) * integers("d", step, rank, shape=(2, 12, width))).sum()
        return total + self.odd(step, rank)


class Net(nn.Module):
    """An uneven tied embedding, blocks, a 0-d parameter and one that only one rank uses (both for
    `ignored_params`).
    """

    def __init__(self, seed: int = 0, width: int = 10, blocks: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(53, 4)
        self.head = nn.Linear(4, 53, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.own = Probe({"scalar": (), "sometimes": (7, 5)})
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def ignored(self) -> set[nn.Parameter]:
        return {self.own.scalar, self.own.sometimes, self.own.unused}

    def forward(self, step: int, rank: int) -> Tensor:
        tokens = (torch.arange(17) * (step + 3 * rank + 1)) % 53
        total = (self.embedding(tokens) * integers("e", step, rank, shape=(17, 4))).sum()
        hidden = integers("h", step, rank, shape=(3, 4))
        total = total + (self.head(hidden) * integers("l", step, rank, shape=(3, 53))).sum()
        total = total + self.own(step, rank)
        for block in self.blocks:
            total = total + block(step, rank)
        return total


def loss_of(step: int, rank: int) -> float:
    return 3.0 - 0.0625 * step + 0.125 * rank


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(fqn, p) for fqn, p in model.named_parameters() if p.requires_grad]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by name; collective where they are sharded."""
    return {fqn: whole(p) for fqn, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """A copy of the global tensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


Gradients = list[dict[str, Union[Tensor, None]]]


def backward(model: nn.Module, called: nn.Module, rank: int) -> Gradients:
    """The gradients of STEPS steps, as the layout leaves them: they do not depend on the
    parameters.
    """
    history: Gradients = []
    for step in range(STEPS):
        model.zero_grad()
        called(step, rank).backward()
        history.append({fqn: p.grad for fqn, p in trainable(model)})
    model.zero_grad()
    return history


def mean_gradients(ranks: int, always: bool = False) -> Gradients:
    """What data-parallel ranks average to, exactly, in one process."""
    model = Net()
    model.own.always = always
    parts = [backward(model, model, rank) for rank in range(ranks)]
    history: Gradients = []
    for step in range(STEPS):
        present = {
            fqn: [part[step][fqn] for part in parts if part[step][fqn] is not None]
            for fqn in parts[0][step]
        }
        history.append(
            {
                fqn: sum(grads[1:], grads[0].clone()) / ranks if grads else None
                for fqn, grads in present.items()
            }
        )
    return history


def set_gradients(model: nn.Module, gradients: dict[str, Tensor | None]) -> None:
    for fqn, p in trainable(model):
        p.grad = gradients[fqn]


def unsharded(
    ranks: int, gradients: Gradients, optimizer_class: Any, **kwargs: Any
) -> tuple[list[dict[str, Tensor]], Any, Net]:
    """The same steps in one process on the mean gradients: parameters after each, the optimizer,
    the model.
    """
    model = Net()
    optimizer = optimizer_class(trainable(model), **kwargs)
    history = [snapshot(model)]
    for step, mean in enumerate(gradients):
        set_gradients(model, mean)
        if isinstance(optimizer, pylo_dist.LearnedOptimizer):
            optimizer.set_loss(sum(loss_of(step, rank) for rank in range(ranks)) / ranks)
        optimizer.step()
        history.append(snapshot(model))
    return history, optimizer, model


ROLES = Roles(widths={"blocks.0.up.weight": 4.0, "embedding.weight": 2.0}, embedding="^embedding")
# VeLO_clipped, Celo_clipped and AdafacLO_per_tensor do all that the plain ones and AdafacLO_clipped
# do; the halved ones have all kinds of state in two
LEFT_OUT = ("AdafacLO_clipped", "VeLO", "Celo", "Tide", "VeLO_halved", "CeloAdam_halved")
SETTINGS = cases(ROLES, [name for name in VARIANTS if name not in LEFT_OUT])
