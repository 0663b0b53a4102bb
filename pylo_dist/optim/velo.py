"""VeLO, the versatile learned optimizer: its rule and its face. Writes value and state of its
batch.

Source: HyperV2 in google/learned_optimization (research/general_lopt/hyper_v2.py), Metz et al. 2022
(arXiv 2211.09760). An LSTM reads statistics of all tensors and the training loss and mixes, per
tensor, a small MLP for the elements and a step size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.rule import Batch, Item, is_capturing
from ..core.shards import Shape, TensorShard, factored_dims
from ..core.state import StateField
from ..maths import reference
from ..maths.compiled import Updates
from ..maths.factored import Rates, ThreePassRule, Update
from ..maths.reference import Network
from ..optimizer import Registration, checks, register_optimizer
from ..optimizer.engine import Clip, Nonfinite
from ..weights import (
    PYLO_LICENCE,
    Architecture,
    MetaNetwork,
    Registered,
    WeightsLike,
    load_weights,
)
from .arguments import FactoredOptimizer, Precision, checked_decays, wide

ARCHITECTURE = Architecture(
    "velo",
    {
        "mix_layer1.weight": ("H", 30),  # in the files, and in the reference's, but without effect
        "mix_layer1.bias": ("H",),
        "mix_layer2.weight": ("H", 30),
        "mix_layer2.bias": ("H",),
        "final_mix_layer.weight": ("H", 30),
        "final_mix_layer.bias": ("H",),
        "lstm.linear.weight": ("4H", "2H"),
        "lstm.linear.bias": ("4H",),
        "rnn_to_controls.weight": ("P", "H"),
        "rnn_to_controls.bias": ("P",),
        "step_size.weight": (1, "H"),
        "step_size.bias": (1,),
        "lstm_init_state.0": (1, "H"),
        "lstm_init_state.1": (1, "H"),
        "input_weights_": ("P", 4, 30),
        "input_bias_": ("P", 4),
        "hidden_weights_.0": ("P", 4, 4),
        "hidden_bias_.0": ("P", 4),
        "output_weights_": ("P", 3, 4),
        "output_bias_": ("P", 3),
    },
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
)
WEIGHTS = {
    "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP": Registered(
        ARCHITECTURE.name,
        "Pauljanson002/VeLO_RNN+Pauljanson002/VeLO_MLP",
        note="Google's VeLO as PyLO has it (arXiv 2211.09760)",
        horizon=150_000,
        licence=PYLO_LICENCE,
    )
}

# slots of the sums of a tensor's own: p^2, m_k, m_k^2, v, v^2
P_SQUARES, M, M_SQUARES, V, V_SQUARES = 0, slice(1, 4), slice(4, 7), 7, 8

# of the run, where its tanh features switch
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
NUM_LOSS_MEANS = 10
NETWORK = {  # of an element, in the order of `reference.Network`; the third output is unused
    "input_weights_": (4, 30),
    "input_bias_": (4, 1),
    "hidden_weights_.0": (4, 4),
    "hidden_bias_.0": (4, 1),
    "output_weights_": (2, 4),
    "output_bias_": (2, 1),
}
LARGEST_MODEL = 600_000_000  # parameters beyond which VeLO fails (arXiv 2602.19142)
LONGEST_RUN = 150_000  # steps of the longest run in meta-training


def log_abs(x: Tensor) -> Tensor:
    """0.5 clip(log(1e-8 + |10 x|), -5, 5)."""
    return 0.5 * (1e-8 + (10.0 * x).abs()).log().clamp(-5.0, 5.0)


class LossBuffer:
    """Ten running means of the loss, from 10 steps to the whole run long, and their minima; all
    float64 (10,).

    Args:
        num_steps: length of the run.
        step: steps taken before this one, int64 0-d.
    """

    def __init__(self, num_steps: int, step: Tensor) -> None:
        half_lives = torch.logspace(
            1.0, math.log10(num_steps), NUM_LOSS_MEANS, dtype=torch.float64, device=step.device
        )
        self.decays = torch.exp(-1.0 / half_lives)
        self.step = step

    def updated(self, means: Tensor, minima: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """(means, minima) after `loss`, which counts as at most twice the largest mean."""
        correction = 1.0 - self.decays ** (self.step + 1)
        top = torch.where(self.step == 0, loss, (means / correction).max())
        loss = torch.minimum(2.0 * top.abs(), loss)
        means = self.decays * means + (1.0 - self.decays) * loss
        return means, torch.minimum(minima, means / correction)

    def features(self, means: Tensor, minima: Tensor) -> Tensor:
        """Nine numbers in [-1, 1]: how far each mean is above its minimum, measured by the next
        longer one; 0 at the start.
        """
        means = means / (1.0 - self.decays ** (self.step + 1))
        above = (means[:-1] - minima[:-1]) / (means[1:] - minima[:-1]).clamp_min(1e-8)
        return torch.where(self.step + 1 <= 2, 0.0, (above - 1.0).clamp(-1.0, 1.0))


class VeLORule(ThreePassRule):
    """30 normalised features per element, an MLP 30-4-4-3 that an LSTM mixes for every tensor out
    of P sets of weights.

    Args:
        weights: LSTM and MLP sets.
        momentum_decays, rms_decays, factor_decays: see `FactoredRule`.
        tie_break: see `shards.factored_dims`.
    """

    name = "velo"
    needs_loss = True
    features = reference.VELO
    num_tensor_sums = reference.NUM_MOMENTS
    num_hidden = 4

    def __init__(
        self,
        weights: MetaNetwork,
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
        tie_break: str,
    ) -> None:
        super().__init__(momentum_decays, rms_decays, factor_decays)
        self.weights = weights
        self.tie_break = tie_break
        self._tensors: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        self._mixed = torch.empty(0)  # (tensors, numbers of an MLP), as `ops.packed` has it
        self._step_sizes = torch.empty(0)

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        return factored_dims(shape, self.tie_break)

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        hidden, cell = (self.weights.tensors[f"lstm_init_state.{i}"][0] for i in (0, 1))
        lstm = {
            "lstm_hidden": StateField(replicated=tuple(hidden.shape), initial=hidden),
            "lstm_cell": StateField(replicated=tuple(cell.shape), initial=cell),
        }
        return {**super().state_fields(shard, hyper), **lstm}

    def group_state(self) -> dict[str, Tensor]:
        means = torch.zeros(NUM_LOSS_MEANS, dtype=torch.float64)
        return {"loss_means": means, "loss_minima": torch.full_like(means, 999999999999.0)}

    def prepare(self, batch: Batch, tensor_sums: Tensor | None) -> None:
        assert tensor_sums is not None
        hyper = batch.groups[0]
        # the dtype of the LSTM is that of the widest state, so that one float64 tensor makes the
        # run a float64 one
        dtype = max(
            (item.state["momentum"].dtype for item in batch.items), key=lambda d: d.itemsize
        )
        w = self._weights(dtype, batch.device)

        buffer = LossBuffer(hyper["num_steps"], hyper["step"])
        means, minima = buffer.updated(hyper["loss_means"], hyper["loss_minima"], batch.loss)
        loss_features = buffer.features(means, minima).to(dtype)
        for group in batch.groups:
            reference.commit(group["loss_means"], means, batch.taken)
            reference.commit(group["loss_minima"], minima, batch.taken)

        n, sums = self._constants(batch)[0], tensor_sums
        inputs = self._inputs(batch, sums, loss_features)
        if "lstm" not in batch.cache:
            batch.cache["lstm"] = [
                [x.state[name].view(-1) for x in batch.items]
                for name in ("lstm_hidden", "lstm_cell")
            ]
        rows = batch.cache["lstm"]
        hidden, cell = old = [torch.stack([row.to(dtype) for row in part]) for part in rows]
        # x <- x W2 + b2 + max over tensors of relu(x W1 + b1)
        mix, x = linear(inputs, w["mix.weight"], w["mix.bias"]).chunk(2, dim=1)
        x = x + torch.relu(mix).amax(0)
        gates = linear(
            torch.cat([x, hidden], dim=1), w["lstm.linear.weight"], w["lstm.linear.bias"]
        )
        i, g, f, o = gates.chunk(4, dim=1)
        cell = torch.sigmoid(f + 1.0) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        for part, before, now in zip(rows, old, (hidden, cell), strict=True):
            torch._foreach_copy_(part, list(torch.where(batch.taken, now, before).unbind()))

        controls, lr_mult = linear(hidden, w["heads.weight"], w["heads.bias"]).tensor_split(
            [-1], dim=1
        )
        lr_mult = batch.figures["lr_mult"] = lr_mult[:, 0]
        # every tensor's MLP: 100 times the mean over the P sets, weighted by its controls (tensors,
        # P)
        self._mixed = controls @ w["sets"] * (100.0 / controls.shape[1])
        rates = batch.numbers("rates", lambda group: [wide(group["lr"]) * group["step_mult"]])[:, 0]
        self._step_sizes = (
            rates * lr_mult.to(torch.float64) * (sums[:, P_SQUARES] / n[:, 0] + 1e-9).sqrt()
        )

    def _inputs(self, batch: Batch, sums: Tensor, loss_features: Tensor) -> Tensor:
        """What the LSTM reads of every tensor, (tensors, 30), from state and parameter before the
        step.
        """
        n, one_hot, fractions_at = self._constants(batch)
        mean = sums / n
        # moments of m z and v z with z = 1 / rms(p); E[x^2] - E[x]^2 loses nothing that matters in
        # float64
        z = mean[:, P_SQUARES, None].clamp_min(1e-9).rsqrt()
        m, m_squares = z * mean[:, M], z * z * mean[:, M_SQUARES]
        v, v_squares = z * mean[:, V, None], z * z * mean[:, V_SQUARES, None]
        var_m = (m_squares - m * m).clamp_min(0.0)
        # about the mean of m_k: so does the reference
        var_v = (v_squares - 2.0 * v * m + m * m).clamp_min(0.0)
        groups, group_of = batch.hypers()
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
    def _constants(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of elements (tensors, 1), one-hot numbers of dims above 1 (tensors, 5),
        FRACTIONS; on the device, once.
        """
        if "constants" not in batch.cache:
            shapes = [item.param.shard.shape for item in batch.items]
            n = torch.tensor([[float(math.prod(shape))] for shape in shapes], dtype=torch.float64)
            one_hot = torch.tensor(
                [
                    [float(sum(size > 1 for size in shape) == k) for k in range(5)]
                    for shape in shapes
                ]
            )
            at = torch.tensor(FRACTIONS, dtype=torch.float32)
            batch.cache["constants"] = tuple(t.to(batch.device) for t in (n, one_hot, at))
        constants: tuple[Tensor, Tensor, Tensor] = batch.cache["constants"]
        return constants

    @staticmethod
    def _fraction(hyper: dict[str, Any], at: Tensor) -> Tensor:
        """tanh(10 (t / num_steps - w)) for nine w, float32 as in the reference, (9,); beyond the
        end of the run as at its end.
        """
        where = (hyper["step"].to(torch.float32) / hyper["num_steps"]).clamp(max=1.0)
        return torch.tanh(10.0 * (where - at))

    def rates(self, hyper: dict[str, Any]) -> Rates:
        return Rates(0.0, hyper["exp_mult"], decay_after=wide(hyper["lr"]) * hyper["weight_decay"])

    def network_of(self, i: int, item: Item) -> Network:
        parts = (
            self._mixed[i]
            .to(item.state["momentum"].dtype)
            .split([math.prod(shape) for shape in NETWORK.values()])
        )
        return Network(
            *(part.view(shape) for part, shape in zip(parts, NETWORK.values(), strict=True))
        )

    def update(self, i: int, item: Item) -> Update:
        update = super().update(i, item)
        update.step_size = self._step_sizes[i].to(item.state["momentum"].dtype)
        return update

    def updates(self, batch: Batch) -> Updates:
        steps = self.steps(batch)
        steps[:, 0].copy_(self._step_sizes)
        own = batch.on_device("network_of", tuple(range(len(batch.items))), torch.int64)
        return Updates(self._mixed, own, steps.to(torch.float32))

    def _weights(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The LSTM, its two inputs and its two outputs as one matrix each, and all sets of weights
        of the MLP, (P, numbers).
        """
        if (dtype, device) not in self._tensors:
            w = {name: t.to(device, dtype) for name, t in self.weights.tensors.items()}
            found = {name: w[name] for name in ("lstm.linear.weight", "lstm.linear.bias")}
            for kind in ("weight", "bias"):
                found[f"mix.{kind}"] = torch.cat(
                    [w[f"mix_layer2.{kind}"], w[f"final_mix_layer.{kind}"]]
                )
                found[f"heads.{kind}"] = torch.cat(
                    [w[f"rnn_to_controls.{kind}"], w[f"step_size.{kind}"]]
                )
            sets = (w[name][:, : shape[0]].flatten(1) for name, shape in NETWORK.items())
            found["sets"] = torch.cat(list(sets), dim=1)
            self._tensors[dtype, device] = found
        return self._tensors[dtype, device]


class VeLO(FactoredOptimizer):
    r"""The versatile learned optimizer, exact on whole and on sharded parameters. It reads the
    training loss.

    With the MLP's outputs (o_0, o_1) for an element and the LSTM's step size l for its tensor:
    :math:`p \leftarrow p - lr \cdot step\_mult \cdot l \cdot o_0 \exp(exp\_mult \cdot o_1)
    \sqrt{\langle p^2 \rangle + 10^{-9}}`, then :math:`p \leftarrow p - lr \cdot weight\_decay \cdot
    p`.

    State of a parameter: that of `AdafacLO`, and its LSTM row, `lstm_hidden` and `lstm_cell` (H,).
    Of the run, in every parameter group: `num_steps`, `loss_means` and `loss_minima` (10,).

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

    _steps_called: int | None = None
    _warned_at: int | None = None

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
        super().__init__(params, rule, network, defaults, clip, nonfinite, process_group, precision)
        numel = sum(binding.shard.global_numel for binding, _ in self.layouts())
        if numel > LARGEST_MODEL:
            warnings.warn(
                f"VeLO on {numel:,} parameters: it is known to fail beyond some {LARGEST_MODEL:,}",
                stacklevel=2,
            )
        if num_steps > LONGEST_RUN:
            warnings.warn(
                f"num_steps={num_steps}: VeLO was meta-trained on runs of up to {LONGEST_RUN} "
                "steps",
                stacklevel=2,
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        num_steps, limit = group["num_steps"], group.get("max_grad_norm")
        checks.whole("num_steps", num_steps, "the length of the run, an int >= 2", 2)
        if limit is not None and limit > reference.VELO.clamp:
            raise ValueError(
                f"max_grad_norm={limit!r}: wanted at most {reference.VELO.clamp:g}, or None"
            )

    def extend(self, num_steps: int) -> None:
        """Give the run another length, e.g. to go on after its end; call it alike on all ranks.

        Args:
            num_steps: the new length in steps, counted from the start.
        """
        for group in self.param_groups:
            self._check_group({**group, "num_steps": num_steps})
        for group in self.param_groups:
            group["num_steps"] = num_steps

    def phases(self) -> Any:
        # on a GPU the count is read back once; after that calls are counted on the host, steps not
        # taken among them, but not what a CUDA graph replays
        group = self.param_groups[0]
        if is_capturing(group["step"].device):
            return super().phases()
        if self._steps_called is None or group["step"].device.type == "cpu":
            self._steps_called = int(group["step"])
        num_steps = group["num_steps"]
        is_over = isinstance(num_steps, int) and self._steps_called >= num_steps
        if is_over and self._warned_at != num_steps:
            self._warned_at = num_steps
            warnings.warn(
                f"VeLO has taken all num_steps={group['num_steps']} steps it was told of; it goes "
                "on as at the end of a run. extend(num_steps) makes the run longer",
                stacklevel=3,
            )
        self._steps_called += 1
        return super().phases()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steps_called = None


register_optimizer(Registration("velo", VeLO, ARCHITECTURE, WEIGHTS))
