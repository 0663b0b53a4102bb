"""Geometry of sharded tensors: where a rank's local elements lie in the global tensor. Touches no
tensor's values.

Legend: N local elements, `fqn` the full parameter name, `dim` a tensor dimension, C order
throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Shape = tuple[int, ...]


@lru_cache(maxsize=4096)
def factored_dims(shape: Shape, tie_break: str = "as_given") -> tuple[int, int] | None:
    """The two factored dimensions (d1, d0) of a GLOBAL shape: d0 the largest, d1 the second
    largest; None below two dims.

    Among equal sizes the higher dimension sorts last, so a square matrix gives (0, 1). The
    reference's `_factored_dims` (google/learned_optimization, learned_opts/adafac_mlp_lopt.py
    through optimizers/adafactor) sorts unstably on some machines; this is its stable rule.

    `tie_break="torch"` is PyLO's rule for VeLO, which swaps the two where they are equally long
    (but not for the first two of four, a convolution's channels): for a square matrix stored (out,
    in) it is the reference's rule for the same matrix as (in, out).
    """
    if len(shape) < 2:
        return None
    ascending = sorted(range(len(shape)), key=lambda dim: shape[dim])
    d1, d0 = ascending[-2:]
    if (
        tie_break == "torch"
        and shape[d1] == shape[d0]
        and not (len(shape) == 4 and (d1, d0) == (0, 1))
    ):
        return d0, d1
    return d1, d0


def drop_dim(shape: Shape, dim: int) -> Shape:
    """`shape` without dimension `dim`."""
    return shape[:dim] + shape[dim + 1 :]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular block of the global tensor and where a shard keeps it.

    The block spans `offsets[d] .. offsets[d] + sizes[d]` in every dimension d; its elements lie in
    the shard's 1-D local tensor at `local_offset`, with `local_strides` per dimension.
    """

    offsets: Shape
    sizes: Shape
    local_offset: int
    local_strides: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the block lies in the global tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def view(self, local: Tensor) -> Tensor:
        """View of `local` (..., N), contiguous in its last dim, as (..., *sizes)."""
        lead = local.shape[:-1]
        return local.as_strided(
            (*lead, *self.sizes),
            (*local.stride()[:-1], *self.local_strides),
            local.storage_offset() + self.local_offset,
        )

    def indices(self, shape: Shape, device: torch.device) -> Tensor:
        """Index of every element in the C order of the global tensor, int64 (*sizes)."""
        index = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
        for dim, stride in enumerate(_contiguous_strides(shape)):
            first, size = self.offsets[dim] * stride, self.sizes[dim]
            along = torch.arange(first, first + size * stride, stride, device=device)
            index = index + along.view(-1, *(1 for _ in shape[dim + 1 :]))
        return index

    def window(self, factor: Tensor, dropped: int) -> Tensor:
        """The part of a replicated factor (..., *shape without `dropped`) that this block needs,
        ready to broadcast.

        Returns (..., *sizes) with size 1 in place of dimension `dropped`.
        """
        factor = factor.unsqueeze(factor.dim() - (len(self.sizes) - 1) + dropped)
        lead = factor.dim() - len(self.sizes)
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            if dim != dropped:
                factor = factor.narrow(lead + dim, offset, size)
        return factor

    def split(self, max_numel: int) -> Iterator[Box]:
        """Blocks of at most `max_numel` elements that tile this one, in order."""
        if self.numel <= max_numel:
            yield self
            return
        dim = next(d for d in range(len(self.sizes)) if self.sizes[d] > 1)
        inner = math.prod(self.sizes[dim + 1 :])
        step = max(1, max_numel // inner)
        for first in range(0, self.sizes[dim], step):
            size = min(step, self.sizes[dim] - first)
            part = Box(
                (*self.offsets[:dim], self.offsets[dim] + first, *self.offsets[dim + 1 :]),
                (*self.sizes[:dim], size, *self.sizes[dim + 1 :]),
                self.local_offset + first * self.local_strides[dim],
                self.local_strides,
            )
            yield from part.split(max_numel)


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Which elements of a global tensor a rank holds, as four integers.

    Local element i is element `start + (i // run) * pitch + i % run` of the C-order global tensor
    of shape `shape`. A flat interval (ZeRO, FSDP, `Shard(0)`) has run = pitch = numel; `Shard(k)`,
    also cut again on dimension 0, is rows of a pitched box; an empty shard has run = pitch = 1.

    Raises:
        ValueError: the integers do not describe elements of `shape`.
    """

    fqn: str
    shape: Shape
    start: int
    numel: int
    run: int
    pitch: int

    def __post_init__(self) -> None:
        total = math.prod(self.shape)
        if self.numel == 0:
            if (self.run, self.pitch) != (1, 1) or not 0 <= self.start <= total:
                raise self._invalid(
                    "an empty shard has run = pitch = 1 and 0 <= start <= the global numel"
                )
            return
        if (
            self.numel < 0
            or self.start < 0
            or self.run < 1
            or self.pitch < self.run
            or self.run > self.numel
        ):
            raise self._invalid("wanted start >= 0, numel >= 0 and 1 <= run <= min(pitch, numel)")
        if self.run == self.numel and self.pitch != self.run:
            raise self._invalid("a single run is an interval: give it run = pitch = numel")
        if self.run < self.numel:
            if self.pitch not in [math.prod(self.shape[dim:]) for dim in range(len(self.shape))]:
                raise self._invalid(
                    "the pitch must be the size of some trailing dimensions of the shape"
                )
            if self.start % self.pitch + self.run > self.pitch:
                raise self._invalid("a run may not cross a multiple of the pitch")
        last = self.numel - 1
        if self.start + last // self.run * self.pitch + last % self.run >= total:
            raise self._invalid(f"it reaches beyond the {total} elements of the tensor")

    def _invalid(self, why: str) -> ValueError:
        return ValueError(
            f"{self.fqn!r}: shard (start={self.start}, numel={self.numel}, run={self.run}, "
            f"pitch={self.pitch}) of shape {tuple(self.shape)} is not valid: {why}"
        )

    @classmethod
    def interval(cls, fqn: str, shape: Shape, start: int, stop: int) -> TensorShard:
        """The C-order elements `start .. stop` (empty when stop <= start)."""
        numel = max(0, stop - start)
        return cls(fqn, tuple(shape), start, numel, max(1, numel), max(1, numel))

    @classmethod
    def whole(cls, fqn: str, shape: Shape) -> TensorShard:
        """All elements."""
        numel = math.prod(shape)
        run = numel or 1
        return cls(fqn, tuple(shape), 0, numel, run, run)

    @classmethod
    def block(
        cls,
        fqn: str,
        shape: Shape,
        dim: int,
        first: int,
        stop: int,
        rows: tuple[int, int] | None = None,
    ) -> TensorShard:
        """Indices `first .. stop` of dimension `dim` (`Shard(dim)`), and of these only `rows` of
        dimension 0 if given.
        """
        if rows is not None and dim == 0:
            raise ValueError(
                f"{fqn!r} is cut twice on dimension 0; one cut per dimension can be expressed"
            )
        if not 0 <= dim < len(shape):
            raise ValueError(f"{fqn!r}: dimension {dim} of shape {tuple(shape)} does not exist")
        for of, (begin, end) in ((dim, (first, stop)), (0, rows or (0, shape[0]))):
            if begin < end and not 0 <= begin <= end <= shape[of]:
                raise ValueError(
                    f"{fqn!r}: indices {begin} .. {end} of dimension {of} are not in shape "
                    f"{tuple(shape)}"
                )
        inner = math.prod(shape[dim + 1 :])
        pitch, run = shape[dim] * inner, (stop - first) * inner
        repeats = math.prod(shape[1:dim])  # runs per index of dimension 0
        low, high = (
            (0, math.prod(shape[:dim])) if rows is None else (rows[0] * repeats, rows[1] * repeats)
        )
        if run <= 0 or high <= low:
            return cls.interval(fqn, shape, 0, 0)
        if run == pitch or high - low == 1:
            begin = low * pitch + first * inner
            return cls.interval(fqn, shape, begin, begin + run * (high - low))
        return cls(fqn, tuple(shape), low * pitch + first * inner, run * (high - low), run, pitch)

    @property
    def global_numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return self.numel == math.prod(self.shape)

    def boxes(self) -> tuple[Box, ...]:
        """The rectangular blocks that tile this shard; an interval of an n-D tensor needs at most 2
        n - 1.
        """
        if self.numel == 0:
            return ()
        if self.run == self.numel:
            return tuple(_interval_boxes(self.shape, self.start, self.start + self.numel))
        outer_dims = next(
            dim for dim in range(len(self.shape)) if math.prod(self.shape[dim:]) == self.pitch
        )
        outer, inner = self.shape[:outer_dims], self.shape[outer_dims:]
        row, column = divmod(self.start, self.pitch)
        full_runs, rest = divmod(self.numel, self.run)
        boxes = self._run_boxes(outer, inner, row, full_runs, column, self.run, 0)
        if rest:
            boxes += self._run_boxes(
                outer, inner, row + full_runs, 1, column, rest, full_runs * self.run
            )
        return tuple(boxes)

    def _run_boxes(
        self, outer: Shape, inner: Shape, row: int, rows: int, column: int, columns: int, local: int
    ) -> list[Box]:
        return [
            Box(
                above.offsets + below.offsets,
                above.sizes + below.sizes,
                local + above.local_offset * self.run + below.local_offset,
                tuple(stride * self.run for stride in above.local_strides) + below.local_strides,
            )
            for above in _interval_boxes(outer, row, row + rows)
            for below in _interval_boxes(inner, column, column + columns)
        ]

    def take(self, whole: Tensor) -> Tensor:
        """The elements of this shard out of the global tensor, a new (N,)."""
        local = whole.new_empty(self.numel)
        for box in self.boxes():
            box.view(local).copy_(whole[box.slices])
        return local

    def put(self, local: Tensor, whole: Tensor) -> None:
        """Write local elements (N,) to their places in the global tensor (`whole` is modified in
        place).
        """
        for box in self.boxes():
            whole[box.slices] = box.view(local)

    def indices(self) -> Tensor:
        """Global C-order index of every local element, int64 (N,)."""
        return global_indices(torch.arange(self.numel), self.start, self.run, self.pitch)


def global_indices(
    local: Tensor, start: int | Tensor, run: int | Tensor, pitch: int | Tensor
) -> Tensor:
    """Global C-order indices of these local elements of a shard with these integers, see
    `TensorShard`; int64, in the shape that all broadcast to.
    """
    return start + torch.div(local, run, rounding_mode="floor") * pitch + local % run


def _contiguous_strides(sizes: Shape) -> Shape:
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def _interval_boxes(shape: Shape, start: int, stop: int) -> list[Box]:
    """Blocks that tile the C-order elements start .. stop, contiguous in local memory one after the
    other.
    """
    boxes: list[Box] = []

    def add(offsets: Shape, shape: Shape, start: int, stop: int, local: int) -> None:
        if start >= stop:
            return
        lead = (1,) * len(offsets)
        if not shape:
            boxes.append(Box(offsets, lead, local, _contiguous_strides(lead)))
            return
        inner = math.prod(shape[1:])
        first, last = start // inner, (stop - 1) // inner
        if first == last and stop - start < inner:
            add((*offsets, first), shape[1:], start - first * inner, stop - first * inner, local)
            return
        head = -start % inner  # elements before the first full row
        if head:
            add((*offsets, first), shape[1:], start - first * inner, inner, local)
        rows_from, rows_to = -(-start // inner), stop // inner
        if rows_to > rows_from:
            sizes = (*lead, rows_to - rows_from, *shape[1:])
            zeros = (0,) * (len(shape) - 1)
            boxes.append(
                Box((*offsets, rows_from, *zeros), sizes, local + head, _contiguous_strides(sizes))
            )
        tail = stop - rows_to * inner
        if tail:
            add((*offsets, rows_to), shape[1:], 0, tail, local + stop - start - tail)

    add((), tuple(shape), start, stop, 0)
    return boxes
