"""What the rules with row and column factors share: their state and the three passes. Writes value and state of its batch.

A rule of this family says which features its network reads, and per tensor which network and step size apply.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import reference
from ..reference import Decay, Factors, FeatureSet, Network, Scratch, StepTensors
from ..shards import Shape, TensorShard, drop_dim, factored_dims
from ..state import StateField
from .base import Batch, Item, LearnedRule, Request


@dataclass(slots=True)
class Update:
    """How pass C moves one tensor, see `reference.apply_update`; the numbers may be 0-d tensors."""

    network: Network
    step_size: float | Tensor
    exp_mult: float
    decay_before: float | Tensor = 0.0
    decay_after: float | Tensor = 0.0


class FactoredRule(LearnedRule):
    """Three momenta, a mean square, and Adafactor's row and column means for three decays; an MLP per element.

    Args:
        momentum_decays, rms_decays, factor_decays: decays of the three momenta, of g^2, and of the three factors.
    """

    features: FeatureSet

    def __init__(self, momentum_decays: Sequence[float], rms_decays: Sequence[float], factor_decays: Sequence[float]) -> None:
        self.momentum_decays = tuple(momentum_decays)
        self.rms_decay = min(max(rms_decays[0], 0.0), 1.0)
        self.factor_decays = tuple(min(max(decay, 0.0), 1.0) for decay in factor_decays)
        self._scratch = Scratch()
        self._decays: dict[tuple[object, ...], Decay] = {}

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        return factored_dims(shape)

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        shape = shard.shape
        fields = {"momentum": StateField((3,)), "rms": StateField()}
        dims = self.dims(shape)
        if dims is None:
            return {**fields, "diag": StateField((3,))}
        d1, d0 = dims
        row, col = StateField((3,), replicated=drop_dim(shape, d0)), StateField((3,), replicated=drop_dim(shape, d1))
        return {**fields, "row": row, "col": col}

    def gather(self, batch: Batch, i: int, item: Item, sums: Tensor) -> StepTensors:
        param, state, keep = item.param, item.state, batch.keep[i]
        assert param.grad is not None
        factors: Factors | None = None
        if item.dims is not None:
            shape, decay = param.shard.shape, self._decay("factor_decays", sums)
            factors = reference.update_factors(state["row"], state["col"], sums, shape, item.dims, decay, batch.scale[i], keep)
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
            keep=keep,
            momentum_decay=self._decay("momentum_decays", state["momentum"]),
            rms_decay=self.rms_decay,
            diag_decay=self._decay("factor_decays", state["momentum"]),
        )

    def _decay(self, name: str, like: Tensor) -> Decay:
        key = (name, like.dtype, like.device)
        if key not in self._decays:
            self._decays[key] = Decay.of(getattr(self, name), like)
        return self._decays[key]


class ThreePassRule(FactoredRule):
    """The passes of a rule whose network gives the update itself."""

    num_tensor_sums = 0  # sums of a tensor's own that ride in pass A, see `tensor_sums`

    def tensor_sums(self, item: Item, sums: Tensor) -> None:
        """Add the local part of `num_tensor_sums` sums of the old state and parameter (`sums` float64, modified in place).

        Asked of every tensor, also of those without a gradient.
        """

    def prepare(self, batch: Batch, tensor_sums: list[Tensor]) -> None:
        """Between A and B, when the tensor sums and `batch.go` are known: what does not depend on the elements."""

    @abstractmethod
    def update(self, i: int, item: Item, tensor_sums: Tensor) -> Update:
        """How item i of the batch moves."""

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        # A: sums of g^2 along rows and columns
        extra = self.num_tensor_sums
        a = batch.new_sum("A", lambda x: extra + reference.num_gradient_sums(x.param.shard.shape, x.dims), audited=True)
        for i, item in enumerate(batch.items):
            if extra:
                self.tensor_sums(item, a.vectors[i][:extra])
        for i, item in batch.moving():
            param = item.param
            assert param.grad is not None
            replace = self.replaces_nonfinite and batch.allows_nonfinite
            # a bounded norm bounds every element: clipping, which comes first, leaves nothing to clamp
            clipped = item.hyper.get("max_grad_norm") is not None
            clamp = None if clipped else self.features.clamp
            bounded = clipped or clamp is not None
            reference.gradient_sums(
                param.grad, param.shard, item.dims, a.vectors[i][extra:], a.audits[i], clamp, replace, bounded
            )
            param.grad = param.grad.nan_to_num() if replace else param.grad
        yield a

        # B: with the factors known, the sum of squares of every feature
        self.prepare(batch, [vector[:extra] for vector in a.vectors])
        b = batch.new_sum("B", lambda x: self.features.num_sums(x.dims))
        tensors: dict[int, StepTensors] = {}
        for i, item in batch.moving():
            tensors[i] = self.gather(batch, i, item, a.vectors[i][extra:])
            reference.feature_sums(tensors[i], b.vectors[i], self._scratch)
        yield b

        # C: normalise, run the network, write
        for i, item in batch.moving():
            batch.param_squares[i] = b.vectors[i][self.features.p]
            how = self.update(i, item, a.vectors[i][:extra])
            reference.apply_update(
                tensors[i],
                reference.normalisers(tensors[i], b.vectors[i]),
                how.network,
                how.step_size,
                how.exp_mult,
                batch.update_squares[i],
                self._scratch,
                how.decay_before,
                how.decay_after,
            )
