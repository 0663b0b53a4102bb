"""AdafacLO, the learned optimizer small_fc_lopt: its rule and its face. Writes value and state of its batch.

Source: AdafacMLPLOpt in google/learned_optimization (learned_opts/adafac_mlp_lopt.py), Metz et al. 2022 (arXiv 2203.11860); PyLO
calls it AdafacLO.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from ..engine import Clip, Nonfinite
from ..optimizer import LearnedOptimizer
from ..reference import Decay, Factors, Scratch, SmallFC, SmallFCNetwork
from ..shards import Shape, drop_dim, factored_dims
from ..state import StateField
from ..weights import SMALL_FC, MetaNetwork, WeightsLike, load_weights
from .base import SQUARES, Batch, Item, LearnedRule, Sum

Precision = Literal["highest", "high", "medium"]


class AdafacRule(LearnedRule):
    """small_fc_lopt: 28 normalised features and 11 time features per element, an MLP 39-32-32-2, one update.

    Args:
        weights: the meta-network.
        momentum_decays, rms_decays, factor_decays: effective decays of the three momenta, of g^2, and of the three factors.
    """

    name = "small_fc"

    def __init__(
        self,
        weights: MetaNetwork,
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
    ) -> None:
        self.weights = weights
        self.momentum_decays = tuple(momentum_decays)
        self.rms_decay = min(max(rms_decays[0], 0.0), 1.0)
        self.factor_decays = tuple(min(max(decay, 0.0), 1.0) for decay in factor_decays)
        self._scratch = Scratch()
        self._networks: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        self._decays: dict[tuple[str, torch.dtype, torch.device], Decay] = {}

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        return factored_dims(shape)

    def state_fields(self, shape: Shape) -> dict[str, StateField]:
        fields = {"momentum": StateField((3,)), "rms": StateField()}
        dims = self.dims(shape)
        if dims is None:
            return {**fields, "diag": StateField((3,))}
        d1, d0 = dims
        row, col = StateField((3,), replicated=drop_dim(shape, d0)), StateField((3,), replicated=drop_dim(shape, d1))
        return {**fields, "row": row, "col": col}

    def step(self, batch: Batch) -> Generator[Sum, None, None]:
        # A: sums of g^2 along rows and columns
        a = batch.new_sum("A", lambda item: reference.num_gradient_sums(item.param.shard.shape, item.dims), audited=True)
        for i, item in batch.moving():
            assert item.param.grad is not None
            reference.gradient_sums(item.param.grad, item.param.shard, item.dims, a.vectors[i], a.audits[i])
        yield a

        # B: with the factors known, the sum of squares of every feature
        b = batch.new_sum("B", _num_feature_sums)
        tensors: dict[int, SmallFC] = {}
        for i, item in batch.moving():
            tensors[i] = self._gather(batch, i, item, a.vectors[i])
            reference.small_fc_feature_sums(tensors[i], b.vectors[i], self._scratch)
        yield b

        # C: normalise, run the network, write
        networks: dict[tuple[int, torch.dtype], SmallFCNetwork] = {}
        for i, item in batch.moving():
            t, hyper = tensors[i], item.hyper
            key = (id(hyper), t.momentum.dtype)
            if key not in networks:
                networks[key] = self._network(hyper["step"], t.momentum.dtype)
            batch.param_squares[i] = b.vectors[i][0]
            reference.small_fc_apply(
                t,
                reference.small_fc_normalisers(t, a.audits[i][SQUARES], b.vectors[i]),
                networks[key],
                hyper["lr"] * hyper["step_mult"],
                hyper["exp_mult"],
                hyper["lr"] * hyper["weight_decay"],
                batch.update_squares[i],
                self._scratch,
            )

    def _gather(self, batch: Batch, i: int, item: Item, sums: Tensor) -> SmallFC:
        param, state, keep = item.param, item.state, batch.keep[i]
        assert param.grad is not None
        factors: Factors | None = None
        if item.dims is not None:
            shape = param.shard.shape
            factors = reference.update_factors(
                state["row"], state["col"], sums, shape, item.dims, self._decay("factor_decays", sums), batch.scale[i], keep
            )
        return SmallFC(
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

    def _network(self, step: Tensor, dtype: torch.dtype) -> SmallFCNetwork:
        """The network with the time features of iteration `step` folded into its first bias."""
        key = (dtype, step.device)
        if key not in self._networks:
            self._networks[key] = {name: t.to(step.device, dtype) for name, t in self.weights.tensors.items()}
        w = self._networks[key]
        features, time = w["network.input.weight"].split([reference.NUM_FEATURES, len(reference.TIME_SCALES)], dim=1)
        bias = w["network.input.bias"] + time @ reference.time_features(step).to(dtype)
        return SmallFCNetwork(
            features.contiguous(),
            bias[:, None],
            w["network.linear_0.weight"],
            w["network.linear_0.bias"][:, None],
            w["network.output.weight"],
            w["network.output.bias"][:, None],
        )


def _num_feature_sums(item: Item) -> int:
    return reference.DIAGONAL_SUMS if item.dims is None else reference.FACTORED_SUMS


def effective_decays(initial: Sequence[float], offsets: Sequence[float]) -> tuple[float, ...]:
    """beta = 1 - exp(10 (log(1 - initial) / 10 + offset)) = 1 - (1 - initial) exp(10 offset), as the reference has it."""
    return tuple(1.0 - (1.0 - beta) * math.exp(10.0 * offset) for beta, offset in zip(initial, offsets, strict=True))


def _checked_decays(name: str, offsets: Sequence[float], initial: Sequence[float], count: int) -> tuple[float, ...]:
    for label, values in ((name, offsets), (f"initial_{name}", initial)):
        if len(values) != count or not all(math.isfinite(x) for x in values):
            raise ValueError(f"{label}={tuple(values)}: wanted {count} finite number{'s' if count > 1 else ''}")
    return effective_decays(initial, offsets)


class AdafacLO(LearnedOptimizer):
    r"""The learned optimizer small_fc_lopt, exact on whole and on sharded parameters.

    With normalised features x of an element and the MLP's outputs (o_0, o_1):
    :math:`p \leftarrow p - lr \cdot step\_mult \cdot o_0 \exp(exp\_mult \cdot o_1)`, then
    :math:`p \leftarrow p - lr \cdot weight\_decay \cdot p`.

    State of a parameter: `momentum` (3, *shape), `rms` (*shape), and `row` (3, shape without d0), `col` (3, shape without d1), or
    `diag` (3, *shape) below two dims.

    Args:
        params: parameters, groups, or `named_parameters()`. A group may override lr, weight_decay, exp_mult, step_mult and
            max_grad_norm.
        lr: factor on every update; a float or a 0-d tensor.
        weights: "demo" (built in, hand-made), a registered name, `org/name[@revision]` on the Hub, a folder, a .safetensors file,
            or a mapping of tensors.
        momentum_decays, rms_decays, adafactor_decays: decay offsets, see `effective_decays`; default: those stored or registered
            with the weights.
        initial_momentum_decays, initial_rms_decays, initial_adafactor_decays: decays that the offsets start from.
        exp_mult, step_mult: scales of the magnitude's logarithm and of the update.
        weight_decay: decoupled, applied after the update to the updated parameter, as PyLO does.
        max_grad_norm: bound on the gradient norm, or None.
        clip: "global" bounds the norm over all parameters, at no extra communication; "per_tensor" that of each (PyLO's).
        nonfinite: inf or NaN in a gradient raises ("error"), leaves everything as it was ("skip"), or goes through ("allow").
        process_group: ranks that average the loss; this rule reads no loss.
        precision: "highest", "high" or "medium", arithmetic of the network in GPU kernels; on a CPU and in plain PyTorch all are
            float32.

    Raises:
        ValueError: a setting or a parameter that cannot be served, by name.
        WeightsError: the weights cannot be had or do not fit.

    Example::

        optimizer = pylo_dist.AdafacLO(model.named_parameters(), weights="demo")
        loss.backward()
        optimizer.step()
    """

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
    ) -> None:
        if precision not in ("highest", "high", "medium"):
            raise ValueError(f"precision={precision!r}: wanted 'highest', 'high' or 'medium'")
        network = load_weights(weights, SMALL_FC)
        betas = [
            _checked_decays(name, offsets if offsets is not None else network.decays[name], initial, count)
            for name, offsets, initial, count in (
                ("momentum_decays", momentum_decays, initial_momentum_decays, 3),
                ("rms_decays", rms_decays, initial_rms_decays, 1),
                ("adafactor_decays", adafactor_decays, initial_adafactor_decays, 3),
            )
        ]
        self.precision = precision
        rule = AdafacRule(network, *betas)
        defaults = {
            "lr": lr,
            "exp_mult": exp_mult,
            "step_mult": step_mult,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, rule, network, defaults, clip=clip, nonfinite=nonfinite, process_group=process_group)
