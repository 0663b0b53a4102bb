"""What a learned rule is, and the items and batches it works on. Writes nothing but what its batch
remembers.

A rule is a generator. It reads like its paper and yields a `Sum` wherever it needs a quantity of
the whole tensor; the engine adds the request over the ranks that share each tensor and resumes it.
A rule knows no mesh and never reads a value back to the host, so that the same code runs sharded,
unsharded and on virtual ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .pieces import ShardBinding, ShardedParam
from .requests import Request, Sum
from .shards import Shape, TensorShard
from .state import StateField, state_dtype


@dataclass(slots=True)
class Item:
    """One parameter in a batch.

    Attributes:
        param: the sharded parameter, renewed by the adapter before every step.
        state: state tensors flattened to (*copies, elements), written in place by the rule.
        hyper: the parameter group (lr, weight_decay, ..., `step` = steps taken before this one,
            int64 0-d).
        dims: the factored dimensions (d1, d0) of the global shape, or None.
    """

    param: ShardedParam
    state: dict[str, Tensor]
    hyper: dict[str, Any]
    dims: tuple[int, int] | None

    @property
    def dtype(self) -> torch.dtype:
        """That of its arithmetic, float32 or float64, whatever value and state are kept in."""
        return state_dtype(self.param.value.dtype)


@dataclass(slots=True)
class Batch:
    """All parameters that one rule drives, over all parameter groups and process groups of an
    optimizer, on one device.

    Attributes:
        items: every parameter, also those without a gradient, in the same order on every rank.
        groups: all parameter groups of the optimizer, also those without an item.
        moves: bool (items,), which tensors move in this step; set by the engine after the first
            Sum.
        scale: float64 (items,), what clipping multiplies each gradient by; set by the engine after
            the first Sum.
        clips: whether any item can be clipped at all; decided from the parameter groups.
        allows_nonfinite: whether gradients with NaN or inf are let through; set by the engine at
            construction.
        cache: what the rule works out once, for as long as the items are the same; its names are
            the rule's own.
        figures: what else the rule tells `stats()`, by name, (items,) each.
        summed: items whose gradients were read before the step, see `LearnedRule.gradient_pass`;
            emptied by the engine once it has the first Sum.
        taken: bool 0-d, whether this step is taken; set by the engine after the first Sum. Masks
            what belongs to no single tensor.
        loss: float64 0-d, the loss of this step averaged over the ranks, for rules that need it;
            set with `taken`.
        param_squares, update_squares: float64 (items,), written by the rule for `stats()`: the sum
            of p^2 over the whole tensor (before the step), and the sum of (p_new - p)^2 over the
            local elements.
    """

    items: list[Item]
    groups: list[dict[str, Any]]
    device: torch.device
    moves: Tensor
    scale: Tensor
    param_squares: Tensor
    update_squares: Tensor
    clips: bool = False
    taken: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    allows_nonfinite: bool = False
    cache: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Tensor] = field(default_factory=dict)
    summed: set[int] = field(default_factory=set)
    _sums: dict[str, Sum] = field(default_factory=dict)
    # of `on_device`, by name
    _tables: dict[str, tuple[tuple[Any, ...], Tensor]] = field(default_factory=dict)
    # of `numbers`, by name
    _numbers: dict[str, tuple[list[float], Tensor]] = field(default_factory=dict)
    _groups_of_items: tuple[list[dict[str, Any]], tuple[int, ...], list[int]] | None = None
    # tables that CUDA graphs read at every replay
    _held: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, items: list[Item], groups: list[dict[str, Any]], device: torch.device) -> Batch:
        def vector(value: float) -> Tensor:
            return torch.full((len(items),), value, dtype=torch.float64, device=device)

        moves = torch.ones(len(items), dtype=torch.bool, device=device)
        return cls(items, groups, device, moves, vector(1.0), vector(0.0), vector(0.0))

    def on_device(self, name: str, values: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        """`values` on this device, copied there only when they are others than last time, and then
        without waiting for it.

        Raises ValueError for others in the capture of a CUDA graph, which would copy from host
        memory at every replay.
        """
        table, capturing = self._tables.get(name), is_capturing(self.device)
        if table is None or not (table[0] is values or table[0] == values):
            if capturing:
                raise ValueError(
                    f"{name!r} is other than in the step before this CUDA graph's capture (a "
                    "parameter without a gradient? other limits or groups?): take one step like "
                    "the captured one first"
                )
            host = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
            table = self._tables[name] = (values, host.to(self.device, non_blocking=True))
        if capturing:  # replays read it wherever the next values lie
            self._held.append(table[1])
        return table[1]

    def hypers(self) -> tuple[list[dict[str, Any]], Tensor]:
        """The parameter groups that have items, and which of them each item belongs to, int64
        (items,).
        """
        groups, group_of, _ = self._grouped()
        return groups, self.on_device("engine: groups", group_of, torch.int64)

    def first_of_hypers(self) -> list[int]:
        """The first item of each of the groups of `hypers`."""
        return self._grouped()[2]

    def _grouped(self) -> tuple[list[dict[str, Any]], tuple[int, ...], list[int]]:
        """Groups that have items, the place of each item's, and the first item of each."""
        if self._groups_of_items is None:
            first: dict[int, int] = {}
            for i, item in enumerate(self.items):
                first.setdefault(id(item.hyper), i)
            place = {key: i for i, key in enumerate(first)}
            self._groups_of_items = (
                [self.items[i].hyper for i in first.values()],
                tuple(place[id(item.hyper)] for item in self.items),
                list(first.values()),
            )
        return self._groups_of_items

    def numbers(
        self, name: str, numbers_of: Callable[[dict[str, Any]], Sequence[float | Tensor]]
    ) -> Tensor:
        """Numbers of every item's parameter group, float64 (items, numbers).

        What the host knows is written by kernels that hold the number, so that a schedule costs no
        copy and no wait. A CUDA graph keeps such numbers as they were in its capture; it follows
        those that are tensors on the device.
        """
        groups, group_of = self.hypers()
        rows = [[_known(x, self.device) for x in numbers_of(group)] for group in groups]
        width = len(rows[0])
        if name in self._numbers and not is_capturing(self.device):
            known, table = self._numbers[name]
        else:
            table = torch.zeros(len(rows), width, dtype=torch.float64, device=self.device)
            known = [0.0] * table.numel()
            if not is_capturing(self.device):
                self._numbers[name] = (known, table)
        for k, (x, at) in enumerate(
            zip((x for row in rows for x in row), table.view(-1).unbind(), strict=True)
        ):
            if isinstance(x, Tensor):
                at.copy_(x)
                known[k] = math.nan
            elif x != known[k]:
                known[k] = x
                at.fill_(x)
        chosen: Tensor = table.index_select(0, group_of)
        return chosen

    def new_sum(self, phase: str, length: Callable[[Item], int], audited: bool = False) -> Sum:
        """The zeroed request of this phase; `length` must follow from global shapes alone. Its
        memory is kept over steps.
        """
        return self.reused_sum(phase, length, audited).zero_()

    def reused_sum(self, phase: str, length: Callable[[Item], int], audited: bool = False) -> Sum:
        """As `new_sum`, with what is in it."""
        if phase not in self._sums:
            lengths = [length(item) for item in self.items]
            self._sums[phase] = Sum(
                [item.param for item in self.items], lengths, self.device, audited
            )
        return self._sums[phase]

    def candidates(self) -> Iterator[tuple[int, Item]]:
        """Items that may change in this step: all but the unshared ones without a gradient."""
        for i, item in enumerate(self.items):
            if item.param.present or item.param.holders is not None:
                yield i, item


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what is launched now runs later, any number of
    times.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _known(x: float | Tensor, device: torch.device) -> float | Tensor:
    """A number in host memory as a float, where the tensors are elsewhere."""
    return float(x) if isinstance(x, Tensor) and x.device.type == "cpu" != device.type else x


class LearnedRule(ABC):
    """The mathematics of one learned optimizer.

    Attributes:
        name: for reports.
        needs_loss: whether `batch.loss` is read. Such a rule couples all tensors of an optimizer,
            at least by what it keeps of the run, and they share one device then.
        clip_eps: added to the norm that clipping divides by; torch.nn.utils.clip_grad_norm_'s.
        replaces_nonfinite: whether NaN and inf that are allowed in count as 0 and the largest
            number.
    """

    name: str
    needs_loss: bool = False
    clip_eps: float = 1e-6
    replaces_nonfinite: bool = False

    def group_state(self) -> dict[str, Tensor]:
        """Initial values of what belongs to the run and not to a parameter.

        Every parameter group holds a copy, so that it is part of the state dict; the rule writes
        all copies alike (`group[name]` of all `batch.groups`, modified in place).
        """
        return {}

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        """The factored dimensions (d1, d0) of a global shape, or None for a rule without row and
        column factors.
        """
        return None

    @abstractmethod
    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        """The state of a parameter, from its name and global shape and its group as it was
        added.
        """

    def describe(self, fields: dict[str, StateField], binding: ShardBinding) -> str:
        """What drives a parameter with this state and layout, for `report()`."""
        return self.name

    def gradient_pass(self, batch: Batch, indices: Iterable[int]) -> None:  # noqa: B027
        """Compute now what `step` reads of the gradients of these items alone; by default nothing.

        Called before the step, as gradients arrive and as often as some do, when neither
        `batch.moves` nor `batch.scale` is known. A rule that implements it adds the indices to
        `batch.summed`, and leaves these items out when `step` does the same for the others. What it
        has computed, such as sums in a `batch.reused_sum`, counts for items of `batch.summed`
        alone: where that is empty, all begins from nothing.
        """

    def forget_gradient(self, batch: Batch, i: int) -> None:  # noqa: B027
        """Undo `gradient_pass` for an item of `batch.summed`, and take it out: its gradient is
        another one now.
        """

    @abstractmethod
    def step(self, batch: Batch) -> Generator[Request, None, None]:
        """One step on the batch (its values and states are modified in place).

        The first request must carry the gradient audits (`new_sum(..., audited=True)`); no value or
        state may be written before it has been answered, since `batch.moves` and `batch.scale` are
        known only then.
        """
