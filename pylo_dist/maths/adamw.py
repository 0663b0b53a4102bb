"""AdamW of some tensors of a batch, those of equal size as one: their state, and a step. Writes
value and state of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from ..core.requests import Sum
from ..core.rule import Batch
from ..core.shards import global_indices
from ..core.state import StateField
from . import reference, stacks
from .rounding import Draw, Rounding, Roundings, is_halved
from .stacks import Stack


@dataclass(frozen=True)
class AdamW:
    """What a rule's AdamW computes with, see `reference.adamw`.

    Attributes:
        group_counter: the steps of the bias correction are the group's, not those a tensor has
            taken itself.
    """

    betas: tuple[float, float]
    eps: float
    eps_root: float = 0.0
    clamp: float | None = None
    group_counter: bool = False

    @cache  # noqa: B019  (few of them, and frozen)
    def state_fields(self) -> dict[str, StateField]:
        moments = {
            "exp_avg": StateField(slot=reference.MEAN_SLOT),
            "exp_avg_sq": StateField(slot=reference.SQUARE_SLOT),
        }
        return (
            moments if self.group_counter else {**moments, "adam_step": StateField(replicated=())}
        )

    def step(
        self,
        batch: Batch,
        stack: Stack,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        decay_after: float | Tensor = 0.0,
        *,
        roundings: Roundings,
    ) -> None:
        """One step of the items of a stack, which belong to one group."""
        items = [batch.items[i] for i in stack.items]
        states = [item.state for item in items]
        taken = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        values, grads = (
            [item.param.value for item in items],
            [item.param.grad for item in items if item.param.grad is not None],
        )
        value, grad, mean, square = (stacks.stacked(tensors) for tensors in (values, grads, *taken))
        counters = [] if self.group_counter else [state["adam_step"] for state in states]
        counter = items[0].hyper["step"] if self.group_counter else stacks.stacked(counters)
        moves, squares = (
            stack.of(batch.moves),
            torch.zeros(len(items), dtype=torch.float64, device=batch.device),
        )
        draw_of: Callable[[slice], Draw] | None = None
        if is_halved(mean):
            draw_of = partial(_draw, batch, stack, roundings.of(items[0].hyper))
        reference.adamw(
            value,
            grad,
            mean,
            square,
            counter + 1,
            self.betas,
            self.eps,
            lr,
            weight_decay,
            stack.of(batch.scale) if batch.clips else None,
            moves,
            squares,
            eps_root=self.eps_root,
            clamp=self.clamp,
            decay_after=decay_after,
            draw_of=draw_of,
        )
        if counters:
            reference.commit(counter, counter + 1, moves)
            stacks.put_back(counter, counters)
        for tensor, tensors in ((value, values), (mean, taken[0]), (square, taken[1])):
            stacks.put_back(tensor, tensors)
        batch.update_squares.index_copy_(0, stack.places, squares)


def _draw(batch: Batch, stack: Stack, rounding: Rounding, part: slice) -> Draw:
    """What the elements `part` of every item of a stack are rounded with."""
    shards = [batch.items[i].param.shard for i in stack.items]
    numbers = tuple((shard.start, shard.run, shard.pitch) for shard in shards)
    table = batch.on_device(f"shards {stack.items[0]}", numbers, torch.int64)
    start, run, pitch = table.unsqueeze(-1).unbind(1)
    local = torch.arange(part.start, min(part.stop, shards[0].numel), device=batch.device)
    index = global_indices(local, start, run, pitch)
    return rounding.of_elements(index, max(shard.global_numel for shard in shards))


def param_squares(batch: Batch, some: Sequence[Stack], a: Sum) -> None:
    """Write the local sum of p^2 of the items into their vectors of `a`, each of one number."""
    for stack in some:
        values = stacks.stacked([batch.items[i].param.value for i in stack.items])
        squares = torch.zeros(len(values), 1, dtype=torch.float64, device=batch.device)
        for part in reference.parts(values):
            squares += values[:, part].to(torch.float64).square().sum(-1, keepdim=True)
        torch._foreach_copy_([a.vectors[i] for i in stack.items], list(squares.unbind()))


def keep_param_squares(batch: Batch, some: Sequence[Stack], a: Sum) -> None:
    """Bring the answer to `param_squares` to `stats()`."""
    if some:
        squares = a.heads(1)[:, 0]
    for stack in some:
        batch.param_squares.index_copy_(0, stack.places, squares.index_select(0, stack.places))
