"""Rules whose network is a mixture of P small ones. Writes what a batch remembers.

VeLO and Celo have 30 features and an MLP 30-4-4-3 for an element, of which there are P sets of
weights; an LSTM says with which shares they are added up, and the size of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.rule import Batch, Item
from ..core.shards import Shape, factored_dims
from . import lstm, reference
from .compiled import Updates
from .factored import Rates, ThreePassRule, Update
from .lstm import TensorRows
from .reference import Network, wide

# the tensors of the P sets, as an `Architecture` has them; the third output is unused
SHAPES: dict[str, tuple[int | str, ...]] = {
    "input_weights_": ("P", 4, 30),
    "input_bias_": ("P", 4),
    "hidden_weights_.0": ("P", 4, 4),
    "hidden_bias_.0": ("P", 4),
    "output_weights_": ("P", 3, 4),
    "output_bias_": ("P", 3),
}
_STACK = ("ff_mod_stack", "~")
# where they stand in the reference's files, see `FlaxNames`: the first matrix in parts, one for
# every group of features
PUBLISHED: dict[str, tuple[tuple[str, ...], bool]] = {
    "input_weights_": ((*_STACK, "w0__*"), True),
    "input_bias_": ((*_STACK, "b0"), False),
    "hidden_weights_.0": ((*_STACK, "w1"), True),
    "hidden_bias_.0": ((*_STACK, "b1"), False),
    "output_weights_": ((*_STACK, "w2"), True),
    "output_bias_": ((*_STACK, "b2"), False),
}
NETWORK = {  # of an element, in the order of `reference.Network`
    "input_weights_": (4, 30),
    "input_bias_": (4, 1),
    "hidden_weights_.0": (4, 4),
    "hidden_bias_.0": (4, 1),
    "output_weights_": (2, 4),
    "output_bias_": (2, 1),
}
EPS_SCALE = 1e-9  # added to the mean square of a parameter, whose root the step is multiplied by


class MixedRule(ThreePassRule):
    """p <- p - lr step_mult l o_0 exp(exp_mult o_1) sqrt(<p^2> + 1e-9), then p <- p - lr
    weight_decay p.

    What derives from it says in `prepare`, by `mix`, the shares of the P sets and l.

    Args:
        tensors: the P sets, by the names of SHAPES.
        momentum_decays, rms_decays, factor_decays: see `FactoredRule`.
        tie_break: see `shards.factored_dims`.
    """

    needs_loss = True
    features = reference.VELO
    num_hidden = 4

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
        tie_break: str,
    ) -> None:
        super().__init__(momentum_decays, rms_decays, factor_decays)
        self.tie_break = tie_break
        self._tensors = tensors
        self._sets: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._mixed = torch.empty(0)  # (tensors, numbers of an MLP), as `compiled.packed` has it
        self._own = torch.empty(0, dtype=torch.int64)  # of every item, which of them
        self._step_sizes = torch.empty(0)

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        return factored_dims(shape, self.tie_break)

    def group_state(self) -> dict[str, Tensor]:
        return lstm.loss_state()

    def mix(
        self,
        batch: Batch,
        shares: Tensor,
        factor: float,
        lr_mult: Tensor,
        squares: Tensor,
        rows: TensorRows | None = None,
    ) -> None:
        """Make the networks of this step, `factor` times the mean of the P sets weighted by their
        shares, and how far each tensor goes.

        Args:
            shares: of the sets in the network of every tensor, (items, P).
            lr_mult: l, (items,).
            squares: the sum of p^2 of every tensor, float64 (items,).
            rows: of which shares and lr_mult are those that it computes; None: of all items. This
                rank has no element of any but its `kept` ones.
        """
        items = len(batch.items)
        self._mixed = self.networks(shares, factor)
        own = tuple(range(items)) if rows is None else rows.places
        self._own = batch.on_device("network_of", own, torch.int64)
        if rows is not None and not rows.all:
            kept = batch.on_device("kept", rows.kept, torch.int64)
            at = batch.on_device("rows", rows.at, torch.int64)
            own_mult = lr_mult.index_select(0, at)
            lr_mult = lr_mult.new_full((items,), math.nan).index_copy(0, kept, own_mult)
            if not rows.kept:  # the kernels want a network
                self._mixed = self._mixed.new_zeros(1, self._mixed.shape[1])
        batch.figures["lr_mult"] = lr_mult
        rates = batch.numbers("rates", lambda group: [wide(group["lr"]) * group["step_mult"]])[:, 0]
        scale = (squares / self.numels(batch) + EPS_SCALE).sqrt()
        self._step_sizes = rates * lr_mult.to(torch.float64) * scale

    def networks(self, shares: Tensor, factor: float) -> Tensor:
        """`factor` times the mean of the P sets weighted by `shares` (rows, P): (rows, numbers of
        an MLP).
        """
        sets = self._all_sets(shares.dtype, shares.device)
        return shares @ sets * (factor / len(sets))

    @staticmethod
    def numels(batch: Batch) -> Tensor:
        """Numbers of elements of the whole tensors, float64 (items,)."""
        if "numels" not in batch.cache:
            numels = [float(math.prod(item.param.shard.shape)) for item in batch.items]
            batch.cache["numels"] = torch.tensor(numels, dtype=torch.float64).to(batch.device)
        numels_of: Tensor = batch.cache["numels"]
        return numels_of

    def _all_sets(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """All P sets, each as `compiled.packed` has it: (P, numbers of an MLP)."""
        if (dtype, device) not in self._sets:
            parts = [
                self._tensors[name].to(device, dtype)[:, : shape[0]].flatten(1)
                for name, shape in NETWORK.items()
            ]
            self._sets[dtype, device] = torch.cat(parts, dim=1)
        return self._sets[dtype, device]

    def rates(self, hyper: dict[str, Any]) -> Rates:
        return Rates(0.0, hyper["exp_mult"], decay_after=wide(hyper["lr"]) * hyper["weight_decay"])

    def network_of(self, i: int, item: Item) -> Network:
        parts = (
            self._mixed.index_select(0, self._own[i : i + 1])[0]
            .to(item.dtype)
            .split([math.prod(shape) for shape in NETWORK.values()])
        )
        return Network(
            *(part.view(shape) for part, shape in zip(parts, NETWORK.values(), strict=True))
        )

    def update(self, i: int, item: Item) -> Update:
        update = super().update(i, item)
        update.step_size = self._step_sizes[i].to(item.dtype)
        return update

    def updates(self, batch: Batch) -> Updates:
        steps = self.steps(batch)
        steps[:, 0].copy_(self._step_sizes)
        return Updates(self._mixed.to(torch.float32), self._own, steps.to(torch.float32))
