"""AdafacLO, the learned optimizer small_fc_lopt: its rule and its face. Writes value and state of
its batch.

Source: AdafacMLPLOpt in google/learned_optimization (learned_opts/adafac_mlp_lopt.py), Metz et al.
2022 (arXiv 2203.11860).

Three names for one thing. `small_fc`, short for the paper's small_fc_lopt, is the meta-network: it
names the architecture in files of weights and the rule in reports, and MuLO's weights are of it
too. "Adafac" is the rule, after its reference's file: Adafactor's row and column factors as
features. `AdafacLO` is what PyLO calls the two together, and so the face; "adafaclo" in commands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.rule import Batch, Item
from ..maths import reference
from ..maths.factored import Rates, ThreePassRule
from ..maths.reference import Network, wide
from ..optimizer import Registration, StateDtype, checks, register_optimizer
from ..optimizer.engine import Clip, Nonfinite
from ..weights import (
    CELO_HORIZON,
    CELO_LICENCE,
    CELO_TASKS,
    PYLO_LICENCE,
    Architecture,
    FlaxNames,
    MetaNetwork,
    Registered,
    WeightsLike,
    load_weights,
)
from .arguments import FactoredOptimizer, Precision, checked_decays, checked_numbers

# PyLO keeps the decay offsets of btherien/mulo in its constructors, not in the checkpoint, and
# applies them to any weights.
ARCHITECTURE = Architecture(
    "small_fc",
    {
        "network.input.weight": (32, 39),
        "network.input.bias": (32,),
        "network.linear_0.weight": (32, 32),
        "network.linear_0.bias": (32,),
        "network.output.weight": (2, 32),
        "network.output.bias": (2,),
    },
    {
        "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
        "rms_decays": (0.01079706,),
        "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
    },
    flax=FlaxNames(
        {
            f"network.{ours}.{kind}": (("nn", "~", f"{kind[0]}{i}"), kind == "weight")
            for i, ours in enumerate(("input", "linear_0", "output"))
            for kind in ("weight", "bias")
        },
        {name: (name,) for name in ("momentum_decays", "rms_decays", "adafactor_decays")},
        units=32,
    ),
)
WEIGHTS = {
    "btherien/mulo": Registered(
        ARCHITECTURE.name,
        "btherien/mulo",
        ARCHITECTURE.decays,
        "PyLO's small_fc_lopt weights, meta-trained with muP (arXiv 2406.00153); decays from "
        "PyLO's constructor",
        licence=PYLO_LICENCE,
    ),
    "amoudgl/adafac-mlp-lopt": Registered(
        ARCHITECTURE.name,
        "amoudgl/adafac-mlp-lopt",
        note="small_fc_lopt with 4 hidden units, a baseline of Celo's authors (arXiv 2501.12670); "
        "trained with step_mult=0.001, which is to be passed",
        horizon=CELO_HORIZON,
        licence=CELO_LICENCE,
        trained_on=CELO_TASKS,
    ),
}


class AdafacRule(ThreePassRule):
    """small_fc_lopt: 28 normalised features and 11 time features per element, an MLP 39-32-32-2,
    one update.

    Args:
        weights: the meta-network.
        momentum_decays, rms_decays, factor_decays: effective decays, see `FactoredRule`.
    """

    name = "small_fc"
    features = reference.SMALL_FC
    num_hidden = 32

    def __init__(
        self,
        weights: MetaNetwork,
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
    ) -> None:
        super().__init__(momentum_decays, rms_decays, factor_decays)
        self.weights = weights
        self._tensors: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        self._networks: dict[tuple[int, torch.dtype, torch.device], Network] = {}

    def prepare(self, batch: Batch, tensor_sums: Tensor | None) -> None:
        # the time features are the same for all elements of a group: their share of the first layer
        # is a bias (the batches of other devices are at work at the same time, and may hold other
        # items of the group)
        if "adafac: groups" not in batch.cache:
            batch.cache["adafac: groups"] = {
                (id(item.hyper), item.dtype): item.hyper for item in batch.items
            }
        for (key, dtype), hyper in batch.cache["adafac: groups"].items():
            self._networks[key, dtype, batch.device] = self._network(
                hyper["step"].to(batch.device), dtype
            )

    def rates(self, hyper: dict[str, Any]) -> Rates:
        lr = wide(hyper["lr"])
        return Rates(
            lr * hyper["step_mult"], hyper["exp_mult"], decay_after=lr * hyper["weight_decay"]
        )

    def network_of(self, i: int, item: Item) -> Network:
        """The network of this step for an item, made in `prepare`."""
        return self._networks[id(item.hyper), item.dtype, item.param.value.device]

    def _network(self, step: Tensor, dtype: torch.dtype) -> Network:
        """The network with the time features of iteration `step` folded into its first bias."""
        key = (dtype, step.device)
        if key not in self._tensors:
            w = {name: t.to(step.device, dtype) for name, t in self.weights.tensors.items()}
            features, w["time"] = w["network.input.weight"].split(
                [self.features.num, len(reference.TIME_SCALES)], dim=1
            )
            w["features"] = features.contiguous()
            w["time_scales"] = torch.tensor(reference.TIME_SCALES, device=step.device)
            self._tensors[key] = w
        w = self._tensors[key]
        bias = w["network.input.bias"] + w["time"] @ reference.time_features(
            step, w["time_scales"]
        ).to(dtype)
        return Network(
            w["features"],
            bias[:, None],
            w["network.linear_0.weight"],
            w["network.linear_0.bias"][:, None],
            w["network.output.weight"],
            w["network.output.bias"][:, None],
        )


def effective_decays(initial: Sequence[float], offsets: Sequence[float]) -> tuple[float, ...]:
    """beta = 1 - exp(10 (log(1 - initial) / 10 + offset)) = 1 - (1 - initial) exp(10 offset), as
    the reference has it.
    """
    return tuple(
        1.0 - (1.0 - beta) * math.exp(10.0 * offset)
        for beta, offset in zip(initial, offsets, strict=True)
    )


def checked_betas(
    name: str, initial: Sequence[float], offsets: Sequence[float]
) -> tuple[float, ...]:
    """The effective decays. Raises ValueError naming the offsets where one is beyond -1 or 1: a
    mean with such a decay grows without bound.
    """
    given = checked_numbers(name, offsets, len(initial))
    try:
        betas = effective_decays(initial, given)
    except OverflowError:
        betas = (math.inf,)
    if not all(-1.0 <= beta <= 1.0 for beta in betas):
        wanted = f"offsets that make decays between -1 and 1 of initial_{name}={tuple(initial)}"
        raise checks.refused(name, offsets, f"{wanted}, not {betas}")
    return betas


class AdafacLO(FactoredOptimizer):
    r"""The learned optimizer small_fc_lopt, exact on whole and on sharded parameters.

    With normalised features x of an element and the MLP's outputs (o_0, o_1):
    :math:`p \leftarrow p - lr \cdot step\_mult \cdot o_0 \exp(exp\_mult \cdot o_1)`, then
    :math:`p \leftarrow p - lr \cdot weight\_decay \cdot p`.

    State of a parameter: `momentum` `(3, *shape)`, `rms` `(*shape)`, and `row` (3, shape without
    d0), `col` (3, shape without d1), or `diag` `(3, *shape)` below two dims.

    Args:
        params: parameters, groups, or `named_parameters()`. A group may override lr, weight_decay,
            exp_mult, step_mult and max_grad_norm.
        lr: factor on every update; a float or a 0-d tensor.
        weights: "demo" (built in, hand-made), a registered name, `org/name[@revision]` on the Hub,
            a folder, a .safetensors file, or a mapping of tensors.
        momentum_decays, rms_decays, adafactor_decays: decay offsets, see `effective_decays`;
            default: those stored or registered with the weights.
        initial_momentum_decays, initial_rms_decays, initial_adafactor_decays: decays that the
            offsets start from.
        exp_mult, step_mult: scales of the magnitude's logarithm and of the update.
        weight_decay: decoupled, applied after the update to the updated parameter, as PyLO does.
        max_grad_norm: bound on the gradient norm, or None.
        clip: "global" bounds the norm over all parameters, at no extra communication; "per_tensor"
            that of each (PyLO's).
        nonfinite: inf or NaN in a gradient raises ("error"), leaves everything as it was ("skip"),
            or goes through ("allow").
        process_group: ranks that average the loss; this rule reads no loss.
        precision: "highest", "high" or "medium", arithmetic of the network in GPU kernels; on a CPU
            and in plain PyTorch all are float32.
        state_dtype: "bfloat16" keeps momenta and mean square in it, 8 bytes per parameter in place
            of 16, stochastically rounded so that slow means move and any cut writes the same bits;
            factors and all arithmetic are float32. None or "float32": all state is.
        state_seed: of that rounding, an int >= 0; part of the state.

    Raises:
        ValueError: a setting or a parameter that cannot be served, by name.
        WeightsError: the weights cannot be had or do not fit.

    Example::

        optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
        loss.backward()
        optimizer.step()
    """

    rule_class = AdafacRule

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor = 1.0,
        weights: WeightsLike = "btherien/mulo",
        momentum_decays: Sequence[float] | None = None,
        rms_decays: Sequence[float] | None = None,
        adafactor_decays: Sequence[float] | None = None,
        initial_momentum_decays: Sequence[float] = (0.9, 0.99, 0.999),
        initial_rms_decays: Sequence[float] = (0.999,),
        initial_adafactor_decays: Sequence[float] = (0.9, 0.99, 0.999),
        exp_mult: float = 0.001,
        step_mult: float = 0.01,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        clip: Clip = "global",
        nonfinite: Nonfinite = "error",
        process_group: Any = None,
        precision: Precision = "high",
        state_dtype: StateDtype = None,
        state_seed: int = 0,
    ) -> None:
        network = load_weights(weights, ARCHITECTURE)
        given = {
            "momentum_decays": momentum_decays,
            "rms_decays": rms_decays,
            "adafactor_decays": adafactor_decays,
        }
        initial = checked_decays(
            initial_momentum_decays, initial_rms_decays, initial_adafactor_decays
        )
        betas = [
            checked_betas(name, first, network.decays[name] if value is None else value)
            for first, (name, value) in zip(initial, given.items(), strict=True)
        ]
        rule = self.rule_class(network, *betas)
        defaults = {
            "lr": lr,
            "exp_mult": exp_mult,
            "step_mult": step_mult,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
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


register_optimizer(Registration("adafaclo", AdafacLO, ARCHITECTURE, WEIGHTS))
