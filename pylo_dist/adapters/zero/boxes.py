"""Where the elements of a bucket lie in what is sent of it: every slice has some columns of every
rank's part, one rank's in a row. Pure geometry, worked out once per bucket.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SliceBox:
    """Some elements of a tensor in a slice: the same columns of several ranks.

    Attributes:
        row, rows: the first rank, and how many.
        column, width: the first column of the slice, and how many.
        start: the first element, of the tensor.
        step: from an element of one rank to that of the next, in the tensor.
    """

    row: int
    rows: int
    column: int
    width: int
    start: int
    step: int

    def place(self, full: Tensor) -> Tensor:
        """Those elements of a slice (ranks, columns and more), contiguous: a view (width,), or
        (rows, width).
        """
        between = full.stride(0)
        first = full.storage_offset() + self.row * between + self.column
        if self.rows == 1:
            return full.as_strided((self.width,), (1,), first)
        return full.as_strided((self.rows, self.width), (between, 1), first)

    def source(self, flat: Tensor) -> Tensor:
        """Those elements of the tensor (numel,), contiguous: a view like that of `place`."""
        if self.rows == 1:
            return flat if self.width == flat.numel() else flat.narrow(0, self.start, self.width)
        first = flat.storage_offset() + self.start
        return flat.as_strided((self.rows, self.width), (self.step, 1), first)


@dataclass(frozen=True, slots=True)
class SliceLayout:
    """What is in a slice.

    Attributes:
        members: of each member of the bucket that reaches into it, its number and its boxes.
        padding: the elements behind the last member.
    """

    members: tuple[tuple[int, tuple[SliceBox, ...]], ...]
    padding: tuple[SliceBox, ...]


def boxes_by_slice(
    extents: Sequence[tuple[int, int]],
    end: int,
    part: int,
    ranks: int,
    slices: Sequence[tuple[int, int]],
) -> list[SliceLayout]:
    """Of every slice what is in it.

    Args:
        extents: first and stop of each member in the bucket. end: of the last one.
        part: elements of a rank's part.
        slices: first and stop in every rank's part, one behind the other.
    """
    members: list[list[tuple[int, tuple[SliceBox, ...]]]] = [[] for _ in slices]
    stops = [stop for _, stop in slices]
    for i, (begin, stop) in enumerate(extents):
        # a large member has many slices, of which small ones beside it are asked in vain
        reached: set[int] = set()
        for _, low, high in _spans(part, begin, stop):
            reached.update(range(bisect_right(stops, low), bisect_left(stops, high) + 1))
        for number in sorted(reached):
            members[number].append((i, boxes_in(part, slices[number], begin, stop)))
    return [
        SliceLayout(tuple(found), boxes_in(part, columns, end, ranks * part))
        for found, columns in zip(members, slices, strict=True)
    ]


def boxes_in(part: int, columns: tuple[int, int], begin: int, end: int) -> tuple[SliceBox, ...]:
    """The elements begin .. end of a bucket in a slice of it, in their order: the end of a rank's
    part, whole parts of ranks, the beginning of one. Three at most, however many ranks they reach
    over.

    Args:
        part: elements of a rank's part.
        columns: first and stop of the slice in it.
    """
    (first, stop), found = columns, []
    for rows, low, high in _spans(part, begin, end):
        left, right = max(low, first), min(high, stop)
        if left < right:
            start = rows.start * part + left - begin
            found.append(SliceBox(rows.start, len(rows), left - first, right - left, start, part))
    return tuple(found)


def _spans(part: int, begin: int, end: int) -> list[tuple[range, int, int]]:
    """The elements begin .. end as ranks and, of their parts, the elements from one to another."""
    if begin >= end:  # also where nobody has a part
        return []
    first, last = -(-begin // part), end // part  # ranks whose part is wholly inside
    if first > last:
        return [(range(last, last + 1), begin - last * part, end - last * part)]
    spans = []
    if begin < first * part:
        spans.append((range(first - 1, first), begin - (first - 1) * part, part))
    if first < last:
        spans.append((range(first, last), 0, part))
    if last * part < end:
        spans.append((range(last, last + 1), 0, end - last * part))
    return spans
