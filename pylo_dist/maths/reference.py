"""The passes of the learned optimizers in plain PyTorch, in chunks. Writes only the tensors it is
handed.

This is the oracle that faster kernels are compared with, and the path every device has.
Mathematics: AdafacMLPLOpt and HyperV2 of google/learned_optimization
(learned_opts/adafac_mlp_lopt.py, research/general_lopt/hyper_v2.py). All functions are pure per
shard: they add partial sums of the local elements, and never ask where the other elements are.

Legend: K = 3 decays, N local elements, R and C lengths of the row and column factors, n elements of
the whole tensor. d0 is averaged away in `row`, d1 in `col`. F features, H hidden units and O
outputs of the network. M elements of a chunk; S its dims (`box.sizes`); L those dims in front that
are normalised index by index (`FeatureSet.lead`: none, or all but the last two), and E the elements
of a chunk at one such index. B matrices at a time. `x_FS` has the axes (F, *S).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.requests import NONFINITE, SQUARES
from ..core.shards import Box, Shape, TensorShard, drop_dim
from ..core.state import state_dtype
from .rounding import Draw, Rounding

Dims = tuple[int, int] | None

# Elements per chunk: on a CPU the features of a chunk stay in the second-level cache, on a GPU a
# chunk fills the device. Either way the scratch of a chunk (about 120 numbers per element) stays
# below 256 MB.
CHUNK_CPU = 16384
CHUNK_GPU = 1 << 18
# the same where there are a dozen numbers per element instead of 120
PART_CPU = 1 << 15
PART_GPU = 1 << 22

# A matrix product rounds a column differently when there are few or oddly many of them. Blocks are
# padded to a multiple of this, so that an element's network outputs do not depend on where its
# tensor was cut.
COLUMNS = 16

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 1e4, 3e4, 1e5)
NUM_MOMENTS = 9  # what `moment_sums` adds up
# of the random bits that state is rounded with: three momenta and the mean square; AdamW's moments
M_SLOT, V_SLOT = 0, 3
MEAN_SLOT, SQUARE_SLOT = 0, 1

# Each epsilon once, as in the reference.
EPS_SQUARE = 1e-30  # added to g^2 before it enters a factor
EPS_FACTOR = 1e-9  # floor of safe_rsqrt, and added to the row mean and to D
EPS_RMS = 1e-6  # rsqrt(v + .)
EPS_FEATURE = 1e-8  # rsqrt of a factor as a feature
EPS_NORMALISE = 1e-5  # rsqrt(mean x^2 + .)


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Which features a rule's network reads, and where they lie.

    In order: g, [clip(g, -0.1, 0.1)], p, m x3, v, m q x3, q, F(g) x3, [g q], row x3, col x3,
    rsqrt(row) x3, rsqrt(col) x3, F(m) x3, with q = rsqrt(v + eps). Those in brackets only where
    `extended`. Below two dims row and col are both D.

    Attributes:
        extended: 30 features (VeLO) instead of 28 (small_fc).
        eps_diag: added to D in the feature m_k * rsqrt(D_k + .) of tensors below two dims.
        eps_rms: added to v in q.
        clamp: the gradient is clamped to this absolute value before it is used, or None.
        per_matrix: features are normalised over the last two dims, one set of sums per index of the
            others (the `lead`), instead of over the whole tensor.
        eps_normalise: added to the mean square that a feature is divided by the root of.
    """

    extended: bool
    eps_diag: float
    eps_rms: float = EPS_RMS
    clamp: float | None = None
    per_matrix: bool = False
    eps_normalise: float = EPS_NORMALISE

    def lead(self, shape: Shape) -> Shape:
        """The dims that have a normalisation each."""
        return shape[:-2] if self.per_matrix else ()

    @property
    def p(self) -> int:
        return 1 + self.extended

    @property
    def row(self) -> int:
        """The first of the four row and column features, which need no sums: the factors are
        replicated.
        """
        return 13 + 2 * self.extended

    @property
    def num(self) -> int:
        return self.row + 15

    def num_sums(self, dims: Dims) -> int:
        """Sums of squares that pass B makes: all features but those of a row or column, below two
        dims each of them once.

        One such set for every index of the lead.
        """
        return self.row + 3 if dims is not None else self.row + 9


SMALL_FC = FeatureSet(extended=False, eps_diag=1e-6)
VELO = FeatureSet(extended=True, eps_diag=0.0, clamp=1000.0)
CELO2 = FeatureSet(
    extended=True, eps_diag=0.0, eps_rms=1e-8, clamp=1000.0, per_matrix=True, eps_normalise=1e-9
)
CLIPPED_GRADIENT = 0.1  # bound of the feature clip(g)


def safe_rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(max(x, 1e-9))."""
    return x.clamp_min(EPS_FACTOR).rsqrt()


def chunks(shard: TensorShard, device: torch.device) -> Iterator[Box]:
    """The local elements as blocks of bounded size, in local order."""
    size = CHUNK_CPU if device.type == "cpu" else CHUNK_GPU
    for box in shard.boxes():
        yield from box.split(size)


def part_size(device: torch.device) -> int:
    """How many elements at a time where there are a dozen numbers per element."""
    return PART_CPU if device.type == "cpu" else PART_GPU


def parts(flat: Tensor) -> Iterator[slice]:
    """The last dim in slices of bounded size, for work of a dozen numbers per element that needs no
    shape.
    """
    most = part_size(flat.device)
    for first in range(0, flat.shape[-1], most):
        yield slice(first, first + most)


class Scratch:
    """Reused memory for chunks, grown on demand; one per rule, so that a step allocates nothing
    large.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __deepcopy__(self, memo: object) -> Scratch:
        return Scratch()

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()

    def take(
        self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """An uninitialised block of rows x (columns, rounded up to COLUMNS), valid until `name` is
        taken again.
        """
        columns = -(-columns // COLUMNS) * COLUMNS
        key = (name, dtype, device)
        block = self._blocks.get(key)
        if block is None or block.numel() < rows * columns:
            block = self._blocks[key] = torch.empty(rows * columns, dtype=dtype, device=device)
        return block[: rows * columns].view(rows, columns)


# ------------------------------------------------------------------------------------------- pass A


def num_gradient_sums(shape: Shape, dims: Dims) -> int:
    """How many sums pass A makes for a tensor: the lengths of its row and column factors."""
    if dims is None:
        return 0
    return math.prod(drop_dim(shape, dims[1])) + math.prod(drop_dim(shape, dims[0]))


def split_gradient_sums(sums: Tensor, shape: Shape, dims: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The vector of pass A as (sum over d0 of g^2, shape without d0) and (sum over d1 of g^2, shape
    without d1).
    """
    d1, d0 = dims
    row_shape, col_shape = drop_dim(shape, d0), drop_dim(shape, d1)
    row, col = sums.split([math.prod(row_shape), math.prod(col_shape)])
    return row.view(row_shape), col.view(col_shape)


def gradient_sums(
    grad: Tensor,
    shard: TensorShard,
    dims: Dims,
    sums: Tensor,
    audit: Tensor,
    clamp: float | None = None,
    replace: bool = False,
    bounded: bool = True,
) -> None:
    """Pass A: add the local part of the row and column sums of g^2, its total, and the count of
    non-finite entries.

    Squares are taken in float64, where neither the largest nor the smallest float32 gradient leaves
    the range. The row and column sums are of the gradient clamped to `clamp`. With `replace` NaN
    and inf are counted, and then taken as 0 and the largest number.

    Args:
        grad: (N,) raw gradient.
        bounded: whether clipping or clamping keeps entries small; otherwise those whose square the
            state cannot hold count as non-finite too, since they would make it so.
        sums: float64 (R + C,), see `split_gradient_sums` (modified in place).
        audit: float64 gradient audit (modified in place).
    """
    wide = state_dtype(grad.dtype)  # in 16 bits the limit would be inf
    largest = torch.finfo(wide).max
    limit = largest if bounded else math.sqrt(largest)
    for box in chunks(shard, grad.device):
        g = box.view(grad)
        audit[NONFINITE] += (g.to(wide).abs() <= limit).logical_not_().sum()
        g = g.nan_to_num() if replace else g
        square = g.to(torch.float64).square()
        audit[SQUARES] += square.sum()
        if dims is None:
            continue
        if clamp is not None:
            square.clamp_(max=clamp * clamp)
        d1, d0 = dims
        row, col = split_gradient_sums(sums, shard.shape, dims)
        box.window(row, d0).add_(square.sum(d0, keepdim=True))
        box.window(col, d1).add_(square.sum(d1, keepdim=True))


def moment_sums(value: Tensor, momentum: Tensor, rms: Tensor, sums: Tensor) -> None:
    """Add the local parts of p^2, m_k, m_k^2, v and v^2 (`sums` float64 (NUM_MOMENTS,), modified in
    place).
    """
    for part in parts(value):
        p, m, v = (x[..., part].to(torch.float64) for x in (value, momentum, rms))
        sums += torch.cat([(p @ p)[None], m.sum(1), (m * m).sum(1), v.sum()[None], (v @ v)[None]])


# ------------------------------------------------------------------------------- between A and B


@dataclass(slots=True)
class Decay:
    """Decays of exponential moving averages, x <- old x + new y, each (K,).

    `new` is 1 - old, taken in float64: in float32 it would be off by a relative 3e-8 / (1 - old),
    3e-5 for 0.999.
    """

    old: Tensor
    new: Tensor

    @classmethod
    def of(cls, decays: Sequence[float], dtype: torch.dtype, device: torch.device) -> Decay:
        """In this dtype, on this device."""
        old, new = (
            torch.tensor(values, dtype=dtype, device=device)
            for values in (decays, [1.0 - decay for decay in decays])
        )
        return cls(old, new)

    def over(self, box: Box) -> tuple[Tensor, Tensor]:
        """(old, new), shaped (K, 1, ..., 1) over the dims of a block."""
        lead = (-1, *(1 for _ in box.sizes))
        return self.old.view(lead), self.new.view(lead)


@dataclass(slots=True)
class Factors:
    """The updated row and column factors of one tensor and what the passes read of them, each (K,
    ...), replicated.

    row, col: Adafactor accumulators; row_scale, col_scale: F_k(x) = x * row_scale * col_scale;
    row_rsqrt, col_rsqrt: the features rsqrt(row + 1e-8), rsqrt(col + 1e-8).
    """

    row: Tensor
    col: Tensor
    row_scale: Tensor
    col_scale: Tensor
    row_rsqrt: Tensor
    col_rsqrt: Tensor


def update_factors(
    row: Tensor,
    col: Tensor,
    sums: Tensor,
    shape: Shape,
    dims: tuple[int, int],
    decays: Decay,
    scale: Tensor,
    moves: Tensor,
) -> Factors:
    """EMA of the row and column means of g^2 (`row` and `col` are modified in place, if `moves`).

    Args:
        row, col: (K, R) and (K, C).
        sums: the global sums of pass A; gradients count as multiplied by `scale` (float64 0-d).
        decays: float64.
        moves: bool 0-d.
    """
    d1, d0 = dims
    row_sum, col_sum = split_gradient_sums(sums, shape, dims)
    for state, total, size in ((row, row_sum, shape[d0]), (col, col_sum, shape[d1])):
        # state_k <- c_k state_k + (1 - c_k) (mean g^2 + 1e-30)
        mean = total.flatten() * (scale * scale / size) + EPS_SQUARE
        commit(state, torch.addcmul(decays.old[:, None] * state, decays.new[:, None], mean), moves)
    # (K, *shape without d0) and (K, *shape without d1)
    row_nd, col_nd = row.view(-1, *drop_dim(shape, d0)), col.view(-1, *drop_dim(shape, d1))
    d1_in_row = 1 + (d1 if d1 < d0 else d1 - 1)
    row_mean = row_nd.mean(d1_in_row, keepdim=True, dtype=torch.float64).to(row.dtype)
    return Factors(
        row=row_nd,
        col=col_nd,
        row_scale=safe_rsqrt(row_nd / (row_mean + EPS_FACTOR)),
        col_scale=safe_rsqrt(col_nd),
        row_rsqrt=(row_nd + EPS_FEATURE).rsqrt(),
        col_rsqrt=(col_nd + EPS_FEATURE).rsqrt(),
    )


def commit(target: Tensor, new: Tensor, moves: Tensor) -> None:
    """target <- new where `moves` is true, without asking the host (`target` is modified in place).

    Args:
        moves: bool 0-d, or of a shape that broadcasts to that of `target`.
    """
    target.copy_(torch.where(moves, new.to(target.dtype), target))


# ----------------------------------------------------------------------------------- passes B and C


@dataclass(slots=True)
class StepTensors:
    """What passes B and C read and write of one tensor; all element tensors are local.

    value (N,), grad (N,); momentum (K, N), rms (N,), diag (K, N) or None; factors or None; scale
    float64 0-d or None when nothing is clipped; moves bool 0-d; rounding where momentum and rms are
    bfloat16, which the arithmetic never is.
    """

    features: FeatureSet
    shard: TensorShard
    dims: Dims
    value: Tensor
    grad: Tensor
    momentum: Tensor
    rms: Tensor
    diag: Tensor | None
    factors: Factors | None
    scale: Tensor | None
    moves: Tensor
    momentum_decay: Decay
    rms_decay: float
    diag_decay: Decay
    rounding: Rounding | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return state_dtype(self.value.dtype)


def _fill_features(x_FM: Tensor, box: Box, t: StepTensors, with_factors: bool) -> None:
    """Write the features of a block into `x_FM` (modified in place).

    Without `with_factors` the 12 features that depend on a row or column alone are left as they are
    (below two dims: their 6 copies).
    """
    f = t.features
    x_FS = x_FM.view(f.num, *box.sizes)
    # views (*S) of single features, and (K, *S) of those that there is one of for every decay
    g, p, v, q = x_FS[0], x_FS[f.p], x_FS[f.p + 4], x_FS[f.p + 8]
    m, mq, factored_g = (x_FS[f.p + first : f.p + first + 3] for first in (1, 5, 9))
    row, col, row_rsqrt, col_rsqrt = (
        x_FS[f.row + first : f.row + first + 3] for first in (0, 3, 6, 9)
    )
    factored_m = x_FS[f.row + 12 :]
    g.copy_(box.view(t.grad))
    if t.scale is not None:
        g.mul_(t.scale.to(g.dtype))
    if f.clamp is not None:
        g.clamp_(-f.clamp, f.clamp)
    p.copy_(box.view(t.value))
    # m_k <- a_k m_k + (1 - a_k) g
    old, new = t.momentum_decay.over(box)
    torch.mul(box.view(t.momentum).to(m.dtype), old, out=m)
    m.addcmul_(new, g)
    # v <- b v + (1 - b) g^2
    torch.mul(box.view(t.rms).to(v.dtype), t.rms_decay, out=v)
    v.addcmul_(g, g, value=1.0 - t.rms_decay)
    # q = 1 / sqrt(v + eps)
    torch.add(v, f.eps_rms, out=q).rsqrt_()
    torch.mul(m, q, out=mq)
    if f.extended:
        torch.clamp(g, -CLIPPED_GRADIENT, CLIPPED_GRADIENT, out=x_FS[1])
        torch.mul(g, q, out=x_FS[f.row - 1])
    if t.factors is not None and t.dims is not None:
        d1, d0 = t.dims
        factors = t.factors
        # F_k(x) = x * row_scale_k * col_scale_k
        torch.mul(
            box.window(factors.row_scale, d0), box.window(factors.col_scale, d1), out=factored_g
        )
        torch.mul(m, factored_g, out=factored_m)
        factored_g.mul_(g)
        if with_factors:
            row.copy_(box.window(factors.row, d0))
            col.copy_(box.window(factors.col, d1))
            row_rsqrt.copy_(box.window(factors.row_rsqrt, d0))
            col_rsqrt.copy_(box.window(factors.col_rsqrt, d1))
        return
    assert t.diag is not None
    # D_k <- c_k D_k + (1 - c_k) (g^2 + 1e-30)
    old, new = t.diag_decay.over(box)
    torch.mul(box.view(t.diag), old, out=row)
    row.addcmul_(new, g.square().add_(EPS_SQUARE))
    torch.mul(g, safe_rsqrt(row + EPS_FACTOR), out=factored_g)
    torch.mul(m, (row + f.eps_diag).rsqrt_(), out=factored_m)
    torch.add(row, EPS_FEATURE, out=row_rsqrt).rsqrt_()
    if with_factors:
        col.copy_(row)
        col_rsqrt.copy_(row_rsqrt)


def feature_sums(t: StepTensors, sums: Tensor, scratch: Scratch) -> None:
    """Pass B: add the local sums of squares of the element features. Reads state, writes none of
    it.

    Args:
        sums: float64 (features.num_sums(dims) * indices of the lead,), in the order of the features
            (modified in place).
    """
    row, lead = t.features.row, t.features.lead(t.shard.shape)
    sums_FL = sums.view(t.features.num_sums(t.dims), *lead)
    for box in chunks(t.shard, t.value.device):
        padded = scratch.take("features", t.features.num, box.numel, t.dtype, t.value.device)
        x_FM = padded[:, : box.numel]
        _fill_features(x_FM, box, t, with_factors=False)
        x_FLE = x_FM.view(len(x_FM), *box.sizes[: len(lead)], -1)
        own = (
            (x_FLE[:row], x_FLE[row + 12 :])
            if t.factors is not None
            else (x_FLE[: row + 3], x_FLE[row + 6 : row + 9], x_FLE[row + 12 :])
        )
        lead_part(sums_FL, box, len(lead)).add_(torch.cat([square_sums(some) for some in own]))


def square_sums(x: Tensor) -> Tensor:
    """Float64 sums of squares over the last dim."""
    x = x.to(torch.float64)
    return torch.sum(x * x, dim=-1)


def lead_part(per_lead: Tensor, box: Box, lead_dims: int) -> Tensor:
    """View of (features, *lead) on the part of the lead that a block spans."""
    for dim in range(lead_dims):
        per_lead = per_lead.narrow(1 + dim, box.offsets[dim], box.sizes[dim])
    return per_lead


def normalisers(t: StepTensors, sums: Tensor) -> Tensor:
    """1 / sqrt(mean x^2 + eps) of all features, (features.num, *lead), from the global sums of B.

    The features that depend on a row or column alone need no communication: the factors are
    replicated.
    """
    row, shape = t.features.row, t.shard.shape
    lead = t.features.lead(shape)
    sums_FL = sums.view(-1, *lead)
    squares_FL = torch.empty((t.features.num, *lead), dtype=torch.float64, device=sums.device)
    squares_FL[:row] = sums_FL[:row]
    squares_FL[row + 12 :] = sums_FL[-3:]
    if t.factors is not None and t.dims is not None:
        d1, d0 = t.dims
        f = t.factors
        for first, factor, dim in (
            (0, f.row, d0),
            (3, f.col, d1),
            (6, f.row_rsqrt, d0),
            (9, f.col_rsqrt, d1),
        ):
            squares_FL[row + first : row + first + 3] = _factor_square_sums(
                factor, dim, shape, len(lead)
            )
    else:
        diag_FL, diag_rsqrt_FL = sums_FL[row : row + 3], sums_FL[row + 3 : row + 6]
        squares_FL[row : row + 3] = squares_FL[row + 3 : row + 6] = diag_FL
        squares_FL[row + 6 : row + 9] = squares_FL[row + 9 : row + 12] = diag_rsqrt_FL
    mean_FL = squares_FL / math.prod(shape[len(lead) :])
    return (mean_FL + t.features.eps_normalise).rsqrt_().to(t.dtype)


def _factor_square_sums(factor: Tensor, dropped: int, shape: Shape, lead_dims: int) -> Tensor:
    """Float64 (K, *lead): sums over the other dims of the squares of a factor (K, *shape without
    `dropped`), as if it were broadcast over the whole tensor.
    """
    square = factor.to(torch.float64).square()
    square_KL = square.unsqueeze(1 + dropped).flatten(1 + lead_dims).sum(-1)
    if dropped >= lead_dims:
        return square_KL * shape[dropped]
    return square_KL.expand(-1, *shape[:lead_dims])


@dataclass(slots=True)
class Network:
    """An MLP with two hidden layers: input_weight (H, F), hidden_weight (H, H), output_weight (O,
    H), biases as columns.
    """

    input_weight: Tensor
    input_bias: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor


def time_features(step: Tensor, scales: Sequence[float] | Tensor = TIME_SCALES) -> Tensor:
    """tanh(t / tau - 1) for the eleven tau, float32 as in the reference; `step` is the number of
    steps taken before.
    """
    tau = torch.as_tensor(scales, dtype=torch.float32, device=step.device)
    return torch.tanh(step.to(torch.float32) / tau - 1.0)


def network_outputs(
    t: StepTensors, feature_scale: Tensor, network: Network, scratch: Scratch
) -> Iterator[tuple[Box, Tensor, Tensor]]:
    """Pass C up to the network: its first two outputs for every block, each in the shape of the
    block.

    Writes the new momentum, rms and diag as it goes (modified in place, if `t.moves`).

    Args:
        feature_scale: (features.num, *lead), see `normalisers`.
    """
    hidden, num = network.hidden_weight.shape[0], t.features.num
    dtype, device = t.dtype, t.value.device
    lead_dims = feature_scale.dim() - 1
    for box in chunks(t.shard, device):
        padded = scratch.take("features", num, box.numel, dtype, device)
        x_FM = padded[:, : box.numel]
        _fill_features(x_FM, box, t, with_factors=True)
        x_FS, m = x_FM.view(num, *box.sizes), t.features.p + 1
        new_m, new_v = x_FS[m : m + 3], x_FS[m + 3]
        if t.rounding is not None:
            index = box.indices(t.shard.shape, device)
            draw = t.rounding.of_elements(index, t.shard.global_numel)
            new_m, new_v = draw.rounded(new_m, M_SLOT), draw.rounded(new_v, V_SLOT)
        commit(box.view(t.momentum), new_m, t.moves)
        commit(box.view(t.rms), new_v, t.moves)
        if t.diag is not None:
            commit(box.view(t.diag), x_FS[t.features.row : t.features.row + 3], t.moves)
        x_FLE = x_FM.view(num, *box.sizes[:lead_dims], -1)
        x_FLE.mul_(lead_part(feature_scale, box, lead_dims).unsqueeze(-1))
        h1 = scratch.take("hidden1", hidden, box.numel, dtype, device)
        h2 = scratch.take("hidden2", hidden, box.numel, dtype, device)
        torch.mm(network.input_weight, padded, out=h1).add_(network.input_bias).relu_()
        torch.mm(network.hidden_weight, h1, out=h2).add_(network.hidden_bias).relu_()
        out = torch.mm(network.output_weight, h2).add_(network.output_bias)[:, : box.numel]
        yield box, out[0].view(box.sizes), out[1].view(box.sizes)


def apply_update(
    t: StepTensors,
    feature_scale: Tensor,
    network: Network,
    step_size: float | Tensor,
    exp_mult: float,
    update_squares: Tensor,
    scratch: Scratch,
    decay_before: float | Tensor = 0.0,
    decay_after: float | Tensor = 0.0,
) -> None:
    """Pass C: features, network, and the new state and value (all modified in place, if `t.moves`).

    p <- p - step_size * o0 * exp(exp_mult * o1) - decay_before * p, then p <- p - decay_after * p.

    Args:
        feature_scale: (features.num,), see `normalisers`.
        update_squares: float64 0-d, receives the sum of (p_new - p)^2 over the local elements
            (modified in place).
    """
    update_squares.zero_()
    dtype = t.dtype
    step_size, decay_before, decay_after = (
        in_dtype(x, dtype) for x in (step_size, decay_before, decay_after)
    )
    for box, direction, magnitude in network_outputs(t, feature_scale, network, scratch):
        update = direction * (exp_mult * magnitude).exp_() * step_size
        value = box.view(t.value)
        old = value.to(update.dtype, copy=True)
        new = old - update - decay_before * old
        move(value, old, new - decay_after * new, t.moves, update_squares)


def adamw(
    value: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    lr: float | Tensor,
    weight_decay: float,
    scale: Tensor | None,
    moves: Tensor,
    update_squares: Tensor,
    eps_root: float = 0.0,
    clamp: float | None = None,
    decay_after: float | Tensor = 0.0,
    draw_of: Callable[[slice], Draw] | None = None,
) -> None:
    """AdamW of some tensors: p <- p - lr (m^ / (sqrt(v^ + eps_root) + eps) + weight_decay p), both
    moments divided by 1 - beta^step; then p <- p - decay_after p.

    Args:
        value, grad, mean, square: (tensors, N) (all but `grad` modified in place, in the rows where
            `moves` is true).
        step: number of this step, the first is 1; 0-d, or (tensors, 1).
        scale: what clipping multiplies each gradient by, (tensors, 1), or None.
        clamp: the gradient is clamped to this absolute value after that, or None.
        moves: bool (tensors, 1).
        update_squares: float64 (tensors,), see `move_rows` (modified in place).
        draw_of: where `mean` and `square` are bfloat16, what elements of (tensors, N) are rounded
            with.
    """
    beta_1, beta_2 = betas
    step, dtype = step.to(torch.float64), state_dtype(value.dtype)
    correction_1, correction_2 = ((1.0 - beta**step).to(dtype) for beta in betas)
    lr, decay_after = (in_dtype(x, dtype) for x in (lr, decay_after))
    for part in parts(value):
        old = value[:, part].to(dtype, copy=True)
        g = grad[:, part].to(dtype)
        g = g if scale is None else g * scale.to(g.dtype)
        g = g if clamp is None else g.clamp(-clamp, clamp)
        m = mean[:, part].to(dtype) * beta_1 + g * (1.0 - beta_1)
        v = square[:, part].to(dtype) * beta_2 + g * g * (1.0 - beta_2)
        new_m, new_v = m, v
        if draw_of is not None:
            draw = draw_of(part)
            new_m, new_v = draw.rounded(m, MEAN_SLOT), draw.rounded(v, SQUARE_SLOT)
        commit(mean[:, part], new_m, moves)
        commit(square[:, part], new_v, moves)
        square_root = (v / correction_2).add_(eps_root).sqrt_()
        change = (m / correction_1) / (square_root + eps)
        new = old - lr * (change + weight_decay * old)
        if isinstance(decay_after, Tensor) or decay_after:
            new = new - decay_after * new
        move_rows(value[:, part], old, new, moves, update_squares)


def newton_schulz(
    x_BRC: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float
) -> Tensor:
    """About the nearest orthogonal matrix of every matrix in `x_BRC` (..., R, C): singular values
    driven towards 1.

    X <- X / (|X| + eps), then `iterations` times X <- c0 X + (c1 A + c2 A A) X with A = X X^T; X on
    its side if it is tall.
    """
    c0, c1, c2 = coefficients
    shape, tall = x_BRC.shape, x_BRC.shape[-2] > x_BRC.shape[-1]
    x_BRC = x_BRC.reshape(-1, *shape[-2:])
    x_BRC = x_BRC / (torch.linalg.norm(x_BRC, dim=(-2, -1), keepdim=True) + eps)
    for _ in range(iterations):
        # A and P = c1 A + c2 A A: (B, C, C) of tall matrices, else (B, R, R)
        a = x_BRC.mT @ x_BRC if tall else x_BRC @ x_BRC.mT
        p = torch.baddbmm(a, a, a, beta=c1, alpha=c2)
        x_BRC = (
            torch.baddbmm(x_BRC, x_BRC, p, beta=c0)
            if tall
            else torch.baddbmm(x_BRC, p, x_BRC, beta=c0)
        )
    return x_BRC.view(shape)


def wide(value: float | Tensor) -> float | Tensor:
    """A hyperparameter that may be a tensor, in float64: its products are then those of a float."""
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def in_dtype(x: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A number in the dtype of the arithmetic; a 0-d tensor would promote a 0-d parameter, where a
    float does not.
    """
    return x.to(dtype) if isinstance(x, Tensor) else x


def move(value: Tensor, old: Tensor, new: Tensor, moves: Tensor, update_squares: Tensor) -> None:
    """value <- new if `moves` (bool 0-d), and the square of the change is counted (`value`,
    `update_squares` modified in place).
    """
    commit(value, new, moves)
    update_squares += torch.where(moves, (new - old).to(torch.float64).square_().sum(), 0.0)


def move_rows(
    value: Tensor, old: Tensor, new: Tensor, moves: Tensor, update_squares: Tensor
) -> None:
    """As `move` for every row of (tensors, N), with `moves` (tensors, 1) and `update_squares`
    (tensors,).
    """
    commit(value, new, moves)
    update_squares += torch.where(moves[:, 0], (new - old).to(torch.float64).square().sum(-1), 0.0)
