"""VeLO, the versatile learned optimizer: its rule and its face. Writes value and state of its
batch.

Source: HyperV2 in google/learned_optimization (research/general_lopt/hyper_v2.py), Metz et al. 2022
(arXiv 2211.09760). An LSTM reads statistics of all tensors and the training loss and mixes, per
tensor, a small MLP for the elements and a step size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.rule import Batch
from ..core.shards import Shape, TensorShard
from ..core.state import StateField
from ..maths import lstm, mixed, reference
from ..maths.lstm import LSTM, TensorRows
from ..maths.mixed import MixedRule
from ..optimizer import Registration, StateDtype, checks, register_optimizer
from ..optimizer.engine import Clip, Nonfinite
from ..weights import (
    CELO_HORIZON,
    CELO_LICENCE,
    CELO_TASKS,
    PYLO_LICENCE,
    UNKNOWN,
    Architecture,
    FlaxNames,
    MetaNetwork,
    Registered,
    WeightsLike,
    load_weights,
)
from .arguments import FactoredOptimizer, Precision, checked_decays
from .planned import PlannedOptimizer

FACTOR = 100.0  # of the mean of the P sets, where the weights say no other
HEADS = ("rnn_to_controls", "step_size")
VELO_S = {"factor": 1.0}
ARCHITECTURE = Architecture(
    "velo",
    {**lstm.shapes(30, {"rnn_to_controls": "P", "step_size": 1}), **mixed.SHAPES},
    # PyLO's files also hold the last set it worked with
    ignored=(
        "input_weights",
        "input_bias",
        "hidden_weights.0",
        "hidden_bias.0",
        "output_weights",
        "output_bias",
    ),
    config={"mix_layers": True},
    constants={"factor": FACTOR},
    variants={"velo_s": VELO_S},
    flax=FlaxNames({**lstm.published(HEADS), **mixed.PUBLISHED}),
)
LONGEST_RUN = 150_000  # steps of the longest run in VeLO's meta-training
VELO_TASKS = "a mixture of tasks of many kinds, 4000 TPU-months (arXiv 2211.09760)"
WEIGHTS = {
    "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP": Registered(
        ARCHITECTURE.name,
        "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP",
        note="Google's VeLO as PyLO has it (arXiv 2211.09760)",
        horizon=LONGEST_RUN,
        licence=PYLO_LICENCE,
        trained_on=VELO_TASKS,
    ),
    "amoudgl/velo-4000": Registered(
        ARCHITECTURE.name,
        "amoudgl/velo-4000",
        note="Google's VeLO as Celo's authors have it (arXiv 2211.09760)",
        horizon=LONGEST_RUN,
        licence=f"{UNKNOWN} (Google's numbers; google/learned_optimization is apache-2.0, the "
        "repository amoudgl/celo mit)",
        trained_on=VELO_TASKS,
        constants=ARCHITECTURE.constants,
    ),
    "amoudgl/velo-s": Registered(
        ARCHITECTURE.name,
        "amoudgl/velo-s",
        note="a small VeLO, a baseline of Celo's authors (arXiv 2501.12670)",
        horizon=CELO_HORIZON,
        licence=CELO_LICENCE,
        trained_on=CELO_TASKS,
        constants=VELO_S,
    ),
}

# slots of the sums of a tensor's own: p^2, m_k, m_k^2, v, v^2
P_SQUARES, M, M_SQUARES, V, V_SQUARES = 0, slice(1, 4), slice(4, 7), 7, 8

LARGEST_MODEL = 600_000_000  # parameters beyond which VeLO fails (arXiv 2602.19142)


def log_abs(x: Tensor) -> Tensor:
    """0.5 clip(log(1e-8 + |10 x|), -5, 5)."""
    return 0.5 * (1e-8 + (10.0 * x).abs()).log().clamp(-5.0, 5.0)


class VeLORule(MixedRule):
    """30 normalised features per element, an MLP 30-4-4-3 that an LSTM mixes for every tensor out
    of P sets of weights.

    Args:
        weights: LSTM and MLP sets.
        momentum_decays, rms_decays, factor_decays, tie_break: see `MixedRule`.
    """

    name = "velo"
    num_tensor_sums = reference.NUM_MOMENTS

    def __init__(
        self,
        weights: MetaNetwork,
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
        tie_break: str,
    ) -> None:
        super().__init__(weights.tensors, momentum_decays, rms_decays, factor_decays, tie_break)
        self.weights = weights
        self.lstm = LSTM(weights.tensors, HEADS)
        self.factor = weights.constants.get("factor", FACTOR)
        self._fields: dict[Shape, dict[str, StateField]] = {}  # of `state_fields`

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"factor": FACTOR, "_fields": {}, **state})
        if "lstm" not in state:  # a pickle of an earlier version
            decays = (self.momentum_decays, (self.rms_decay,), self.factor_decays)
            VeLORule.__init__(self, self.weights, *decays, self.tie_break)

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        if shard.shape not in self._fields:
            names = ("lstm_hidden", "lstm_cell")
            rows = {
                name: StateField(
                    replicated=tuple(initial.shape), initial=initial, beside_elements=True
                )
                for name, initial in zip(names, self.lstm.initial, strict=True)
            }
            self._fields[shard.shape] = {**super().state_fields(shard, hyper), **rows}
        return self._fields[shard.shape]

    def prepare(self, batch: Batch, tensor_sums: Tensor | None) -> None:
        assert tensor_sums is not None
        rows: TensorRows | None = batch.cache.get("lstm")
        if rows is None or not rows.stands():
            rows = batch.cache["lstm"] = TensorRows(
                self.lstm, batch, lambda said: self.networks(said[:, :-1], self.factor)
            )
        inputs = self._inputs(batch, tensor_sums, lstm.read_loss(batch).to(rows.dtype))
        said = rows.advance(batch, self.lstm.mixed(inputs))
        controls, lr_mult = said.tensor_split([-1], dim=1)
        squares = tensor_sums[:, P_SQUARES]
        self.mix(batch, controls, self.factor, lr_mult[:, 0], squares, rows)

    def _inputs(self, batch: Batch, sums: Tensor, loss_features: Tensor) -> Tensor:
        """What the LSTM reads of every tensor, (tensors, 30), from state and parameter before the
        step.
        """
        mean, one_hot = sums / self.numels(batch)[:, None], self._one_hot(batch)
        # moments of m z and v z with z = 1 / rms(p); E[x^2] - E[x]^2 loses nothing that matters in
        # float64
        z = mean[:, P_SQUARES, None].clamp_min(1e-9).rsqrt()
        m, m_squares = z * mean[:, M], z * z * mean[:, M_SQUARES]
        v, v_squares = z * mean[:, V, None], z * z * mean[:, V_SQUARES, None]
        var_m = (m_squares - m * m).clamp_min(0.0)
        # about the mean of m_k: so does the reference
        var_v = (v_squares - 2.0 * v * m + m * m).clamp_min(0.0)
        groups, group_of = batch.hypers()
        fractions_at = lstm.fractions_at(batch)
        fractions = torch.stack(
            [self._fraction(group, fractions_at) for group in groups]
        ).index_select(0, group_of)
        moments = [log_abs(x).to(loss_features.dtype) for x in (v, var_m, var_v)]
        loss = loss_features.expand(len(batch.items), -1)
        one_hot = one_hot.to(loss_features.dtype)
        return torch.cat(
            [fractions.to(loss_features.dtype), loss, moments[0], one_hot, moments[1], moments[2]],
            dim=1,
        )

    @staticmethod
    def _fraction(hyper: dict[str, Any], at: Tensor) -> Tensor:
        """See `lstm.fractions`; beyond the end of the run as at its end."""
        return lstm.fractions(lstm.progress(hyper).clamp(max=1.0), at)

    @staticmethod
    def _one_hot(batch: Batch) -> Tensor:
        """Numbers of dims above 1, float32 (tensors, 5); on the device, once."""
        if "one-hot" not in batch.cache:
            dims = [sum(size > 1 for size in item.param.shard.shape) for item in batch.items]
            rows = torch.tensor([[float(number == k) for k in range(5)] for number in dims])
            batch.cache["one-hot"] = rows.to(batch.device)
        one_hot: Tensor = batch.cache["one-hot"]
        return one_hot


class VeLO(PlannedOptimizer, FactoredOptimizer):
    r"""The versatile learned optimizer, exact on whole and on sharded parameters. It reads the
    training loss.

    With the MLP's outputs (o_0, o_1) for an element and the LSTM's step size l for its tensor:
    :math:`p \leftarrow p - lr \cdot step\_mult \cdot l \cdot o_0 \exp(exp\_mult \cdot o_1)
    \sqrt{\langle p^2 \rangle + 10^{-9}}`, then :math:`p \leftarrow p - lr \cdot weight\_decay \cdot
    p`. So a tensor that starts at zero hardly moves, and nothing behind it learns.

    State of a parameter: that of `AdafacLO`, and its LSTM row, `lstm_hidden` and `lstm_cell` (H,),
    which ranks without elements of it neither compute nor keep (FSDP2: all do); `stats()` has its
    `lr_mult`, l, NaN there. Of the run, in every parameter group: `num_steps`, `loss_means` and
    `loss_minima` (10,).

    Args:
        num_steps: length of the run in steps; the rule knows how far along it is. See `extend`.
        lr: factor on every update. The reference has none, which is 1.
        tie_break: which dimension counts as the larger where two are equal: "torch", PyLO's, or
            "as_given", the reference's on the axes as they are.
        Others: as `AdafacLO`. `max_grad_norm` may be at most 1000, where the rule clamps elements
            of the gradient anyway.

    Raises:
        ValueError: a setting or a parameter that cannot be served, by name; a step without a loss.

    Example::

        optimizer = pylo_dist.VeLO(model.named_parameters(), num_steps=20_000)
        loss.backward()
        optimizer.step(loss)
    """

    after_the_end = "as at the end of a run"

    def __init__(
        self,
        params: Any,
        *,
        num_steps: int,
        lr: float | Tensor = 1.0,
        weights: WeightsLike = "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP",
        initial_momentum_decays: Sequence[float] = (0.9, 0.99, 0.999),
        initial_rms_decays: Sequence[float] = (0.999,),
        initial_adafactor_decays: Sequence[float] = (0.9, 0.99, 0.999),
        exp_mult: float = 0.001,
        step_mult: float = 0.001,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        clip: Clip = "global",
        nonfinite: Nonfinite = "error",
        process_group: Any = None,
        precision: Precision = "high",
        state_dtype: StateDtype = None,
        state_seed: int = 0,
        tie_break: Literal["torch", "as_given"] = "torch",
    ) -> None:
        checks.choose("tie_break", tie_break, ("torch", "as_given"))
        network = load_weights(weights, ARCHITECTURE)
        rule = VeLORule(
            network,
            *checked_decays(initial_momentum_decays, initial_rms_decays, initial_adafactor_decays),
            tie_break,
        )
        defaults = {
            "lr": lr,
            "exp_mult": exp_mult,
            "step_mult": step_mult,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
            "num_steps": num_steps,
        }
        super().__init__(
            params,
            rule,
            network,
            defaults,
            clip,
            nonfinite,
            process_group,
            precision,
            state_dtype,
            state_seed,
        )
        numel = sum(binding.shard.global_numel for binding, _ in self.layouts())
        if numel > LARGEST_MODEL:
            warnings.warn(
                f"VeLO on {numel:,} parameters: it is known to fail beyond some {LARGEST_MODEL:,}",
                stacklevel=2,
            )
        self.warn_of_length(num_steps, network.horizon or LONGEST_RUN)


register_optimizer(Registration("velo", VeLO, ARCHITECTURE, WEIGHTS))
