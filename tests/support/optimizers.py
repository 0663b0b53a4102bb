"""The list of learned optimizers: what a test builds where each of them must hold. A new one is
added here, and goes through every contract in tests/contracts and all lists that derive from this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import pylo_dist
from support.golden import celo2_weights, celo_weights, load, small_fc_weights, velo_weights
from support.own_rule import Tide, tide_weights

SMALL_FC = small_fc_weights(load("small_fc_f32"))
CELO2 = celo2_weights(load("celo2_default_f64"))
VELO = velo_weights("small")
CELO = celo_weights(load("celo_small_f32"))
# its LSTM without what mixes an MLP
CELO_ADAM = {name: CELO[name] for name in pylo_dist.optim.celo.ADAM_ARCHITECTURE.shapes}

# Of the largest one-step change: the layout tolerance in float32 and in float64. Newton-Schulz
# drives small singular values towards 1, and with them the last bits of its input: some 1e2 times
# an ulp.
SHARES = (1e-5, 1e-12)
NEWTON_SCHULZ = (5e-5, 1e-12)


@dataclass(frozen=True)
class Roles:
    """What a model's parameters are to the optimizers that tell them apart by name.

    Attributes:
        widths: by name, how often a width that grows was multiplied.
        embedding: a regular expression for the names of embeddings.
    """

    widths: Mapping[str, float]
    embedding: str


@dataclass(frozen=True)
class OptimizerCase:
    """A learned optimizer as tests build it, and what it cannot do.

    Attributes:
        face: the class that users construct.
        arguments: of the face, its weights among them.
        named: arguments that tell parameters apart by name, and which entry of `Roles` they are.
        needs_loss: whether it reads the training loss.
        replaces_nonfinite: whether NaN that is let through counts as a number.
        groups: what a parameter group may override, beside `lr`.
        reductions, exchanges: how many a step needs where tensors are cut.
        shares: of the largest one-step change, the layout tolerance in float32 and float64.
        variants: settings that take another way through it, by name: the fields in which they
            differ, `arguments` added to those here.
        state_as: optimizers that together have the same kinds of state, and stand for it where
            every layout loads what every other saved.
        cannot: what does not hold for it, by the word that a contract asks for, and why not.
    """

    face: type[pylo_dist.LearnedOptimizer]
    arguments: Mapping[str, Any]
    named: Mapping[str, str] = field(default_factory=dict)
    needs_loss: bool = False
    replaces_nonfinite: bool = False
    groups: tuple[Mapping[str, Any], ...] = ()
    reductions: int = 2
    exchanges: int = 0
    shares: tuple[float, float] = SHARES
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    state_as: tuple[str, ...] = ()
    cannot: Mapping[str, str] = field(default_factory=dict)

    def variant(self, name: str) -> OptimizerCase:
        changed = dict(self.variants[name])
        changed["arguments"] = {**self.arguments, **changed.get("arguments", {})}
        return replace(self, variants={}, **changed)

    def on(self, roles: Roles) -> OptimizerCase:
        """The same for a model whose parameters have these roles: `arguments` are all there are."""
        named = {argument: getattr(roles, role) for argument, role in self.named.items()}
        return replace(self, arguments={**self.arguments, **named}, named={})

    def build(self, params: Any, **changes: Any) -> Any:
        assert not self.named, f"on(roles) says what {sorted(self.named)} are"
        return self.face(params, **{**self.arguments, **changes})

    def share(self, dtype: torch.dtype) -> float:
        return self.shares[dtype == torch.float64]

    @property
    def halved(self) -> bool:
        """Whether its means of every element are kept in bfloat16."""
        return "state_dtype" in self.arguments

    @property
    def built_in(self) -> bool:
        """Whether the package has it, and with it DeepSpeed's JSON and compiled passes."""
        return self.face.__module__.startswith("pylo_dist.")


_DECAYED = {"weight_decay": 0.1}
_HALVED = {
    "arguments": {"state_dtype": "bfloat16", "state_seed": 7},
    "cannot": {
        "float64": "its state is rounded to bfloat16, which float64 parameters have no use for",
        "kernels": "how far it is from float64 is its rounding, not its arithmetic",
    },
}
_LATE = {"late": "one LSTM serves the run, which a tensor that comes late joins"}
OPTIMIZERS: dict[str, OptimizerCase] = {
    "AdafacLO": OptimizerCase(
        pylo_dist.AdafacLO,
        {"weights": SMALL_FC, "weight_decay": 0.01},
        groups=(_DECAYED, {"max_grad_norm": 0.01}, {"step_mult": 0.02, "exp_mult": 0.1}),
        variants={
            "clipped": {"arguments": {"max_grad_norm": 1.0}},
            "per_tensor": {"arguments": {"max_grad_norm": 0.05, "clip": "per_tensor"}},
            "halved": _HALVED,
        },
    ),
    "MuLO": OptimizerCase(
        pylo_dist.MuLO,
        {"weights": SMALL_FC},
        named={"width_mults": "widths"},
        groups=(_DECAYED, {"max_grad_norm": 0.01}, {"step_mult": 0.02, "exp_mult": 0.1}),
        state_as=("AdafacLO",),
    ),
    "VeLO": OptimizerCase(
        pylo_dist.VeLO,
        {"weights": VELO, "num_steps": 200},
        needs_loss=True,
        groups=(_DECAYED, {"max_grad_norm": 0.01}),
        # a run that goes beyond its end, too
        variants={
            "clipped": {"arguments": {"num_steps": 15, "max_grad_norm": 1.0}},
            "halved": _HALVED,
        },
        cannot={
            "alone": "its LSTM mixes all tensors of an optimizer: none moves as it would alone",
            "rest": "its LSTM takes its step for tensors without a gradient too",
        },
    ),
    "Celo": OptimizerCase(
        pylo_dist.Celo,
        {"weights": CELO, "num_steps": 200},
        needs_loss=True,
        groups=(_DECAYED, {"max_grad_norm": 0.01}, {"step_mult": 0.02, "exp_mult": 0.1}),
        # a run that goes beyond its end, too
        variants={"clipped": {"arguments": {"num_steps": 15, "max_grad_norm": 1.0}}},
        cannot=_LATE,
    ),
    "CeloAdam": OptimizerCase(
        pylo_dist.CeloAdam,
        {"weights": CELO_ADAM, "num_steps": 200},
        needs_loss=True,
        groups=(_DECAYED, {"max_grad_norm": 0.01}, {"step_mult": 0.02}),
        reductions=1,
        state_as=("CELO2", "Celo"),
        variants={"halved": _HALVED},
        cannot={**_LATE, "kernels": "it has no features and no network per element"},
    ),
    "ELO": OptimizerCase(
        pylo_dist.ELO,
        {"weights": SMALL_FC, "lr": 0.01, "weight_decay": 0.1, "clip_grad": True},
        replaces_nonfinite=True,
        groups=({"weight_decay": 0.5}, {"max_grad_norm": 0.01}, {"exp_mult": 0.1}),
        state_as=("AdafacLO",),
    ),
    "CELO2": OptimizerCase(
        pylo_dist.CELO2,
        {"weights": CELO2},
        named={"embedding_pattern": "embedding"},
        groups=(_DECAYED, {"is_embedding": True}, {"rmsmult": 0.5}, {"adam_lr_mult": 3.0}),
        exchanges=2,
        shares=NEWTON_SCHULZ,
        variants={
            "base": {
                "arguments": {
                    "orthogonalize": False,
                    "exp_mult": 0.1,
                    "param_scale_mult": True,
                    "weight_decay": 0.05,
                },
                "reductions": 3,  # the rms of directions that no Newton-Schulz gives
                "exchanges": 0,
                "shares": SHARES,
            },
            "halved": _HALVED,
        },
    ),
    "ELO_CELO2": OptimizerCase(
        pylo_dist.ELO_CELO2,
        {"weights": CELO2},
        groups=({"weight_decay": 0.5}, {"max_grad_norm": 0.01}, {"rmsmult": 0.5}),
        exchanges=2,
        shares=NEWTON_SCHULZ,
        state_as=("CELO2",),
    ),
    "Tide": OptimizerCase(
        Tide,
        {"weights": tide_weights(), "weight_decay": 0.1},
        groups=({"weight_decay": 0.5}, {"max_grad_norm": 0.01}),
        variants={"clipped": {"arguments": {"max_grad_norm": 1.0}}},
        state_as=("CELO2",),
        cannot={"kernels": "it is written in plain PyTorch, one tensor after the other"},
    ),
}
# with every variant, e.g. "AdafacLO_clipped"
VARIANTS: dict[str, OptimizerCase] = {
    **OPTIMIZERS,
    **{
        f"{name}_{variant}": case.variant(variant)
        for name, case in OPTIMIZERS.items()
        for variant in case.variants
    },
}


def cases(
    roles: Roles,
    names: Iterable[str] = tuple(OPTIMIZERS),
    able: str = "",
    built_in: bool = False,
) -> dict[str, OptimizerCase]:
    """Those of these names, for a model of these roles.

    Args:
        able: leaves out those that cannot do this; built_in: those that are not the package's.
    """
    return {
        name: VARIANTS[name].on(roles)
        for name in names
        if able not in VARIANTS[name].cannot and (VARIANTS[name].built_in or not built_in)
    }


def small_fc() -> dict[str, Tensor]:
    """A copy of AdafacLO's weights, to be changed."""
    return {name: w.clone() for name, w in SMALL_FC.items()}
