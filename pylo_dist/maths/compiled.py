"""The Python face of the compiled passes: finds the built libraries and calls them. Writes what the
passes write.

`Kernels` are the passes over a batch that they serve (`servable`); `reference.py` serves all
others. Which tensors an operator reads and modifies is in csrc/README.md; the rows of the tables it
reads are made in `tables.py`.
"""

from __future__ import annotations

import logging
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
from ..core.rule import Batch
from . import tables
from .reference import NUM_MOMENTS, FeatureSet, Network
from .rounding import Roundings, is_halved
from .tables import FIELDS, MAX_DIMS, RowOrder

# (extended features, hidden units) that there are kernels for
HIDDEN = {
    (False, 32),
    (True, 8),
    (True, 4),
}
PRECISION = {"highest": 0, "high": 1, "medium": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    found = sorted(Path(__file__).parents[1].glob(f"_kernels_{device_type}.*"))
    if not found:
        return (
            f"the {device_type} extension was not built (pip install --no-build-isolation with a "
            "compiler builds it)"
        )
    if device_type == "cuda" and library("cpu"):  # where the operators are defined
        return f"{found[-1].name} builds on that of the CPU, and {library('cpu')}"
    try:
        torch.ops.load_library(found[-1])
    except OSError as error:
        return f"{found[-1].name} cannot be loaded: {error.__cause__ or error}"
    try:
        row_orders(device_type)
        _ = torch.ops.pylo_dist.copy_pass
    except (AttributeError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0]
        return (
            f"{found[-1].name} was built for another version of pylo_dist ({why}): build it again"
        )
    if device_type == "cpu":
        _register_fakes()
    return ""


def missing(device: torch.device) -> str:
    """Why there are no kernels for a device, "" where there are."""
    known = device.type in ("cpu", "cuda")
    return library(device.type) if known else "no kernels for this kind of device"


@cache
def row_orders(device_type: str) -> dict[str, RowOrder]:
    """By table the order in which the library of a kind of device wants the fields of a row.

    Raises:
        AttributeError: a library that does not say it.
        RuntimeError: a library that lacks a table.
        ValueError: a library with other fields than are filled here.
    """
    name = "cuda_table_fields" if device_type == "cuda" else "table_fields"
    fields = getattr(torch.ops.pylo_dist, name)
    return {table: RowOrder.read(table, fields(table)) for table in FIELDS}


def _register_fakes() -> None:
    passes = ("gradient_pass", "moment_pass", "feature_pass", "update_pass", "copy_pass")
    for name in (*passes, "square_sums", "adamw_pass"):
        torch.library.register_fake(f"pylo_dist::{name}", lambda *args: None)
    torch.library.register_fake("pylo_dist::workspace_sizes", lambda items, boxes, like: [])
    torch.library.register_fake("pylo_dist::adamw_workspace", lambda values: 0)


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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an item's numbers lie in a Sum: its buffer, and where audit and vector begin in it."""

    buffer: int
    audit: int
    vector: int


def _places(request: Sum) -> list[_Place]:
    """Of every item."""
    places = [_Place(0, 0, 0)] * len(request.vectors)
    for number, packed in enumerate(request.buffers):
        for i in packed.members:
            audit, vector = request.audits[i], request.vectors[i]
            places[i] = _Place(number, int(audit.storage_offset()), int(vector.storage_offset()))
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
        # tensors of other devices have no passes, but tests see them off on the CPU's tables
        orders = row_orders("cuda" if batch.device.type == "cuda" else "cpu")
        rule = orders["rule"].new_table()
        rule.add(tables.rule_row(features, decays))
        self.rule: list[float] = rule.tensor(torch.float64)[0].tolist()
        items, boxes = orders["items"].new_table(), orders["boxes"].new_table()
        self.served = len(batch.items) > 0
        factors = squares = 0
        geometry: dict[Any, tuple[tables.Row, list[tables.Row]]] = {}  # alike for many items
        for i, (item, a_at, b_at) in enumerate(
            zip(batch.items, _places(a), _places(b), strict=True)
        ):
            shard, first = item.param.shard, boxes.num_rows
            kind = (
                *(shard.shape, shard.start, shard.numel, shard.run, shard.pitch, item.dims),
                *("row" in item.state, "momentum" in item.state),
            )
            if kind not in geometry:
                row = tables.item_row(item, features)
                dims = item.dims if row["factored"] else None
                lead_dims = len(features.lead(shard.shape)) if "momentum" in item.state else 0
                rows = [tables.box_row(i, b, shard.shape, dims, lead_dims) for b in shard.boxes()]
                if None in rows:
                    self.served = False
                    return
                geometry[kind] = row, [box for box in rows if box is not None]
            row, box_rows = geometry[kind]
            for box_row in box_rows:
                boxes.add({**box_row, "item": i})
            row = row | {
                "factors_at": factors,
                "squares_at": squares,
                "a_buffer": a_at.buffer,
                "a_audit": a_at.audit,
                "a_at": a_at.vector + extra[i],
                "b_buffer": b_at.buffer,
                "b_at": b_at.vector + NUM_MOMENTS if moments else b_at.vector,
                "moments_at": b_at.vector if moments else -1,
                "first_box": first,
                "num_boxes": boxes.num_rows - first,
            }
            items.add(row)
            factors += 6 * (row["rows"] + row["cols"])
            squares += 12 * row["leads"] if row["factored"] else 0
        if not self.served:
            return
        self.items, self.boxes = items.tensor(torch.int64), boxes.tensor(torch.int64)
        device = batch.device
        self.factors = torch.empty(factors, dtype=torch.float32, device=device)
        self.squares = torch.empty(squares, dtype=torch.float64, device=device)
        nothing = [torch.empty(0, device=device) for _ in range(3)]
        states = [item.state for item in batch.items]
        # what a CPU's operators keep of earlier calls, see `_tensors`
        self._values: list[Tensor] = []
        self._places: list[int] = []  # of the values, in memory
        self._known: set[int] = set()
        self._grads: list[Tensor | None] = []
        self.momentum = [state.get("momentum", nothing[0]) for state in states]
        self.rms = [state.get("rms", nothing[1]) for state in states]
        self.row_or_diag = [state.get("row", state.get("diag", nothing[2])) for state in states]
        self.col = [state.get("col", torch.empty(0, device=device)) for state in states]
        self.rounds = any(map(is_halved, (*self.momentum, *self.rms)))
        self.a = [packed.buffer for packed in a.buffers]
        self.b = [packed.buffer for packed in b.buffers]
        sizes = torch.ops.pylo_dist.workspace_sizes(self.items, self.boxes, self.squares)
        # one alone, as on a CPU, is where the operators keep what they have seen, see `_tensors`
        self._keeps = len(sizes) == 1
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
        limits: tuple[tuple[float, float], ...],
        replace: bool,
    ) -> None:
        """Pass A of some items; limits: per item of the batch the largest |g| that counts as finite
        and the clamp.
        """
        table = batch.on_device("limits", limits, torch.float64)
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
        *elements, row_or_diag, col = self._tensors(batch, indices)
        self._grads = elements[1] if self._omits() else []
        torch.ops.pylo_dist.feature_pass(
            *(self.items, self.boxes, list(indices), self.rule, self.features.extended),
            *elements,
            *(
                row_or_diag,
                col,
                self.a,
                batch.moves,
                batch.scale,
                self.factors,
                self.squares,
                self.b,
                self.workspace,
            ),
        )
        self._note(indices)

    @trace.phased("kernels: update_pass")
    def update_pass(
        self,
        batch: Batch,
        indices: Sequence[int],
        updates: Updates,
        precision: str,
        directions: Sequence[Tensor] = (),
        roundings: Roundings | None = None,
    ) -> None:
        """Pass C of some items; into `directions`, one per index, where they are given, instead of
        the values. `roundings`: of this step, where state is bfloat16.
        """
        keys: Tensor | None = None
        if self.rounds:
            assert roundings is not None
            keys = roundings.keys(batch)
        values, grads, momentum, rms, row_or_diag, col = self._tensors(batch, indices)
        held, self._grads = self._grads, []
        if self._omits() and [*map(id, grads)] == [*map(id, held)]:  # alive since the pass before
            grads = []
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
            *(values, grads, momentum, rms),
            *(
                row_or_diag,
                col,
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
            *(list(directions), self.workspace, keys),
        )
        self._note(indices)

    def _omits(self) -> bool:
        """Whether the operators keep where tensors lie that they have seen: those of a CPU. Under a
        mode that may hand them other tensors (fake ones, copies) they are given all.
        """
        return self._keeps and not torch._C._len_torch_dispatch_stack()

    def _note(self, indices: Sequence[int]) -> None:
        """The operators have seen the tensors of these items, or others in their place."""
        if self._omits():
            self._known.update(indices)
        else:
            self._known.clear()

    def _tensors(self, batch: Batch, indices: Sequence[int]) -> tuple[list[Any], ...]:
        """Values, gradients of `indices`, momentum, rms, row or diag, and col. Lists of what a
        CPU's operators have seen of all of these items are empty (`_omits`).
        """
        values = [item.param.value for item in batch.items]
        grads = [batch.items[i].param.grad for i in indices]
        if self._omits():
            places = [*map(Tensor.data_ptr, values)]
            if places != self._places or [*map(id, values)] != [*map(id, self._values)]:
                self._values, self._places, self._known = values, places, set()
            if self._known.issuperset(indices):
                return [], grads, [], [], [], []
        return values, grads, self.momentum, self.rms, self.row_or_diag, self.col


def servable(batch: Batch, features: FeatureSet, hidden: int) -> bool:
    """Whether there are kernels for this device, these dtypes and this network; says so once where
    a library is missing.
    """
    reason = missing(batch.device)
    if reason:
        _say_once(batch.device.type, reason)
        return False
    names = ("momentum", "rms", "row", "col", "diag")
    states = [(n, item.state[n]) for item in batch.items for n in names if n in item.state]
    halved = any(is_halved(tensor) for _, tensor in states)
    means = torch.bfloat16 if halved else torch.float32
    return (
        (features.extended, hidden) in HIDDEN
        and all(item.param.value.dtype in DTYPES for item in batch.items)
        and all(
            tensor.dtype == (means if name in ("momentum", "rms") else torch.float32)
            and tensor.is_contiguous()
            for name, tensor in states
        )
        and all(
            len(item.param.shard.shape) <= MAX_DIMS or not features.per_matrix
            for item in batch.items
        )
    )


def enabled() -> bool:
    """Whether `use_kernels` allows them."""
    return _enabled
