"""Celo and Celo-Adam: an LSTM that reads the loss sets the size of a learned step, or of Adam's.
Their rules and faces. Writes value and state of its batch.

Source: amoudgl/celo on google/learned_optimization. One LSTM row serves the whole run: what it
reads, the loss and the progress of the run, is the same for all tensors, which so do not know of
each other. Celo's elements have VeLO's features and a mixture of VeLO's small MLPs, Celo-Adam's the
step of Adam.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.requests import Request
from ..core.rule import Batch, Item
from ..core.shards import Shape, TensorShard
from ..core.state import StateField
from ..maths import adamw, lstm, mixed, reference, stacks
from ..maths.adamw import AdamW, Rates
from ..maths.factored import LARGEST, FactoredRule
from ..maths.lstm import LSTM, RunLSTM
from ..maths.mixed import MixedRule
from ..maths.reference import wide
from ..maths.rounding import Roundings
from ..optimizer import Registration, StateDtype, checks, register_optimizer
from ..optimizer.checks import LARGEST_FLOAT32, SMALLEST_FLOAT32
from ..optimizer.engine import Clip, Nonfinite
from ..weights import (
    CELO_HORIZON,
    CELO_LICENCE,
    CELO_TASKS,
    Architecture,
    FlaxNames,
    MetaNetwork,
    Registered,
    WeightsLike,
    load_weights,
)
from .arguments import FactoredOptimizer, Precision, checked_decays, decays
from .planned import SingleRunOptimizer

INPUTS = 18  # nine fractions of the run, nine features of the loss
HEADS = ("rnn_to_controls", "step_size")
ARCHITECTURE = Architecture(
    "celo",
    {**lstm.shapes(INPUTS, {"rnn_to_controls": "P", "step_size": 1}), **mixed.SHAPES},
    flax=FlaxNames({**lstm.published(HEADS), **mixed.PUBLISHED}),
)
ADAM_ARCHITECTURE = Architecture(
    "celo_adam",
    lstm.shapes(INPUTS, {"step_size": 1}),
    flax=FlaxNames(lstm.published(HEADS[1:])),
)
WEIGHTS = {
    "amoudgl/celo": Registered(
        ARCHITECTURE.name,
        "amoudgl/celo",
        note="Celo as its authors released it (arXiv 2501.12670)",
        horizon=CELO_HORIZON,
        licence=CELO_LICENCE,
        trained_on=CELO_TASKS,
    )
}
ADAM_WEIGHTS = {
    "amoudgl/celo-adam": Registered(
        ADAM_ARCHITECTURE.name,
        "amoudgl/celo-adam",
        note="Celo-Adam as Celo's authors released it",
        horizon=CELO_HORIZON,
        licence=CELO_LICENCE,
        trained_on=CELO_TASKS,
    )
}

STEP_SCALE = 0.1  # l = 0.1 exp(what the LSTM says)
EPS_ROOT = 1e-10  # added to Adam's second moment


def step_size(said: Tensor) -> Tensor:
    """l > 0 from the last number that the LSTM says, 0-d."""
    return STEP_SCALE * said[-1].exp()


class CeloRule(MixedRule):
    """30 normalised features per element, an MLP 30-4-4-3 and a step size, both alike for all
    tensors, that an LSTM sets from the loss.

    Args:
        weights: LSTM and MLP sets.
        momentum_decays, rms_decays, factor_decays, tie_break: see `MixedRule`.
    """

    name = "celo"

    def __init__(
        self,
        weights: MetaNetwork,
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
        tie_break: str,
    ) -> None:
        super().__init__(weights.tensors, momentum_decays, rms_decays, factor_decays, tie_break)
        self.run = RunLSTM(LSTM(weights.tensors, HEADS))

    def group_state(self) -> dict[str, Tensor]:
        return self.run.group_state()

    def prepare(self, batch: Batch, tensor_sums: Tensor | None) -> None:
        said, tensors = self.run.advance(batch), len(batch.items)
        shares = torch.softmax(said[:-1], 0).expand(tensors, -1)
        # p^2 is a feature, and so in the sums of pass B
        squares = self.second_sum(batch).heads(self.features.p + 1)[:, -1]
        self.mix(batch, shares, 1.0, step_size(said).expand(tensors), squares)


class Celo(SingleRunOptimizer, FactoredOptimizer):
    r"""Celo, exact on whole and on sharded parameters. It reads the training loss.

    With the MLP's outputs (o_0, o_1) for an element and the LSTM's step size l, the same for all
    tensors: :math:`p \leftarrow p - lr \cdot step\_mult \cdot l \cdot o_0 \exp(exp\_mult \cdot o_1)
    \sqrt{\langle p^2 \rangle + 10^{-9}}`, then :math:`p \leftarrow p - lr \cdot weight\_decay \cdot
    p`. So a tensor that starts at zero hardly moves, and nothing behind it learns.

    State of a parameter: that of `AdafacLO`. Of the run, in every parameter group: `num_steps`,
    `loss_means` and `loss_minima` (10,), and the LSTM's row, `lstm_hidden` and `lstm_cell` (H,);
    all of it float64.

    Args:
        num_steps: length of the run in steps, the same in all groups; the rule knows how far along
            it is. See `extend`.
        lr: factor on every update. The reference has none, which is 1.
        weight_decay: decoupled, of the updated parameter. The reference has none.
        tie_break: as `VeLO`.
        Others: as `AdafacLO`. `max_grad_norm` may be at most 1000, where the rule clamps elements
            of the gradient anyway.

    Raises:
        ValueError: a setting or a parameter that cannot be served, by name; a step without a loss.
        WeightsError: the weights cannot be had or do not fit; VeLO's do not.

    Example::

        optimizer = pylo_dist.Celo(model.named_parameters(), num_steps=2_000)
        loss.backward()
        optimizer.step(loss)
    """

    after_the_end = "beyond it, as it was not meta-trained to"

    def __init__(
        self,
        params: Any,
        *,
        num_steps: int,
        lr: float | Tensor = 1.0,
        weights: WeightsLike = "amoudgl/celo",
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
        rule = CeloRule(
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
        self.warn_of_length(num_steps, network.horizon)


class CeloAdamRule(FactoredRule):
    """p <- p - lr step_mult l m^ / (sqrt(v^ + 1e-10) + eps), with Adam's moments, which an LSTM
    gives a step size from the loss. Tensors need no sums.

    Args:
        weights: the LSTM.
        adamw: Adam's constants.
    """

    name = "celo_adam"
    needs_loss = True
    features = reference.VELO  # of which it has none: no tensor has momenta or factors
    num_hidden = 4

    def __init__(self, weights: MetaNetwork, adamw: AdamW) -> None:
        mean, square = adamw.betas
        super().__init__((mean,) * 3, (square,), (square,) * 3)
        self.adamw = adamw
        self.run = RunLSTM(LSTM(weights.tensors, HEADS[1:]))

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        return None

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        return self.adamw.state_fields()

    def group_state(self) -> dict[str, Tensor]:
        return self.run.group_state()

    def extra_sums(self, item: Item) -> int:
        return 1  # p^2, for `stats()`

    def limits(self, item: Item) -> tuple[float, float]:
        return LARGEST, float("inf")  # clamped before it is squared, and in no factor

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        a, candidates = self.first_sum(batch), list(batch.candidates())
        self.gradient_pass(batch, [i for i, _ in candidates if i not in batch.summed])

        def entry(i: int, item: Item) -> tuple[int, object, int]:
            value, grad = item.param.value, item.param.grad
            assert grad is not None
            kind = (id(item.hyper), value.numel(), value.dtype, grad.dtype)
            return i, kind, value.numel()

        equal = stacks.of_batch(batch, [entry(i, item) for i, item in candidates])
        adamw.param_squares(batch, equal, a)
        yield a

        adamw.keep_param_squares(batch, equal, a)
        size = step_size(self.run.advance(batch))
        batch.figures["lr_mult"] = size.expand(len(batch.items))
        self.adamw.step(batch, equal, self._rates, Roundings(batch.device), size)

    @staticmethod
    def _rates(hyper: dict[str, Any]) -> Rates:
        lr = wide(hyper["lr"])
        return Rates(lr * hyper["step_mult"], decay_after=lr * hyper["weight_decay"])


class CeloAdam(SingleRunOptimizer):
    r"""Celo-Adam: Adam with the step size of Celo's LSTM, exact on whole and on sharded parameters.
    It reads the training loss, which is all that crosses tensors.

    :math:`p \leftarrow p - lr \cdot step\_mult \cdot l \cdot \hat m / (\sqrt{\hat v + 10^{-10}} +
    eps)`, then :math:`p \leftarrow p - lr \cdot weight\_decay \cdot p`.

    State of a parameter: `exp_avg`, `exp_avg_sq` `(*shape)` and `adam_step` (), the steps this
    tensor has taken. Of the run: as `Celo`.

    Args:
        betas, eps: Adam's.
        Others: as `Celo`.

    Raises:
        ValueError: a setting or a parameter that cannot be served, by name; a step without a loss.
        WeightsError: the weights cannot be had or do not fit.
    """

    after_the_end = Celo.after_the_end

    def __init__(
        self,
        params: Any,
        *,
        num_steps: int,
        lr: float | Tensor = 1.0,
        weights: WeightsLike = "amoudgl/celo-adam",
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        step_mult: float = 0.001,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        clip: Clip = "global",
        nonfinite: Nonfinite = "error",
        process_group: Any = None,
        state_dtype: StateDtype = None,
        state_seed: int = 0,
    ) -> None:
        beta_1, beta_2 = decays("betas", betas, 2)
        least = checks.number("eps", eps, "a finite number > 0", SMALLEST_FLOAT32, LARGEST_FLOAT32)
        network = load_weights(weights, ADAM_ARCHITECTURE)
        clamp = reference.VELO.clamp
        rule = CeloAdamRule(network, AdamW((beta_1, beta_2), least, EPS_ROOT, clamp))
        defaults = {
            "lr": lr,
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
            clip=clip,
            nonfinite=nonfinite,
            process_group=process_group,
            state_dtype=state_dtype,
            state_seed=state_seed,
        )
        self.warn_of_length(num_steps, network.horizon)


register_optimizer(Registration("celo", Celo, ARCHITECTURE, WEIGHTS))
register_optimizer(Registration("celo-adam", CeloAdam, ADAM_ARCHITECTURE, ADAM_WEIGHTS))
