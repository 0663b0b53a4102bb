"""A learned optimizer that is not the package's, written with the public rule interface alone: what
holds for the package's own must hold for it.

It leaves to the defaults what a rule may leave to them: row and column factors, an early pass over
gradients, what replaces NaN, state of the run.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

import pylo_dist
from pylo_dist.core.requests import Request
from pylo_dist.core.rule import Batch, LearnedRule
from pylo_dist.core.shards import TensorShard
from pylo_dist.core.state import StateField
from pylo_dist.maths.reference import commit, gradient_sums, move
from pylo_dist.weights import Architecture, MetaNetwork, load_weights


class TideRule(LearnedRule):
    """p <- p - lr (|p| exp(MLP(log |p|, log |m|, log e)) m_i / (abs(m_i) + |m|) + weight_decay p)

    |x| is the rms of a whole tensor, m a momentum of its gradients, and e a mean of their mean
    squares: nearly the sign of the momentum, as far as the tensor's size says.
    """

    name = "tide"

    def __init__(self, network: MetaNetwork) -> None:
        self.network = network

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        return {"momentum": StateField(), "energy": StateField(replicated=())}

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        a = batch.new_sum("A", lambda item: 1, audited=True)
        for i, item in batch.candidates():
            gradient_sums(item.param.grad, item.param.shard, None, a.vectors[i][:0], a.audits[i])
            a.vectors[i] += item.param.value.double().square().sum()
        yield a

        b = batch.new_sum("B", lambda item: 2)
        for i, item in batch.candidates():
            m = item.state["momentum"]
            g = item.param.grad.to(m.dtype) * batch.scale[i].to(m.dtype)
            # m <- 0.9 m + 0.1 g
            commit(m, 0.9 * m + 0.1 * g, batch.moves[i])
            b.vectors[i] += torch.stack([m.double().square().sum(), g.double().square().sum()])
        yield b

        for i, item in batch.candidates():
            m, energy, hyper = item.state["momentum"], item.state["energy"], item.hyper
            batch.param_squares[i] = a.vectors[i][0]
            sums = torch.cat([a.vectors[i], b.vectors[i]]) / item.param.shard.global_numel
            p_square, m_square, g_square = sums.split(1)
            # e <- 0.9 e + 0.1 |g|^2
            commit(energy, 0.9 * energy.double() + 0.1 * g_square, batch.moves[i])
            p_rms, m_rms = p_square.sqrt().clamp_min(1e-3), m_square.sqrt().clamp_min(1e-12)
            features = torch.cat([p_rms, m_rms, energy.double().clamp_min(1e-24)]).log()
            size = hyper["lr"] * p_rms * self.factor(features, batch)
            decay = torch.as_tensor(hyper["lr"] * hyper["weight_decay"], dtype=m.dtype)
            old = item.param.value.to(m.dtype, copy=True)
            new = old - size.to(m.dtype) * m / (m.abs() + m_rms.to(m.dtype)) - decay * old
            move(item.param.value, old, new, batch.moves[i], batch.update_squares[i])

    def factor(self, features: Tensor, batch: Batch) -> Tensor:
        """exp(MLP(features)), (1,)."""
        if "network" not in batch.cache:
            batch.cache["network"] = {
                name: t.to(batch.device, torch.float64) for name, t in self.network.tensors.items()
            }
        w = batch.cache["network"]
        return (w["out.weight"] @ torch.tanh(w["in.weight"] @ features + w["in.bias"])).exp()


TINY = Architecture("tide", {"in.weight": (4, 3), "in.bias": (4,), "out.weight": (1, 4)}, decays={})


class Tide(pylo_dist.LearnedOptimizer):
    """The face of `TideRule`.

    Args:
        lr: of a tensor's own size, some hundredths.
        weight_decay: decoupled, of the parameter before the step.
        Others: as `pylo_dist.AdafacLO`.
    """

    def __init__(
        self,
        params: Any,
        *,
        weights: Any,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        **others: Any,
    ) -> None:
        network = load_weights(weights, TINY)
        defaults = {"lr": lr, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, TideRule(network), network, defaults, **others)


def tide_weights() -> dict[str, Tensor]:
    """A network that nobody trained."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.2 * torch.randn(shape, generator=generator)  # type: ignore[arg-type]
        for name, shape in TINY.shapes.items()
    }
