"""What `ZeroOptimizer` asks of the optimizer that steps on this rank's pieces, and the two kinds
that answer: learned optimizers, and torch's elementwise ones. Writes what these write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core import trace
from ...layouts.company import Company, company_of
from ...optimizer import LearnedOptimizer, checks
from ...optimizer.first_steps import joined
from ...optimizer.loading import check_names
from ...optimizer.report import Report, group_settings, report_row
from ...optimizer.settings import GroupNumbers
from ...optimizer.sharded_state import elementwise_local_state, elementwise_state_dict
from .buckets import Bucket, Named
from .masters import without_masters
from .scaling import Scaling
from .sharing import Sharing, raise_alike

# Optimizers of torch whose update of an element depends on that element alone; any other would be
# silently wrong on a shard.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)


class Inner(Protocol):
    """An optimizer over bound pieces, as `ZeroOptimizer` drives it.

    State dicts are canonical: of the unsharded optimizer's keys, shapes and dtypes.

    Args:
        optimizer: over the pieces of `buckets`.
        buckets: those of the adapter; the list may grow.
        sharing: the ranks that share them.
        timeout: seconds, see `comm.Pending`.

    Attributes:
        scaling: compares, in the step, what was done to the gradients meanwhile; None: nobody to
            compare with.
    """

    scaling: Scaling | None

    def __init__(
        self,
        optimizer: Any,
        buckets: Sequence[Bucket],
        sharing: Sharing,
        timeout: float | None,
    ) -> None: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself."""

    @property
    def weights(self) -> Any:
        """Its learned weights, or None."""

    @property
    def grad_norm(self) -> Tensor:
        """See `LearnedOptimizer.grad_norm`. Raises TypeError where none is kept."""

    @staticmethod
    def before_sharding(
        optimizer_class: Any, named: Sequence[Named], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Keyword arguments for the constructor, with what only whole parameters show."""

    def settings(self) -> list[str]:
        """What must be the same on all ranks."""

    def step(self, loss: Tensor | float | None, problem: Exception | None) -> None:
        """Take one step. A `problem` of this rank is raised before anything changes, and a
        PeerError on the ranks that have none.
        """

    def set_loss(self, loss: Tensor | float) -> None:
        """See `LearnedOptimizer.set_loss`."""

    def extend(self, num_steps: int) -> None:
        """See `VeLO.extend`. Raises TypeError where there is no length of run."""

    def gradients_arrived(self, bucket: Bucket) -> None:
        """A bucket's averaged gradient is there: what reads gradients alone may begin."""

    def forget_gradients(self) -> None:
        """Undo `gradients_arrived`."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, of which this rank has its part; no collective."""

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise the ValueError that loading would raise.

        Args:
            state_dict: as it was saved, masters among it.
        """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without masters."""

    def replicated_state(self) -> list[tuple[str, Tensor | None]]:
        """What ranks must hold bit by bit alike, each with what it is called; None for what this
        one does not keep.
        """

    def stats(self) -> dict[str, dict[str, Tensor]]:
        """See `LearnedOptimizer.stats`."""

    def report(self) -> Report:
        """One row per parameter."""


class LearnedInner:
    """A learned optimizer: it knows of shards, and brings errors of one rank to all by itself. From
    now on it averages the loss over the ranks that share the buckets.
    """

    def __init__(
        self,
        optimizer: LearnedOptimizer,
        buckets: Sequence[Bucket],
        sharing: Sharing,
        timeout: float | None,
    ) -> None:
        self.optimizer = optimizer
        self._buckets = buckets
        optimizer.process_group = False if sharing.holders is None else sharing.holders
        optimizer.timeout = timeout
        self.scaling = None if sharing.holders is None else Scaling(buckets, sharing.holders)
        if self.scaling is not None:
            optimizer.around = self.scaling.riding

    @property
    def weights(self) -> Any:
        return self.optimizer.weights

    @property
    def grad_norm(self) -> Tensor:
        return self.optimizer.grad_norm

    @staticmethod
    def before_sharding(
        optimizer_class: type[LearnedOptimizer], named: Sequence[Named], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        return optimizer_class.before_sharding(named, kwargs)

    def settings(self) -> list[str]:
        return self.optimizer.settings()

    def step(self, loss: Tensor | float | None, problem: Exception | None) -> None:
        if problem is not None:  # raised in the step, where the other ranks hear of it too
            self.optimizer.fail_next_step(problem)
        self.optimizer.step(loss=loss)

    def set_loss(self, loss: Tensor | float) -> None:
        self.optimizer.set_loss(loss)

    def extend(self, num_steps: int) -> None:
        extend = getattr(self.optimizer, "extend", None)
        if extend is None:
            raise _no_length(self.optimizer)
        extend(num_steps)

    @trace.phased("step: early")
    def gradients_arrived(self, bucket: Bucket) -> None:
        self.optimizer.early.arrived(member.piece for member in bucket.members)

    def forget_gradients(self) -> None:
        self.optimizer.early.forget()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.check_state_dict(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def replicated_state(self) -> list[tuple[str, Tensor | None]]:
        optimizer = self.optimizer
        found: list[tuple[str, Tensor | None]] = []
        for member in (member for bucket in self._buckets for member in bucket.members):
            state = optimizer.state.get(member.piece)
            for name, field in optimizer.state_fields(member.piece).items():
                if field.replicated is not None and state:
                    kept = state[name] if field.is_kept(member.shard) else None
                    found.append((f"{name!r} of {member.fqn!r}", kept))
        for i, group in enumerate(optimizer.param_groups):
            for key in ("step", *optimizer.rule.group_state()):
                found.append((f"{key!r} of group {i}", group[key]))
        return found

    def stats(self) -> dict[str, dict[str, Tensor]]:
        return self.optimizer.stats()

    def report(self) -> Report:
        return self.optimizer.report()


class ElementwiseInner:
    """One of ELEMENTWISE: it takes pieces for whole 1-D parameters and knows of no other rank."""

    weights: Any = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[Bucket],
        sharing: Sharing,
        timeout: float | None,
    ) -> None:
        self.optimizer = optimizer
        self._buckets, self._sharing, self._timeout = buckets, sharing, timeout
        self.scaling = None if sharing.holders is None else Scaling(buckets, sharing.holders)
        further = [key for key in ("maximize",) if key in optimizer.defaults]
        self._numbers = GroupNumbers(type(optimizer), optimizer.defaults, further, lambda _: None)
        self._company: Company | None = None  # unknown before the first step

    @property
    def grad_norm(self) -> Tensor:
        raise TypeError(f"{type(self.optimizer).__name__} keeps no gradient norm")

    @staticmethod
    def before_sharding(
        optimizer_class: type[torch.optim.Optimizer],
        named: Sequence[Named],
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        return kwargs

    def settings(self) -> list[str]:
        return [type(self.optimizer).__name__, *group_settings(self.optimizer.param_groups)]

    def step(self, loss: Tensor | float | None, problem: Exception | None) -> None:
        problem = self._joined(self._numbers.read(self.optimizer.param_groups, problem))
        device = self._buckets[0].flat.device
        if self.scaling is None:
            raise_alike(problem, self._sharing, device, self._timeout, None)
        else:
            mine = self.scaling.mine()
            compared = torch.cat([mine, self._numbers.buffer(device, by_group=True)])
            raise_alike(problem, self._sharing, device, self._timeout, compared)
            differ = self._numbers.judge([compared[len(mine) :]], device)
            if differ is not None and bool(differ):  # the device has been waited for
                unlike: ValueError | None = self._numbers.error()
                self._numbers.forget()
            else:
                unlike = self.scaling.problem(compared[: len(mine)])
            if unlike is not None:
                raise unlike
        self.optimizer.step()

    def _joined(self, problem: Exception | None) -> Exception | None:
        """The problem, or that ranks may run out of inputs."""
        if problem is None and self._sharing.holders is not None:
            if self._company is None:
                pieces = [member.piece for bucket in self._buckets for member in bucket.members]
                self._company = company_of(self.optimizer, pieces)
            if self._company.joins():
                return joined(type(self.optimizer).__name__)
        return problem

    def set_loss(self, loss: Tensor | float) -> None:
        """It reads none."""

    def extend(self, num_steps: int) -> None:
        raise _no_length(self.optimizer)

    def gradients_arrived(self, bucket: Bucket) -> None:
        """It begins with the step."""

    def forget_gradients(self) -> None:
        """It has begun with none."""

    def state_dict(self) -> dict[str, Any]:
        return elementwise_state_dict(self.optimizer.state_dict(), self.optimizer.param_groups)

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = self.optimizer.param_groups
        elementwise_local_state(without_masters(state_dict), groups)
        check_names(state_dict["param_groups"], groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        local = elementwise_local_state(state_dict, self.optimizer.param_groups)
        self.optimizer.load_state_dict(local)

    def replicated_state(self) -> list[tuple[str, Tensor | None]]:
        return []

    def stats(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def report(self) -> Report:
        name, ranks = type(self.optimizer).__name__, self._sharing.ranks
        rows = []
        for member in (member for bucket in self._buckets for member in bucket.members):
            state, dtype = self.optimizer.state.get(member.piece, {}), member.param.dtype
            rows.append(report_row(member.shard, dtype, name, state, ranks))
        numel = sum(row["numel"] for row in rows)
        return Report(rows, [name], {"parameters": len(rows), "numel": numel})


def kind_of(optimizer_class: type[torch.optim.Optimizer]) -> type[Inner]:
    """What makes an `Inner` of optimizers of this class.

    Raises:
        ValueError: it is neither learned nor one of ELEMENTWISE.
    """
    if not isinstance(optimizer_class, type):
        raise checks.refused("optimizer_class", optimizer_class, "a class of optimizers")
    if issubclass(optimizer_class, LearnedOptimizer):
        return LearnedInner
    if optimizer_class not in ELEMENTWISE:
        known = ", ".join(c.__name__ for c in ELEMENTWISE)
        raise ValueError(
            f"optimizer_class {optimizer_class.__name__} may read whole tensors and would be "
            f"silently wrong on shards; wanted a learned optimizer of pylo_dist or one of {known}"
        )
    return ElementwiseInner


def _no_length(optimizer: torch.optim.Optimizer) -> TypeError:
    return TypeError(f"{type(optimizer).__name__} has no length of run to extend")
