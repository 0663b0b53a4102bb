"""AdamW of some tensors of a batch: their state, and a step, in one compiled pass for all or in
plain PyTorch, those of equal size as one. Writes value and state of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..core import trace
from ..core.requests import Sum
from ..core.rule import Batch
from ..core.shards import global_indices
from ..core.state import StateField
from . import compiled, reference, stacks
from .rounding import Draw, Rounding, Roundings, is_halved
from .stacks import Stack


@dataclass(frozen=True, slots=True)
class Rates:
    """How the tensors of a parameter group move, see `reference.adamw`; the numbers may be float64
    0-d tensors.
    """

    lr: float | Tensor
    weight_decay: float = 0.0
    decay_after: float | Tensor = 0.0


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
        some: Sequence[Stack],
        rates: Callable[[dict[str, Any]], Rates],
        roundings: Roundings,
        size: Tensor | None = None,
    ) -> None:
        """One step of the items of these stacks.

        Args:
            rates: of a parameter group.
            size: float64 0-d, multiplies every `lr`.
        """
        passes = _passes(batch, some)
        if passes is not None:
            passes.step(self, batch, rates, roundings, size)
            return
        for stack in some:
            how = rates(batch.items[stack.items[0]].hyper)
            lr = how.lr if size is None else how.lr * size
            self._step(batch, stack, lr, how.weight_decay, how.decay_after, roundings)

    def _step(
        self,
        batch: Batch,
        stack: Stack,
        lr: float | Tensor,
        weight_decay: float,
        decay_after: float | Tensor,
        roundings: Roundings,
    ) -> None:
        """One step of the items of a stack, which belong to one group, in plain PyTorch."""
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
    passes = _passes(batch, some)
    if passes is not None:
        passes.param_squares(batch, a)
        return
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


# ----------------------------------------------------------------------------------------- compiled


class _Passes:
    """The compiled passes over some items of a batch: what is made once for them, and the calls.

    Legend: B these items.
    """

    def __init__(self, batch: Batch, items: Sequence[int]) -> None:
        self.items = list(items)
        chosen = [batch.items[i] for i in items]
        self.states = [item.state for item in chosen]
        self.means = [state["exp_avg"] for state in self.states]
        self.squares = [state["exp_avg_sq"] for state in self.states]
        device = batch.device
        # which elements of the whole tensors those of every item of the batch are
        self.shards: Tensor | None = None
        if any(map(is_halved, self.means)):
            shards = [item.param.shard for item in batch.items]
            numbers = [(shard.start, shard.run, shard.pitch) for shard in shards]
            self.shards = torch.tensor(numbers, dtype=torch.int64)
        self.sums = torch.zeros(len(self.items), dtype=torch.float64, device=device)
        size = torch.ops.pylo_dist.adamw_workspace([item.param.value for item in chosen])
        self.workspace = [torch.zeros(size, dtype=torch.uint8, device=device)]

    @staticmethod
    def serve(batch: Batch, items: Sequence[int]) -> bool:
        """Whether there are compiled passes for these items, on their device."""
        if compiled.missing(batch.device):
            return False
        states = [batch.items[i].state[name] for i in items for name in ("exp_avg", "exp_avg_sq")]
        kinds = (torch.float32, torch.bfloat16)
        return all(state.dtype in kinds and state.is_contiguous() for state in states) and all(
            batch.items[i].param.value.dtype in compiled.DTYPES for i in items
        )

    @trace.phased("kernels: square_sums")
    def param_squares(self, batch: Batch, a: Sum) -> None:
        values = [batch.items[i].param.value for i in self.items]
        torch.ops.pylo_dist.square_sums(values, self.sums, self.workspace)
        torch._foreach_copy_([a.vectors[i] for i in self.items], list(self.sums[:, None].unbind()))

    @trace.phased("kernels: adamw_pass")
    def step(
        self,
        how: AdamW,
        batch: Batch,
        rates: Callable[[dict[str, Any]], Rates],
        roundings: Roundings,
        size: Tensor | None,
    ) -> None:
        def numbers_of(hyper: dict[str, Any]) -> tuple[float | Tensor, ...]:
            rate = rates(hyper)
            return rate.lr, rate.weight_decay, rate.decay_after

        params = [batch.items[i].param for i in self.items]
        places_B = batch.on_device("adamw", tuple(self.items), torch.int64)
        counters, steps_B = self._counted(how, batch, places_B)
        moving_B3 = batch.numbers("adamw", numbers_of).index_select(0, places_B)
        if size is not None:
            moving_B3[:, 0] *= size
        corrections_B = [1.0 - beta**steps_B for beta in how.betas]
        rounding = [] if self.shards is None else [self.shards, roundings.keys(batch)]
        torch.ops.pylo_dist.adamw_pass(
            self.items,
            [param.value for param in params],
            [param.grad for param in params],
            self.means,
            self.squares,
            _rule_numbers(how),
            torch.cat((torch.stack(corrections_B, 1), moving_B3), 1).to(torch.float32),
            batch.moves,
            batch.scale,
            batch.update_squares,
            rounding,
            self.workspace,
        )
        if counters:
            moves = batch.moves.index_select(0, places_B).to(counters[0].dtype)
            torch._foreach_add_(counters, list(moves.unbind()))

    def _counted(self, how: AdamW, batch: Batch, places_B: Tensor) -> tuple[list[Tensor], Tensor]:
        """The items' own counters of steps, if they have them, and the number of this step by item,
        float64.
        """
        if not how.group_counter:
            counters = [state["adam_step"] for state in self.states]
            return counters, torch.stack(counters).view(-1).to(torch.float64) + 1.0
        groups, group_of = batch.hypers()
        steps = torch.stack([group["step"].to(batch.device) for group in groups])
        chosen = group_of.index_select(0, places_B)
        return [], steps.view(-1).to(torch.float64).index_select(0, chosen) + 1.0


@cache
def _rule_numbers(how: AdamW) -> list[float]:
    """`AdamWRule` of csrc/include/pylo_dist/adamw.h."""
    (mean, square), clamp = how.betas, math.inf if how.clamp is None else how.clamp
    return [mean, 1.0 - mean, square, 1.0 - square, how.eps, how.eps_root, clamp]


def _passes(batch: Batch, some: Sequence[Stack]) -> _Passes | None:
    """The compiled passes over the items of these stacks, or None."""
    items = [i for stack in some for i in stack.items]
    if not items or not compiled.enabled():
        return None
    kept: tuple[list[int], _Passes | None] | None = batch.cache.get("adamw")
    if kept is None or kept[0] != items:
        found = _Passes(batch, items) if _Passes.serve(batch, items) else None
        kept = batch.cache["adamw"] = items, found
    return kept[1]
