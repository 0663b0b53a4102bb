"""ELO: small_fc_lopt with raw decays, decoupled weight decay before the step and global clipping.
Its rule and its face.

Source: PyLO's ELO and the JAX class it was converted from, without the schedule built into the
latter. The features and the network are those of `optim/adafac.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..maths.factored import Rates
from ..maths.reference import wide
from ..optimizer import Registration, StateDtype, register_optimizer
from ..optimizer.engine import Clip, Nonfinite
from ..weights import PYLO_LICENCE, Architecture, Registered, WeightsLike, load_weights
from . import adafac
from .adafac import AdafacRule
from .arguments import FactoredOptimizer, Precision, checked_decays, norm_bound

# the network of small_fc, with decays that are used as they are
ARCHITECTURE = Architecture("elo", adafac.ARCHITECTURE.shapes)
WEIGHTS = {
    "DiamondXL/elo": Registered(
        ARCHITECTURE.name, "DiamondXL/elo", note="PyLO's ELO weights", licence=PYLO_LICENCE
    )
}


class ELORule(AdafacRule):
    """p <- p - lr (o_0 exp(exp_mult o_1) + weight_decay p). `lr` takes the place of step_mult."""

    name = "elo"
    clip_eps = 0.0  # g <- g min(1, clip_norm / |g|), as optax has it
    replaces_nonfinite = True

    def rates(self, hyper: dict[str, Any]) -> Rates:
        lr = wide(hyper["lr"])
        return Rates(lr, hyper["exp_mult"], decay_before=lr * hyper["weight_decay"])


class ELO(FactoredOptimizer):
    r"""ELO, exact on whole and on sharded parameters.

    :math:`p \leftarrow p - lr \cdot (o_0 \exp(exp\_mult \cdot o_1) + weight\_decay \cdot p)`, with
    the MLP's outputs (o_0, o_1) for the features of `AdafacLO`; state as there.

    Args:
        lr: factor on every update.
        weight_decay: decoupled, of the parameter before the step.
        clip_grad, clip_norm: whether to bound the gradient norm over all parameters, and by what. A
            group may hold `max_grad_norm` instead.
        nonfinite: as `AdafacLO`; "allow" replaces NaN by 0 and inf by the largest number as the
            reference does, after clipping, so that with clipping a single NaN zeroes the gradient.
        Others: as `AdafacLO`; the decays are used as they are.

    Raises:
        ValueError: a setting or a parameter that cannot be served, by name.
        WeightsError: the weights cannot be had or do not fit.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor = 0.001,
        weights: WeightsLike = "DiamondXL/elo",
        initial_momentum_decays: Sequence[float] = (0.9, 0.99, 0.999),
        initial_rms_decays: Sequence[float] = (0.999,),
        initial_adafactor_decays: Sequence[float] = (0.9, 0.99, 0.999),
        exp_mult: float = 0.001,
        weight_decay: float = 0.0,
        clip_grad: bool = False,
        clip_norm: float = 1.0,
        clip: Clip = "global",
        nonfinite: Nonfinite = "error",
        process_group: Any = None,
        precision: Precision = "high",
        state_dtype: StateDtype = None,
        state_seed: int = 0,
    ) -> None:
        bound = norm_bound(clip_grad, clip_norm)
        network = load_weights(weights, ARCHITECTURE)
        rule = ELORule(
            network,
            *checked_decays(initial_momentum_decays, initial_rms_decays, initial_adafactor_decays),
        )
        defaults = {
            "lr": lr,
            "exp_mult": exp_mult,
            "weight_decay": weight_decay,
            "max_grad_norm": bound,
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


register_optimizer(Registration("elo", ELO, ARCHITECTURE, WEIGHTS))
