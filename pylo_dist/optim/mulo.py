"""MuLO: small_fc_lopt with the learning rates of the maximal update parameterisation (muP). Its
rule and its face.

Source: Thérien et al. 2024 (arXiv 2406.00153) as PyLO applies it: matrix-like parameters, those
with two dimensions that grow with the width, take steps smaller by their width multiplier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.rule import Item
from ..optimizer import Registration, checks, register_optimizer
from ..optimizer.parameters import names_of
from .adafac import ARCHITECTURE, WEIGHTS, AdafacLO, AdafacRule


class MuLORule(AdafacRule):
    """AdafacRule with lr <- lr / width_mult per tensor; the weight decay, lr * weight_decay,
    shrinks along as in PyLO.
    """

    name = "mulo"

    def width_mult(self, item: Item) -> float:
        mult: float = item.hyper["width_mults"].get(item.param.shard.fqn, 1.0)
        return mult


class MuLO(AdafacLO):
    """`AdafacLO` with muP learning rates.

    Args:
        width_mults: per fqn the factor by which a matrix-like parameter is wider than in the base
            model (mup's `infshape.width_mult()` where `infshape.ninf() == 2`); parameters that are
            not named have 1. None: read from the `infshape` that `mup.set_base_shapes` leaves on
            parameters. Kept in the parameter groups (`group["width_mults"]`).
        Others: as `AdafacLO`.

    Raises:
        ValueError: no `infshape` and no width_mults, a name that is no parameter, a multiplier that
            is no number > 0, or more than two dimensions that grow.
    """

    rule_class = MuLORule
    group_keys = ("width_mults",)
    _width_mults: dict[str, float] | None = None
    _unclaimed: frozenset[str] = frozenset()

    def __init__(
        self, params: Any, *, width_mults: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if width_mults is not None:
            self._width_mults = checks.positive_by_name("width_mults", width_mults)
        self._unclaimed = frozenset(self._width_mults or ())
        super().__init__(params, **kwargs)
        if self._unclaimed:
            names = [binding.shard.fqn for binding, _ in self.layouts()]
            raise ValueError(
                f"width_mults names {sorted(self._unclaimed)}, which are no parameters here; "
                f"wanted some of {names[:8]} (pass model.named_parameters() so that parameters "
                "have their names)"
            )

    @classmethod
    def before_sharding(
        cls, named: Iterable[tuple[str, Tensor]], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if kwargs.get("width_mults") is not None:
            return kwargs
        return {**kwargs, "width_mults": {fqn: width_mult_of(fqn, param) for fqn, param in named}}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        names = names_of(self.param_groups, group)
        if "width_mults" not in group:
            known = self._width_mults
            group["width_mults"] = {
                name: width_mult_of(name, param) if known is None else known.get(name, 1.0)
                for name, param in zip(names, group["params"], strict=True)
            }
        group["width_mults"] = checks.positive_by_name("width_mults", group["width_mults"])
        self._unclaimed -= set(names)


def width_mult_of(fqn: str, param: Tensor) -> float:
    """The width multiplier that mup's `infshape` gives a parameter: 1 unless it is matrix-like."""
    infshape = getattr(param, "infshape", None)
    if infshape is None:
        raise ValueError(
            f"{fqn!r} has no infshape: mup.set_base_shapes(model, base_model) was not called, or "
            "sharding, copying or assigning the parameters lost what it left on them (fully_shard, "
            "parallelize_module, copy.deepcopy and load_state_dict(assign=True) do). Call it "
            "before; or take pylo_dist.width_mults(model) before and pass width_mults= "
            f"(pylo_dist.shard and ZeroOptimizer see to it){_inside_zero_init(param)}"
        )
    shape = tuple(getattr(param, "ds_shape", param.shape))  # of all ranks together
    described = getattr(infshape, "shape", None)
    if callable(described) and tuple(described()) != shape:
        raise ValueError(
            f"{fqn!r} has the shape {shape}, and its infshape was made for {tuple(described())}: "
            "mup.set_base_shapes saw another model, or a part of this one that sharding had left. "
            "Call it before sharding, or pass width_mults=, of pylo_dist.width_mults(model) of the "
            f"whole model{_inside_zero_init(param)}"
        )
    if infshape.ninf() > 2:
        raise ValueError(
            f"{fqn!r} has {infshape.ninf()} dimensions that grow with the width; muP knows at most "
            "2"
        )
    return float(infshape.width_mult()) if infshape.ninf() == 2 else 1.0


def _inside_zero_init(param: Tensor) -> str:
    """What to do where deepspeed.zero.Init has sharded a parameter as it was made."""
    if not hasattr(param, "ds_shape"):
        return ""
    return (
        "; under deepspeed.zero.Init call set_base_shapes inside "
        "deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)"
    )


def width_mults(model: nn.Module) -> dict[str, float]:
    """The width multipliers of all parameters of a model after `mup.set_base_shapes`, for
    `MuLO(..., width_mults=...)` where sharding or copying comes before the optimizer is built.

    Raises:
        ValueError: a parameter without `infshape`, by name.
    """
    return {fqn: width_mult_of(fqn, param) for fqn, param in model.named_parameters()}


register_optimizer(Registration("mulo", MuLO, ARCHITECTURE, WEIGHTS))
