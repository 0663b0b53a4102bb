"""CELO2 and ELO-CELO2: learned directions, orthogonalised matrices, AdamW for the rest. Their rule
and faces.

Source: PyLO's CELO2_naive and ELO_CELO2_naive (arXiv 2602.19142). Matrices take the MLP's
direction, made orthogonal by Newton-Schulz and scaled to a fixed rms; embeddings and tensors below
two dims follow AdamW.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..core.pieces import ShardBinding
from ..core.requests import Request, Sum
from ..core.rule import Batch, Item
from ..core.shards import TensorShard
from ..core.state import StateField
from ..maths import adamw, compiled, gram, reference, stacks
from ..maths.adamw import AdamW
from ..maths.compiled import Updates
from ..maths.factored import FactoredRule
from ..maths.orthogonal import EPS_STEP, NewtonSchulz
from ..maths.owners import OwnedMatrices
from ..maths.reference import Network, StepTensors, wide
from ..maths.rounding import Roundings
from ..maths.stacks import Stack
from ..optimizer import Registration, StateDtype, checks, register_optimizer
from ..optimizer.checks import LARGEST, LARGEST_FLOAT32, SMALLEST_FLOAT32
from ..optimizer.engine import Clip, Nonfinite
from ..weights import (
    PYLO_LICENCE,
    Architecture,
    MetaNetwork,
    Registered,
    WeightsLike,
    load_weights,
)
from .arguments import (
    FactoredOptimizer,
    Precision,
    checked_decays,
    checked_numbers,
    decays,
    norm_bound,
)

# widths of the groups of features, each with a matrix of its own
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
ARCHITECTURE = Architecture(
    "celo2",
    {
        **{f"w0.{i}": (width, 8) for i, width in enumerate(GROUPS)},
        "b0": (8,),
        "dense_w.0": (8, 8),
        "dense_b.0": (8,),
        "dense_w.1": (8, 3),
        "dense_b.1": (3,),
    },
    config={"activation": "relu"},
)
WEIGHTS = {
    "DiamondXL/celo2": Registered(
        ARCHITECTURE.name,
        "DiamondXL/celo2",
        note="PyLO's CELO2 weights (arXiv 2602.19142)",
        licence=PYLO_LICENCE,
    )
}
ELO_WEIGHTS = {
    "DiamondXL/elo-celo2": Registered(
        ARCHITECTURE.name,
        "DiamondXL/elo-celo2",
        note="PyLO's ELO-CELO2 weights",
        licence=PYLO_LICENCE,
    )
}


MOST_ITERS = 100  # of Newton-Schulz, which is there after 5


@dataclass(frozen=True)
class Settings:
    """What both optimizers can be told, see `CELO2`."""

    orthogonalize: bool
    param_scale_mult: bool
    ns_coeffs: tuple[float, float, float]
    ns_iters: int
    ns_eps: float
    adam_betas: tuple[float, float]
    adam_eps: float
    group_counter: bool  # AdamW counts the steps of its group, not those of its tensor
    embedding_pattern: str | None

    @property
    def adamw(self) -> AdamW:
        return AdamW(self.adam_betas, self.adam_eps, group_counter=self.group_counter)


class CELO2Rule(FactoredRule):
    """The rule of both optimizers.

    Args:
        weights: MLP 30-8-8-3.
        momentum_decays, rms_decays, factor_decays: see `FactoredRule`.
        clamp: the gradient of matrices is clamped to this absolute value.
    """

    name = "celo2"
    num_hidden = 8
    clip_eps = 0.0

    def __init__(
        self,
        weights: MetaNetwork,
        momentum_decays: Sequence[float],
        rms_decays: Sequence[float],
        factor_decays: Sequence[float],
        clamp: float,
        settings: Settings,
    ) -> None:
        super().__init__(momentum_decays, rms_decays, factor_decays)
        self.features = replace(reference.CELO2, clamp=clamp)
        self.weights = weights
        self.settings = settings
        self.newton_schulz = NewtonSchulz(settings.ns_coeffs, settings.ns_iters, settings.ns_eps)
        self._networks: dict[tuple[torch.dtype, torch.device], Network] = {}

    def state_fields(self, shard: TensorShard, hyper: dict[str, Any]) -> dict[str, StateField]:
        pattern = self.settings.embedding_pattern
        is_embedding = hyper.get("is_embedding") or (
            pattern is not None and re.search(pattern, shard.fqn)
        )
        if len(shard.shape) >= 2 and not is_embedding:
            return super().state_fields(shard, hyper)
        return self.settings.adamw.state_fields()

    def describe(self, fields: dict[str, StateField], binding: ShardBinding) -> str:
        if "exp_avg" in fields:
            return "adamw"
        if binding.group is None or not self.settings.orthogonalize:
            return self.name
        through_gram = gram.is_cheaper(binding.shard.shape, binding.peers, self.settings.ns_iters)
        return f"{self.name}, {'gram' if through_gram else 'owner'}"

    def step(self, batch: Batch) -> Generator[Request, None, None]:
        # A: sums of g^2 along rows and columns of the matrices, p^2 of the others
        a = self.first_sum(batch)
        self.gradient_pass(batch, [i for i, _ in batch.candidates() if i not in batch.summed])
        kernels = self.kernels(batch)
        matrices, others = self._stacks(batch)
        adamw.param_squares(batch, others, a)
        yield a

        # B: the sum of squares of every feature, per matrix
        candidates = [i for i, item in batch.candidates() if "momentum" in item.state]
        b = self.second_sum(batch).zero_()
        tensors: dict[int, StepTensors] = {}
        roundings = Roundings(batch.device)
        if kernels is not None and candidates:
            kernels.feature_pass(batch, candidates)
        else:
            for i in candidates:
                tensors[i] = self.step_tensors(batch, i, batch.items[i], a.vectors[i], roundings)
                reference.feature_sums(tensors[i], b.vectors[i], self._scratch)
        adamw.keep_param_squares(batch, others, a)
        self.settings.adamw.step(batch, others, self._adamw_rates, roundings)
        yield b

        # C: the network's direction, orthogonal or not, at a fixed rms
        if kernels is not None and candidates:
            lengths = [batch.items[i].param.value.numel() for i in candidates]
            directions = dict(
                zip(candidates, stacks.empty(lengths, torch.float32, batch.device), strict=True)
            )
            kernels.update_pass(
                batch,
                candidates,
                self._updates(batch, b),
                self.precision,
                list(directions.values()),
                roundings,
            )
        else:
            squares = self._param_squares(batch, b)
            rms = self._param_rms(batch, squares)
            for i in candidates:
                batch.param_squares[i] = squares[i]
            directions = {
                i: self._direction(batch, i, tensors[i], b.vectors[i], rms[i]) for i in candidates
            }
        c: Sum | None = None
        if self.settings.orthogonalize:
            yield from self._orthogonalise(batch, directions)
        else:
            c = self._direction_squares(batch, matrices, directions)
            yield c
            self._to_factors(batch, c)
        for stack in matrices:
            s = stacks.stacked([directions[i] for i in stack.items])
            if c is not None:
                factors = stacks.stacked([c.vectors[i] for i in stack.items])
                stacks.scale_matrices(
                    s, batch.items[stack.items[0]].param.shard, factors.to(s.dtype)
                )
            self._move(batch, stack, s)

    def _stacks(self, batch: Batch) -> tuple[list[Stack], list[Stack]]:
        """The tensors that move, matrices and others, those of equal size and settings together.

        Without Newton-Schulz tensors of several matrices must be cut alike too: each matrix is
        normalised by itself.
        """
        by_matrix = not self.settings.orthogonalize

        def entry(i: int, item: Item) -> tuple[int, Hashable, int]:
            value, grad, shard = item.param.value, item.param.grad, item.param.shard
            assert grad is not None
            is_matrix = "momentum" in item.state
            apart = by_matrix and is_matrix and len(shard.shape) > 2
            cut = (shard.shape, shard.start, shard.run, shard.pitch) if apart else None
            kind = (is_matrix, id(item.hyper), value.numel(), value.dtype, grad.dtype, cut)
            return i, kind, value.numel()

        found: tuple[list[Stack], list[Stack]] = ([], [])
        for stack in stacks.of_batch(batch, [entry(i, x) for i, x in batch.candidates()]):
            found["momentum" not in batch.items[stack.items[0]].state].append(stack)
        return found

    def _move(self, batch: Batch, stack: Stack, s: Tensor) -> None:
        """p <- p - lr (s rmsmult + weight_decay p), with s (number of items, N)."""
        hyper, values = (
            batch.items[stack.items[0]].hyper,
            [batch.items[i].param.value for i in stack.items],
        )
        value = stacks.stacked(values)
        lr, decay = reference.in_dtype(hyper["lr"], s.dtype), hyper["weight_decay"]
        moves, squares = (
            stack.of(batch.moves),
            torch.zeros(len(values), dtype=torch.float64, device=batch.device),
        )
        for part in reference.parts(s):
            old = value[:, part].to(s.dtype, copy=True)
            change = s[:, part] * hyper["rmsmult"] + decay * old
            reference.move_rows(value[:, part], old, old - lr * change, moves, squares)
        stacks.put_back(value, values)
        batch.update_squares.index_copy_(0, stack.places, squares)

    def extra_sums(self, item: Item) -> int:
        # p^2 of the others; that of a matrix is one of its features
        return int("momentum" not in item.state)

    def _updates(self, batch: Batch, b: Sum) -> Updates:
        """What the compiled pass C reads: "step_size" multiplies the direction."""
        steps = batch.numbers("steps", lambda hyper: [1.0, hyper["exp_mult"], 0.0, 0.0])
        if self.settings.param_scale_mult:
            steps[:, 0].copy_(self._param_rms(batch, self._param_squares(batch, b)))
        networks = compiled.packed(self._network(torch.float32, batch.device))[None]
        network_of = torch.zeros(len(batch.items), dtype=torch.int64, device=batch.device)
        return Updates(networks, network_of, steps.to(torch.float32))

    def _param_squares(self, batch: Batch, b: Sum) -> Tensor:
        """The sum of p^2 of every item whose matrices take part in pass B, which counts it by
        matrix, float64 (items,).
        """
        if "by matrices" not in batch.cache:
            by_matrices: dict[int, list[int]] = {}
            for i, item in enumerate(batch.items):
                if "momentum" in item.state:
                    by_matrices.setdefault(
                        math.prod(self.features.lead(item.param.shard.shape)), []
                    ).append(i)
            batch.cache["by matrices"] = [
                (number, tuple(items)) for number, items in by_matrices.items()
            ]
        squares = torch.zeros(len(batch.items), dtype=torch.float64, device=batch.device)
        for number, items in batch.cache["by matrices"]:
            places = batch.on_device(f"tensors of {number} matrices", items, torch.int64)
            squares.index_copy_(
                0, places, b.slices(items, self.features.p * number, number).sum(-1)
            )
        return squares

    @staticmethod
    def _param_rms(batch: Batch, squares: Tensor) -> Tensor:
        """The rms of every item from its sum of squares, float64 (items,)."""
        if "numels" not in batch.cache:
            batch.cache["numels"] = tuple(item.param.shard.global_numel for item in batch.items)
        return (
            squares / batch.on_device("sizes", batch.cache["numels"], torch.float64) + EPS_STEP
        ).sqrt_()

    def _direction(
        self, batch: Batch, i: int, t: StepTensors, sums: Tensor, param_rms: Tensor
    ) -> Tensor:
        """The local elements (N,) of s = o0 exp(exp_mult o1), and the new state of the tensor."""
        exp_mult, scale = batch.items[i].hyper["exp_mult"], param_rms.to(t.dtype)
        s = torch.empty_like(t.rms, dtype=t.dtype)
        network = self._network(t.dtype, t.momentum.device)
        for box, direction, magnitude in reference.network_outputs(
            t, reference.normalisers(t, sums), network, self._scratch
        ):
            out = direction * (exp_mult * magnitude).exp_()
            box.view(s).copy_(out * scale if self.settings.param_scale_mult else out)
        return s.view(-1)

    def _orthogonalise(
        self, batch: Batch, directions: dict[int, Tensor]
    ) -> Generator[Request, None, None]:
        """Replace the directions by their matrices' Newton-Schulz iterates at rms 1 (`directions`
        is modified in place).
        """
        wide_dtype = max(
            (s.dtype for s in directions.values()),
            key=lambda dtype: dtype.itemsize,
            default=torch.float32,
        )
        like = torch.empty(0, dtype=wide_dtype, device=batch.device)
        unshared: dict[object, list[Tensor]] = {}
        for i, s in directions.items():
            param = batch.items[i].param
            if param.group is None:
                unshared.setdefault((id(param.holders), param.replicas), []).append(
                    s.view(param.shard.shape)
                )
        for wholes in unshared.values():
            self.newton_schulz.whole_(wholes)
        yield from self._through_gram(batch, directions)
        for owned in self._ways(batch)[1]:
            there = owned.to_owners(directions, like)
            yield there
            mine = {i: w.to(batch.items[i].dtype) for i, w in owned.assemble(there).items()}
            self.newton_schulz.whole_(list(mine.values()))
            back = owned.give_back({i: w.to(wide_dtype) for i, w in mine.items()}, like)
            yield back
            directions.update({i: s.to(directions[i].dtype) for i, s in owned.pieces(back).items()})

    def _through_gram(
        self, batch: Batch, directions: dict[int, Tensor]
    ) -> Generator[Request, None, None]:
        """The same for matrices that stay where they are (`directions` is modified in place)."""
        by_group = self._ways(batch)[0]
        sizes = {
            id(batch.items[i]): min(batch.items[i].param.shard.shape) ** 2 for i in chain(*by_group)
        }
        grams = batch.new_sum("gram", lambda item: sizes.get(id(item), 0))
        work = [
            (
                [directions[i] for i in chosen],
                [batch.items[i].param.shard for i in chosen],
                [grams.vectors[i] for i in chosen],
            )
            for chosen in by_group
        ]
        for pieces, shards, sums in work:
            self.newton_schulz.gram_sums(pieces, shards, sums)
        if work:
            yield grams
        for pieces, shards, sums in work:
            self.newton_schulz.through_gram_(pieces, shards, sums)

    def _ways(self, batch: Batch) -> tuple[list[list[int]], list[OwnedMatrices]]:
        """By process group the shared matrices that go through their Gram matrix, and who owns the
        others. Decided once.
        """
        if "ways" not in batch.cache:
            through_gram: dict[int, list[int]] = {}
            by_group: dict[int, list[int]] = {}
            for i, item in enumerate(batch.items):
                param = item.param
                if "momentum" not in item.state or param.group is None:
                    continue
                if gram.is_cheaper(param.shard.shape, param.peers, self.settings.ns_iters):
                    through_gram.setdefault(id(param.group), []).append(i)
                else:
                    by_group.setdefault(id(param.group), []).append(i)
            dealt = [
                OwnedMatrices.deal(items, [batch.items[i].param for i in items])
                for items in by_group.values()
            ]
            batch.cache["ways"] = (list(through_gram.values()), dealt)
        ways: tuple[list[list[int]], list[OwnedMatrices]] = batch.cache["ways"]
        return ways

    @staticmethod
    def _direction_squares(
        batch: Batch, matrices: Sequence[Stack], directions: dict[int, Tensor]
    ) -> Sum:
        """The request of pass C without Newton-Schulz: the sum of squares of every matrix's
        direction.
        """

        def num_sums(item: Item) -> int:
            return math.prod(item.param.shard.shape[:-2]) if "momentum" in item.state else 0

        c = batch.new_sum("C", num_sums)
        for stack in matrices:
            shard = batch.items[stack.items[0]].param.shard
            sums = stacks.matrix_square_sums(
                stacks.stacked([directions[i] for i in stack.items]), shard
            )
            torch._foreach_copy_([c.vectors[i] for i in stack.items], list(sums.unbind()))
        return c

    @staticmethod
    def _to_factors(batch: Batch, c: Sum) -> None:
        """Sums of squares to what brings each matrix to rms 1 (`c` is modified in place)."""
        if "means" not in batch.cache:
            chosen = [i for i, vector in enumerate(c.vectors) if vector.numel()]
            sizes = [math.prod(batch.items[i].param.shard.shape[-2:]) for i in chosen]
            batch.cache["means"] = ([c.vectors[i] for i in chosen], sizes)
        vectors, sizes = batch.cache["means"]
        if vectors:
            torch._foreach_div_(vectors, sizes)
        for packed in c.buffers:
            packed.buffer.add_(EPS_STEP).rsqrt_()

    @staticmethod
    def _adamw_rates(hyper: dict[str, Any]) -> adamw.Rates:
        decay = hyper["adam_weight_decay"]
        return adamw.Rates(
            wide(hyper["lr"]) * hyper["adam_lr_mult"],
            hyper["weight_decay"] if decay is None else decay,
        )

    def _network(self, dtype: torch.dtype, device: torch.device) -> Network:
        if (dtype, device) not in self._networks:
            w = {name: t.to(device, dtype) for name, t in self.weights.tensors.items()}
            # (30, 8), a matrix per group of features
            first = torch.cat([w[f"w0.{i}"] for i in range(len(GROUPS))])
            self._networks[dtype, device] = Network(
                first.T.contiguous(),
                w["b0"][:, None],
                w["dense_w.0"].T.contiguous(),
                w["dense_b.0"][:, None],
                w["dense_w.1"].T.contiguous(),
                w["dense_b.1"][:, None],
            )
        return self._networks[dtype, device]


def _settings(
    orthogonalize: bool,
    param_scale_mult: bool,
    ns_coeffs: Sequence[float],
    ns_iters: int,
    ns_eps: float,
    adam_betas: Sequence[float],
    adam_eps: float,
    group_counter: bool,
    embedding_pattern: str | None,
) -> Settings:
    """The settings, checked. Raises ValueError naming the argument."""
    checks.whole("ns_iters", ns_iters, "an int >= 1", 1, MOST_ITERS)
    eps, own_eps = (
        checks.number(name, value, "a finite number > 0", SMALLEST_FLOAT32, LARGEST_FLOAT32)
        for name, value in (("ns_eps", ns_eps), ("adam_eps", adam_eps))
    )
    if embedding_pattern is not None:
        if not isinstance(embedding_pattern, str):
            raise checks.refused(
                "embedding_pattern", embedding_pattern, "a regular expression or None"
            )
        try:
            re.compile(embedding_pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"embedding_pattern={embedding_pattern!r} is no regular expression: {error}"
            ) from None
    c0, c1, c2 = checked_numbers("ns_coeffs", ns_coeffs, 3)
    values = [i / 32 for i in range(1, 33)]  # that singular values may begin with
    for _ in range(ns_iters):
        values = [c0 * x + c1 * x**3 + c2 * x**5 for x in values]
        if max(map(abs, values)) > 1e3:
            raise checks.refused(
                "ns_coeffs",
                ns_coeffs,
                f"three numbers with which singular values stay bounded over ns_iters={ns_iters}",
            )
    beta_1, beta_2 = decays("adam_betas", adam_betas, 2)
    return Settings(
        checks.switch("orthogonalize", orthogonalize),
        checks.switch("param_scale_mult", param_scale_mult),
        (c0, c1, c2),
        ns_iters,
        eps,
        (beta_1, beta_2),
        own_eps,
        group_counter,
        embedding_pattern,
    )


class CELO2(FactoredOptimizer):
    r"""CELO2, exact on whole and on sharded parameters.

    Matrices (the last two dims of tensors with two or more): :math:`s = o_0 \exp(exp\_mult \cdot
    o_1)`, made orthogonal by Newton-Schulz, scaled to rms 1, and :math:`p \leftarrow p - lr
    (rmsmult \cdot s + weight\_decay \cdot p)`. Embeddings and tensors below two dims: AdamW with
    `lr * adam_lr_mult` and moments of its own.

    State of a matrix: `momentum` `(3, *shape)`, `rms` `(*shape)`, `row`, `col` as `AdafacLO`; of
    others `exp_avg`, `exp_avg_sq` `(*shape)` and `adam_step` (), the steps this tensor has taken.

    Args:
        lr: factor on every update.
        weight_decay: decoupled, of the parameter before the step.
        adam_weight_decay: the same for AdamW; None: equal.
        orthogonalize: False leaves Newton-Schulz out ("celo2-base").
        clip_grad, clip_norm: whether to bound the gradient norm over all parameters, and by what
            (at most grad_clip_val). A group may hold `max_grad_norm` instead.
        exp_mult: 0 ignores the network's magnitude.
        param_scale_mult: multiplies s by the rms of the parameter.
        ns_coeffs, ns_iters, ns_eps: of Newton-Schulz.
        grad_clip_val: gradients of matrices are clamped to it.
        embedding_pattern: regular expression; tensors whose full name it is found in follow AdamW,
            as do groups with `is_embedding=True`. `report()` shows the way of each.
        Others: as `AdafacLO`; the decays are used as they are.

    Raises:
        ValueError: a setting or a parameter that cannot be served, by name.
        WeightsError: the weights cannot be had or do not fit.
    """

    group_counter = False

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor = 0.001,
        weights: WeightsLike = "DiamondXL/celo2",
        weight_decay: float = 0.0,
        adam_lr_mult: float = 1.0,
        adam_weight_decay: float | None = None,
        adam_betas: Sequence[float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        orthogonalize: bool = True,
        clip_grad: bool = False,
        clip_norm: float = 1.0,
        initial_momentum_decays: Sequence[float] = (0.9, 0.99, 0.999),
        initial_rms_decays: Sequence[float] = (0.95,),
        initial_adafactor_decays: Sequence[float] = (0.9, 0.99, 0.999),
        exp_mult: float = 0.0,
        rmsmult: float = 1.0,
        param_scale_mult: bool = False,
        ns_coeffs: Sequence[float] = (3.4445, -4.775, 2.0315),
        ns_iters: int = 5,
        ns_eps: float = 1e-8,
        grad_clip_val: float = 1000.0,
        embedding_pattern: str | None = None,
        clip: Clip = "global",
        nonfinite: Nonfinite = "error",
        process_group: Any = None,
        precision: Precision = "high",
        state_dtype: StateDtype = None,
        state_seed: int = 0,
    ) -> None:
        clamp = checks.number(
            "grad_clip_val", grad_clip_val, "a finite number > 0", most=LARGEST_FLOAT32, above=True
        )
        bound = norm_bound(clip_grad, clip_norm, clamp)
        network = load_weights(weights, ARCHITECTURE)
        rule = CELO2Rule(
            network,
            *checked_decays(initial_momentum_decays, initial_rms_decays, initial_adafactor_decays),
            clamp,
            _settings(
                orthogonalize,
                param_scale_mult,
                ns_coeffs,
                ns_iters,
                ns_eps,
                adam_betas,
                adam_eps,
                self.group_counter,
                embedding_pattern,
            ),
        )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "adam_lr_mult": adam_lr_mult,
            "adam_weight_decay": adam_weight_decay,
            "exp_mult": exp_mult,
            "rmsmult": rmsmult,
            "max_grad_norm": bound,
            "is_embedding": False,
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

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        limit, clamp = group.get("max_grad_norm"), self.rule.features.clamp  # type: ignore[attr-defined]
        if limit is not None and limit > clamp:
            raise ValueError(
                f"max_grad_norm={limit!r}: wanted at most grad_clip_val={clamp:g}, or None"
            )
        for key in ("adam_lr_mult", "adam_weight_decay", "rmsmult"):
            if group[key] is not None or key != "adam_weight_decay":
                checks.number(key, group[key], f"a finite number >= 0, at most {LARGEST:g}")


class ELO_CELO2(CELO2):
    """ELO-CELO2: CELO2's matrices, and an AdamW whose moments are those of the learned
    accumulators, counted per group.

    Differs from `CELO2` in the defaults (weight_decay 0.1, clip_grad True) and in the step count of
    AdamW's bias correction, which is the group's. PyLO's two classes disagree on adam_lr_mult: 1 in
    plain PyTorch, 20 in CUDA; 1 is the published code's.

    Args:
        As `CELO2`, without adam_betas and adam_eps: AdamW uses the first momentum decay, the rms
            decay, and 1e-8.
    """

    group_counter = True

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor = 0.001,
        weights: WeightsLike = "DiamondXL/elo-celo2",
        weight_decay: float = 0.1,
        adam_lr_mult: float = 1.0,
        clip_grad: bool = True,
        initial_momentum_decays: Sequence[float] = (0.9, 0.99, 0.999),
        initial_rms_decays: Sequence[float] = (0.95,),
        **kwargs: Any,
    ) -> None:
        own = {"adam_betas", "adam_eps"} & set(kwargs)
        if own:
            raise TypeError(
                f"ELO_CELO2 has no {sorted(own)}: its AdamW shares the learned accumulators' decays"
            )
        betas = (
            decays("initial_momentum_decays", initial_momentum_decays, 3)[0],
            decays("initial_rms_decays", initial_rms_decays, 1)[0],
        )
        super().__init__(
            params,
            lr=lr,
            weights=weights,
            weight_decay=weight_decay,
            adam_lr_mult=adam_lr_mult,
            adam_betas=betas,
            clip_grad=clip_grad,
            initial_momentum_decays=initial_momentum_decays,
            initial_rms_decays=initial_rms_decays,
            **kwargs,
        )


register_optimizer(Registration("celo2", CELO2, ARCHITECTURE, WEIGHTS))
register_optimizer(Registration("elo-celo2", ELO_CELO2, ARCHITECTURE, ELO_WEIGHTS))
