"""What the rules with row and column factors share: their state and the three passes. Writes value
and state of its batch.

A rule of this family says which features its network reads, and per tensor which network and step
size apply.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..core import trace
from ..core.requests import Request, Sum
from ..core.rule import Batch, Item, LearnedRule
from ..core.shards import Shape, TensorShard, drop_dim, factored_dims
from ..core.state import StateField
from . import compiled, reference
from .compiled import Kernels, Updates
from .reference import Decay, Factors, FeatureSet, Network, Scratch, StepTensors
from .rounding import Roundings, is_halved

LARGEST = torch.finfo(torch.float32).max


@dataclass(slots=True)
class Update:
    """How pass C moves one tensor, see `reference.apply_update`; the numbers may be 0-d tensors."""

    network: Network
    step_size: float | Tensor
    exp_mult: float
    decay_before: float | Tensor = 0.0
    decay_after: float | Tensor = 0.0


@dataclass(slots=True)
class Rates:
    """What of an `Update` is the same for a parameter group; the numbers may be float64 0-d
    tensors.
    """

    step_size: float | Tensor
    exp_mult: float
    decay_before: float | Tensor = 0.0
    decay_after: float | Tensor = 0.0

    def __iter__(self) -> Iterator[float | Tensor]:
        return iter((self.step_size, self.exp_mult, self.decay_before, self.decay_after))


@lru_cache(maxsize=4096)
def _fields(shape: Shape, dims: tuple[int, int] | None) -> dict[str, StateField]:
    """The state of a tensor, one dict for all of its shape."""
    fields = {
        "momentum": StateField((3,), slot=reference.M_SLOT),
        "rms": StateField(slot=reference.V_SLOT),
    }
    if dims is None:
        return {**fields, "diag": StateField((3,))}
    d1, d0 = dims
    row, col = (
        StateField((3,), replicated=drop_dim(shape, d0)),
        StateField((3,), replicated=drop_dim(shape, d1)),
    )
    return {**fields, "row": row, "col": col}


class FactoredRule(LearnedRule):
    """Three momenta, a mean square, and Adafactor's row and column means for three decays; an MLP
    per element.

    Args:
        momentum_decays, rms_decays, factor_decays: decays of the three momenta, of g^2, and of the
            three factors.
    """

    features: FeatureSet
    num_hidden = 0  # hidden units of the network, for the compiled passes
    # sums of a tensor's own that ride in front of pass B's: none, or the nine of
    # `reference.moment_sums`
    num_tensor_sums = 0
    precision = "high"  # of the network in GPU kernels

    def __init__(
        self,
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
    ) -> None:
        self.momentum_decays = tuple(momentum_decays)
        self.rms_decay = min(max(rms_decays[0], 0.0), 1.0)
        self.factor_decays = tuple(min(max(decay, 0.0), 1.0) for decay in factor_decays)
        self._scratch = Scratch()
        self._decays: dict[tuple[object, ...], Decay] = {}

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        return factored_dims(shape)

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        return _fields(shard.shape, self.dims(shard.shape))

    # ------------------------------------------------------------------------------------- requests

    def extra_sums(self, item: Item) -> int:
        """How many sums of a tensor's own ride in front of its row and column sums."""
        return 0

    def first_sum(self, batch: Batch) -> Sum:
        """The request of pass A: zeroed, unless it holds gradients of the coming step already."""

        def length(item: Item) -> int:
            return self.extra_sums(item) + reference.num_gradient_sums(
                item.param.shard.shape, self._factored_dims(item)
            )

        a = batch.reused_sum("A", length, audited=True)
        return a if batch.summed else a.zero_()

    def second_sum(self, batch: Batch) -> Sum:
        """The request of pass B, with what is in it."""

        def length(item: Item) -> int:
            if "momentum" not in item.state:
                return 0
            features = self.features.num_sums(item.dims) * math.prod(
                self.features.lead(item.param.shard.shape)
            )
            return features + self.num_tensor_sums

        return batch.reused_sum("B", length)

    @staticmethod
    def _factored_dims(item: Item) -> tuple[int, int] | None:
        return item.dims if "row" in item.state else None

    def kernels(self, batch: Batch) -> Kernels | None:
        """The compiled passes that serve this batch, or None."""
        if not compiled.enabled():
            return None
        if "kernels" not in batch.cache:
            found = None
            if batch.items and compiled.servable(batch, self.features, self.num_hidden):
                decays = (*self.momentum_decays, self.rms_decay, *self.factor_decays)
                extra = [self.extra_sums(item) for item in batch.items]
                a, b = batch.reused_sum("A", lambda item: 0), self.second_sum(batch)
                found = Kernels(
                    batch,
                    self.features,
                    decays,
                    self.num_hidden,
                    a,
                    b,
                    extra,
                    self.num_tensor_sums > 0,
                )
            batch.cache["kernels"] = found if found is not None and found.served else None
        kernels: Kernels | None = batch.cache["kernels"]
        return kernels

    # --------------------------------------------------------------------------------------- pass A

    def gradient_pass(self, batch: Batch, indices: Iterable[int]) -> None:
        """Add what pass A reads of the gradients of these items to the first Sum of the coming
        step, which calls it for the items that are left.
        """
        a, indices = self.first_sum(batch), list(indices)
        batch.summed.update(indices)
        replace = self.replaces_nonfinite and batch.allows_nonfinite
        limits = self._limits_of(batch)
        kernels = self.kernels(batch)
        if kernels is not None and indices:
            kernels.gradient_pass(batch, indices, limits, replace)
        if kernels is not None and not replace:
            return
        for i in indices:
            item = batch.items[i]
            param, (limit, clamp) = item.param, limits[i]
            assert param.grad is not None
            if kernels is None:
                dims, vector = self._factored_dims(item), a.vectors[i][self.extra_sums(item) :]
                bound = None if clamp == math.inf else clamp
                reference.gradient_sums(
                    param.grad,
                    param.shard,
                    dims,
                    vector,
                    a.audits[i],
                    bound,
                    replace,
                    limit == LARGEST,
                )
            param.grad = param.grad.nan_to_num() if replace else param.grad

    def forget_gradient(self, batch: Batch, i: int) -> None:
        a = self.first_sum(batch)
        a.vectors[i].zero_()
        a.audits[i].zero_()
        batch.summed.discard(i)

    def _limits_of(self, batch: Batch) -> tuple[tuple[float, float], ...]:
        """`limits` of all items; worked out anew where a group began or ceased to be clipped."""
        clipped = tuple(group.get("max_grad_norm") is not None for group in batch.groups)
        kept = batch.cache.get("limits")
        if kept is None or kept[0] != clipped:
            limits = tuple(self.limits(item) for item in batch.items)
            kept = batch.cache["limits"] = clipped, limits
        found: tuple[tuple[float, float], ...] = kept[1]
        return found

    def limits(self, item: Item) -> tuple[float, float]:
        """The largest |g| that counts as finite (larger squares do not fit the state), and the
        clamp of g in the factors.
        """
        # a bounded norm bounds every element: clipping, which comes first, leaves nothing to clamp
        clipped = item.hyper.get("max_grad_norm") is not None
        clamp = None if clipped or "momentum" not in item.state else self.features.clamp
        return (LARGEST if clipped or clamp is not None else math.sqrt(LARGEST)), (
            math.inf if clamp is None else clamp
        )

    # --------------------------------------------------------------------------------------- pass B

    def step_tensors(
        self, batch: Batch, i: int, item: Item, sums: Tensor, roundings: Roundings
    ) -> StepTensors:
        param, state, moves = item.param, item.state, batch.moves[i]
        assert param.grad is not None
        factors: Factors | None = None
        if item.dims is not None:
            shape = param.shard.shape
            decay = self._decay("factor_decays", sums.dtype, sums.device)
            factors = reference.update_factors(
                state["row"], state["col"], sums, shape, item.dims, decay, batch.scale[i], moves
            )
        return StepTensors(
            features=self.features,
            shard=param.shard,
            dims=item.dims,
            value=param.value,
            grad=param.grad,
            momentum=state["momentum"],
            rms=state["rms"],
            diag=state.get("diag"),
            factors=factors,
            scale=batch.scale[i] if batch.clips else None,
            moves=moves,
            momentum_decay=self._decay("momentum_decays", item.dtype, batch.device),
            rms_decay=self.rms_decay,
            diag_decay=self._decay("factor_decays", item.dtype, batch.device),
            rounding=roundings.of(item.hyper) if is_halved(state["momentum"]) else None,
        )

    def _decay(self, name: str, dtype: torch.dtype, device: torch.device) -> Decay:
        key = (name, dtype, device)
        if key not in self._decays:
            self._decays[key] = Decay.of(getattr(self, name), dtype, device)
        return self._decays[key]


class ThreePassRule(FactoredRule):
    """The passes of a rule whose network gives the update itself."""

    def prepare(self, batch: Batch, tensor_sums: Tensor | None) -> None:
        """Between B and C, when the tensor sums and `batch.taken` are known: what does not depend
        on the elements.

        Args:
            tensor_sums: float64 (items, num_tensor_sums), if there are any.
        """

    @abstractmethod
    def rates(self, hyper: dict[str, Any]) -> Rates:
        """How the tensors of a parameter group move."""

    @abstractmethod
    def network_of(self, i: int, item: Item) -> Network:
        """The network of item i of the batch; asked after `prepare`."""

    def width_mult(self, item: Item) -> float:
        """What divides step size and weight decay of an item."""
        return 1.0

    def update(self, i: int, item: Item) -> Update:
        """How item i of the batch moves; asked after `prepare`."""
        rates, width = self.rates(item.hyper), self.width_mult(item)
        step_size, decay_after = rates.step_size / width, rates.decay_after / width
        return Update(
            self.network_of(i, item), step_size, rates.exp_mult, rates.decay_before, decay_after
        )

    def steps(self, batch: Batch) -> Tensor:
        """The numbers of `Update` as the compiled passes read them, float64 (items, 4)."""
        steps = batch.numbers("steps", lambda hyper: list(self.rates(hyper)))
        if type(self).width_mult is ThreePassRule.width_mult:
            return steps
        widths = tuple(self.width_mult(item) for item in batch.items)
        if any(width != 1.0 for width in widths):
            steps[:, 0::3] /= batch.on_device("widths", widths, torch.float64)[:, None]
        return steps

    def updates(self, batch: Batch) -> Updates:
        """`update` of all items, as the compiled passes read it."""
        _, group_of = batch.hypers()
        networks = [
            compiled.packed(self.network_of(i, batch.items[i])) for i in batch.first_of_hypers()
        ]
        return Updates(torch.stack(networks), group_of, self.steps(batch).to(torch.float32))

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        candidates = [i for i, _ in batch.candidates()]
        # A: sums of g^2 along rows and columns
        self.gradient_pass(batch, [i for i in candidates if i not in batch.summed])
        a = self.first_sum(batch)
        kernels = self.kernels(batch)
        yield a

        # B: with the factors known, the sum of squares of every feature, and sums of the tensors'
        # own
        b = self.second_sum(batch).zero_()
        own = self.num_tensor_sums
        features = [vector[own:] for vector in b.vectors] if own and kernels is None else b.vectors
        roundings = Roundings(batch.device)
        tensors: dict[int, StepTensors] = {}
        if kernels is not None and candidates:
            kernels.feature_pass(batch, candidates)
        else:
            for i in candidates:
                tensors[i] = self.step_tensors(batch, i, batch.items[i], a.vectors[i], roundings)
                reference.feature_sums(tensors[i], features[i], self._scratch)
        if own and kernels is not None:
            resting = sorted(set(range(len(batch.items))) - set(candidates))
            if resting:
                kernels.moment_pass(batch, resting)
        elif own:
            for i, item in enumerate(batch.items):
                reference.moment_sums(
                    item.param.value, item.state["momentum"], item.state["rms"], b.vectors[i][:own]
                )
        yield b
        with trace.phase("step: prepare"):
            self.prepare(batch, b.heads(own) if own and batch.items else None)

        # C: normalise, run the network, write
        if kernels is not None and candidates:
            updates = self.updates(batch)
            kernels.update_pass(batch, candidates, updates, self.precision, roundings=roundings)
            return
        for i in candidates:
            batch.param_squares[i] = features[i][self.features.p]
            how = self.update(i, batch.items[i])
            reference.apply_update(
                tensors[i],
                reference.normalisers(tensors[i], features[i]),
                how.network,
                how.step_size,
                how.exp_mult,
                batch.update_squares[i],
                self._scratch,
                how.decay_before,
                how.decay_after,
            )
