"""The Python face of the compiled passes: finds the built libraries and makes the tables they read.
Writes what the passes write.

`Kernels` are the passes over a batch that they serve (`servable`); `reference.py` serves all
others. Which tensors an operator reads and modifies is in csrc/README.md; the tables (`Item`,
`Box`) are those of csrc/include/pylo_dist/geometry.h.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import trace
from ..core.requests import Sum
from ..core.rule import Batch, Item
from ..core.shards import Box, Shape, drop_dim
from .reference import NUM_MOMENTS, FeatureSet, Network

MAX_DIMS = 5
# (extended features, hidden units) that there are kernels for
HIDDEN = {
    (False, 32),
    (True, 8),
    (True, 4),
}
PRECISION = {"highest": 0, "high": 1, "medium": 2}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("pylo_dist")
_enabled = True


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Inside, compiled passes are used (where they serve) or not. For tests and benchmarks; alike
    on all ranks.
    """
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


@cache
def library(device_type: str) -> str:
    """Load the library for "cpu" or "cuda" and give "" or, where there is none, why not."""
    if device_type == "cuda":
        if library("cpu"):
            return library("cpu")
        if not torch.cuda.is_available():
            return "no CUDA device"
    found = sorted(Path(__file__).parents[1].glob(f"_kernels_{device_type}.*"))
    if not found:
        return f"the {device_type} extension was not built (pip install --no-build-isolation with a compiler builds it)"
    try:
        torch.ops.load_library(found[-1])
    except OSError as error:
        return f"{found[-1].name} cannot be loaded: {error.__cause__ or error}"
    if device_type == "cpu":
        _register_fakes()
    return ""


def _register_fakes() -> None:
    for name in ("gradient_pass", "moment_pass", "feature_pass", "update_pass"):
        torch.library.register_fake(f"pylo_dist::{name}", lambda *args: None)
    torch.library.register_fake("pylo_dist::workspace_sizes", lambda items, boxes, like: [])


@cache
def _say_once(device_type: str, reason: str) -> None:
    _log.warning("pure PyTorch path on %s: %s", device_type, reason)


def paths() -> list[str]:
    """Which path every kind of device takes, for `doctor`."""
    lines = []
    for device_type in ("cpu", "cuda"):
        reason = library(device_type)
        if reason:
            lines.append(f"{device_type}: plain PyTorch ({reason})")
        elif device_type == "cpu":
            lines.append(
                "cpu: compiled kernels, instruction set "
                f"{torch.ops.pylo_dist.instruction_set('auto')}"
            )
        else:
            lines.append(f"cuda: compiled kernels for {torch.ops.pylo_dist.cuda_architectures()}")
    return lines


# ------------------------------------------------------------------------------------------- tables


def _strides(shape: Shape, dropped: int | None) -> list[int]:
    """C-order strides of a vector of `shape` without dim `dropped`, 0 along it."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        if dim != dropped:
            strides[dim] = step
            step *= shape[dim]
    return strides


def _box_row(
    i: int, box: Box, shape: Shape, dims: tuple[int, int] | None, lead_dims: int
) -> list[int] | None:
    """A block as a row of the table; None if it has too many dims."""
    none = [0] * len(shape)
    row, col = (
        (none, none) if dims is None else (_strides(shape, dims[1]), _strides(shape, dims[0]))
    )
    lead = _strides(shape[:lead_dims], None) + [0] * (len(shape) - lead_dims)
    at = [
        sum(o * s for o, s in zip(box.offsets, strides, strict=True))
        for strides in (row, col, lead)
    ]
    merged: list[tuple[int, list[int]]] = []  # innermost first
    for dim in reversed(range(len(shape))):
        size, steps = box.sizes[dim], [box.local_strides[dim], row[dim], col[dim], lead[dim]]
        if size == 1:
            continue
        if merged and steps == [merged[-1][0] * step for step in merged[-1][1]]:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, steps))
    if not merged or merged[0][1][0] != 1:
        merged.insert(0, (1, [1, 0, 0, 0]))
    if len(merged) > MAX_DIMS:
        return None
    merged += [(1, [0, 0, 0, 0])] * (MAX_DIMS - len(merged))
    merged.reverse()
    return [
        i,
        *(size for size, _ in merged),
        *(steps[k] for k in range(4) for _, steps in merged),
        box.local_offset,
        *at,
    ]


def _item_row(
    item: Item,
    features: FeatureSet,
    factors_at: int,
    squares_at: int,
    a: list[int],
    b: list[int],
    boxes: tuple[int, int],
) -> list[int]:
    """A tensor as a row of the table."""
    shape, dims = item.param.shard.shape, item.dims if "row" in item.state else None
    lead = features.lead(shape) if "momentum" in item.state else ()
    rows = cols = row_outer = row_inner = size_d0 = size_d1 = vector_is_row = 0
    lead_table, matrix_table = [1, 1, 1, *[0] * 6], [1, 1, 0, 0, 0, 0]
    if dims is not None:
        d1, d0 = dims
        row_shape, d1_in_row = drop_dim(shape, d0), d1 - (d0 < d1)
        rows, cols, size_d0, size_d1 = (
            math.prod(row_shape),
            math.prod(drop_dim(shape, d1)),
            shape[d0],
            shape[d1],
        )
        row_outer, row_inner = (
            math.prod(row_shape[:d1_in_row]),
            math.prod(row_shape[d1_in_row + 1 :]),
        )
        vector_is_row = int(
            next((dim for dim in reversed(range(len(shape))) if shape[dim] > 1), d0) == d1
        )
        if lead:
            row, col = _strides(shape, d0), _strides(shape, d1)
            pad = [0] * (MAX_DIMS - 2 - len(lead))
            lead_table = [*[1] * len(pad), *lead, *pad, *row[:-2], *pad, *col[:-2]]
            matrix_table = [*shape[-2:], *row[-2:], *col[-2:]]
    numel, global_numel, leads = item.param.shard.numel, math.prod(shape), math.prod(lead)
    return [
        *(
            numel,
            global_numel,
            int(dims is not None),
            rows,
            cols,
            size_d0,
            size_d1,
            row_outer,
            row_inner,
            vector_is_row,
        ),
        *(leads, global_numel // leads, *lead_table, *matrix_table, factors_at, squares_at),
        *(a[0], a[1], a[2] + a[3], *b, *boxes),
    ]


def _places(request: Sum) -> list[tuple[int, int, int]]:
    """Of every item: the number of its buffer, and where in it audit and vector begin."""
    places = [(0, 0, 0)] * len(request.vectors)
    for number, packed in enumerate(request.buffers):
        for i in packed.members:
            places[i] = (
                number,
                int(request.audits[i].storage_offset()),
                int(request.vectors[i].storage_offset()),
            )
    return places


@dataclass(slots=True)
class Updates:
    """How pass C moves the tensors of a batch, see `reference.apply_update`.

    networks: float32 (number, size), see `packed`; network_of: int64 (items,); steps: float32
    (items, 4): step_size, exp_mult, decay_before, decay_after.
    """

    networks: Tensor
    network_of: Tensor
    steps: Tensor


def packed(network: Network) -> Tensor:
    """A network as the kernels read it, 1-D: the third output is left out."""
    n = network
    parts = (
        n.input_weight,
        n.input_bias,
        n.hidden_weight,
        n.hidden_bias,
        n.output_weight[:2],
        n.output_bias[:2],
    )
    return torch.cat([part.reshape(-1) for part in parts])


class Kernels:
    """The compiled passes over one batch: its tables, made once, and the calls. All sums and states
    are modified in place.

    Args:
        features, decays: of the rule; decays are (momentum x3, rms, factor x3).
        hidden: hidden units of its network.
        a, b: the requests of the first two phases.
        extra: how many sums of a tensor's own lie in front of its vector in `a`, per item.
        moments: whether the nine sums of `reference.moment_sums` lie in front of the features' in
            the vectors of `b`.
    """

    def __init__(
        self,
        batch: Batch,
        features: FeatureSet,
        decays: Sequence[float],
        hidden: int,
        a: Sum,
        b: Sum,
        extra: Sequence[int],
        moments: bool,
    ) -> None:
        self.features, self.hidden = features, hidden
        clamp = math.inf if features.clamp is None else features.clamp
        self.rule = [*decays, features.eps_diag, features.eps_rms, features.eps_normalise, clamp]
        item_rows: list[list[int]] = []
        box_rows: list[list[int] | None] = []
        factors = squares = 0
        for i, (item, a_at, b_at) in enumerate(
            zip(batch.items, _places(a), _places(b), strict=True)
        ):
            shard = item.param.shard
            dims = item.dims if "row" in item.state else None
            lead_dims = len(features.lead(shard.shape)) if "momentum" in item.state else 0
            first = len(box_rows)
            box_rows += [_box_row(i, box, shard.shape, dims, lead_dims) for box in shard.boxes()]
            boxes = (first, len(box_rows) - first)
            moments_at, features_at = (b_at[2], b_at[2] + NUM_MOMENTS) if moments else (-1, b_at[2])
            b_places = [b_at[0], features_at, moments_at]
            row = _item_row(item, features, factors, squares, [*a_at, extra[i]], b_places, boxes)
            item_rows.append(row)
            factors += 6 * (row[3] + row[4])
            squares += 12 * row[10] if dims is not None else 0
        self.served = all(row is not None for row in box_rows) and len(item_rows) > 0
        if not self.served:
            return
        self.items = torch.tensor(item_rows, dtype=torch.int64)
        self.boxes = torch.tensor([row or [] for row in box_rows], dtype=torch.int64).view(
            len(box_rows), 30
        )
        device = batch.device
        self.factors = torch.empty(factors, dtype=torch.float32, device=device)
        self.squares = torch.empty(squares, dtype=torch.float64, device=device)
        nothing = [torch.empty(0, device=device) for _ in range(3)]
        states = [item.state for item in batch.items]
        self.momentum = [state.get("momentum", nothing[0]) for state in states]
        self.rms = [state.get("rms", nothing[1]) for state in states]
        self.row_or_diag = [state.get("row", state.get("diag", nothing[2])) for state in states]
        self.col = [state.get("col", torch.empty(0, device=device)) for state in states]
        self.a = [packed.buffer for packed in a.buffers]
        self.b = [packed.buffer for packed in b.buffers]
        sizes = torch.ops.pylo_dist.workspace_sizes(self.items, self.boxes, self.squares)
        self.workspace = [
            torch.zeros(
                size,
                dtype=torch.uint8,
                device="cpu" if pinned else device,
                pin_memory=pinned and device.type == "cuda",
            )
            for size, pinned in zip(sizes, (False, True, *[False] * len(sizes)), strict=False)
        ]

    @trace.phased("kernels: gradient_pass")
    def gradient_pass(
        self,
        batch: Batch,
        indices: Sequence[int],
        limits: Sequence[tuple[float, float]],
        replace: bool,
    ) -> None:
        """Pass A of some items; limits: per item of the batch the largest |g| that counts as finite
        and the clamp.
        """
        table = batch.on_device("limits", tuple(limits), torch.float64)
        grads = [batch.items[i].param.grad for i in indices]
        args = (
            self.items,
            self.boxes,
            list(indices),
            grads,
            table,
            replace,
            self.a,
            self.workspace,
        )
        torch.ops.pylo_dist.gradient_pass(*args)

    @trace.phased("kernels: moment_pass")
    def moment_pass(self, batch: Batch, indices: Sequence[int]) -> None:
        """The nine sums of VeLO's tensors for items that pass B leaves out."""
        values = [item.param.value for item in batch.items]
        args = (
            self.items,
            self.boxes,
            list(indices),
            values,
            self.momentum,
            self.rms,
            self.b,
            self.workspace,
        )
        torch.ops.pylo_dist.moment_pass(*args)

    @trace.phased("kernels: feature_pass")
    def feature_pass(self, batch: Batch, indices: Sequence[int]) -> None:
        """Row and column factors of some items, then pass B, with the moments where they were asked
        for.
        """
        torch.ops.pylo_dist.feature_pass(
            *(self.items, self.boxes, list(indices), self.rule, self.features.extended),
            *self._elements(batch, indices),
            *(
                self.row_or_diag,
                self.col,
                self.a,
                batch.moves,
                batch.scale,
                self.factors,
                self.squares,
                self.b,
                self.workspace,
            ),
        )

    @trace.phased("kernels: update_pass")
    def update_pass(
        self,
        batch: Batch,
        indices: Sequence[int],
        updates: Updates,
        precision: str,
        directions: Sequence[Tensor] = (),
    ) -> None:
        """Pass C of some items; into `directions`, one per index, where they are given, instead of
        the values.
        """
        torch.ops.pylo_dist.update_pass(
            *(
                self.items,
                self.boxes,
                list(indices),
                self.rule,
                self.features.extended,
                self.hidden,
                PRECISION[precision],
            ),
            *self._elements(batch, indices),
            *(
                self.row_or_diag,
                self.col,
                self.factors,
                self.squares,
                self.b,
                batch.moves,
                batch.scale,
            ),
            *(
                updates.networks,
                updates.network_of,
                updates.steps,
                batch.param_squares,
                batch.update_squares,
            ),
            *(list(directions), self.workspace),
        )

    def _elements(
        self, batch: Batch, indices: Sequence[int]
    ) -> tuple[list[Tensor], Any, list[Tensor], list[Tensor]]:
        values, grads = (
            [item.param.value for item in batch.items],
            [batch.items[i].param.grad for i in indices],
        )
        return values, grads, self.momentum, self.rms


def servable(batch: Batch, features: FeatureSet, hidden: int) -> bool:
    """Whether there are kernels for this device, these dtypes and this network; says so once where
    a library is missing.
    """
    reason = (
        library(batch.device.type)
        if batch.device.type in ("cpu", "cuda")
        else "no kernels for this kind of device"
    )
    if reason:
        _say_once(batch.device.type, reason)
        return False
    names = ("momentum", "rms", "row", "col", "diag")
    state = [item.state[name] for item in batch.items for name in names if name in item.state]
    return (
        (features.extended, hidden) in HIDDEN
        and all(item.param.value.dtype in _DTYPES for item in batch.items)
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state)
        and all(
            len(item.param.shard.shape) <= MAX_DIMS or not features.per_matrix
            for item in batch.items
        )
    )


def enabled() -> bool:
    """Whether `use_kernels` allows them."""
    return _enabled
