"""The tables that the compiled passes read: a row per tensor and per block of it, by the names of
its fields. Writes nothing.

What the fields mean, and in which order they lie in a row, stands in csrc/include/pylo_dist/
(`Item` and `Box` in geometry.h, `RuleNumbers` in features.h); a library says it when it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.rule import Item
from ..core.shards import Box, Shape, drop_dim
from .reference import FeatureSet

MAX_DIMS = 5
MAX_LEAD_DIMS = MAX_DIMS - 2
Row = dict[str, Any]  # of every field its number, or its numbers

# What is filled here: every field by table, and how many numbers it has.
FIELDS: dict[str, dict[str, int]] = {
    "boxes": {
        "item": 1,
        **dict.fromkeys(("sizes", "local", "row", "col", "lead"), MAX_DIMS),
        **dict.fromkeys(("local_at", "row_at", "col_at", "lead_at"), 1),
    },
    "items": {
        **dict.fromkeys(("numel", "global_numel"), 1),
        **dict.fromkeys(("shard_start", "shard_run", "shard_pitch"), 1),
        **dict.fromkeys(("factored", "rows", "cols"), 1),
        **dict.fromkeys(("size_d0", "size_d1", "row_outer", "row_inner", "vector_is_row"), 1),
        **dict.fromkeys(("leads", "lead_numel"), 1),
        **dict.fromkeys(("lead_sizes", "lead_row", "lead_col"), MAX_LEAD_DIMS),
        **dict.fromkeys(("matrix_sizes", "matrix_row", "matrix_col"), 2),
        **dict.fromkeys(("factors_at", "squares_at", "a_buffer", "a_audit", "a_at"), 1),
        **dict.fromkeys(("b_buffer", "b_at", "moments_at", "first_box", "num_boxes"), 1),
    },
    "rule": {
        "momentum_decays": 3,
        "rms_decay": 1,
        "factor_decays": 3,
        **dict.fromkeys(("eps_diag", "eps_rms", "eps_normalise", "clamp"), 1),
    },
}


@dataclass(frozen=True, slots=True)
class RowOrder:
    """The order in which a library wants the fields of a row.

    Attributes:
        fields: every field, and how many numbers it has.
    """

    fields: tuple[tuple[str, int], ...]

    @classmethod
    def read(cls, table: str, said: str) -> RowOrder:
        """What a library says of a table, "name name:count ...", compared with what is filled here.

        Raises:
            ValueError: a field that is missing, unknown or of another length, by name.
        """
        fields = []
        for word in said.split():
            name, _, count = word.partition(":")
            fields.append((name, int(count or 1)))
        theirs, ours = dict(fields), FIELDS[table]
        for name in [*theirs, *ours]:
            found, wanted = theirs.get(name), ours.get(name)
            if found != wanted:
                raise ValueError(
                    f"field {name!r} of {table} has {found or 'no'} numbers there, "
                    f"{wanted or 'no'} here"
                )
        return cls(tuple(fields))

    def new_table(self) -> Table:
        """A table without rows."""
        return Table(self, {name: [] for name, _ in self.fields})


@dataclass(slots=True)
class Table:
    """Rows that come one by one, kept by fields: thousands of rows would be work for the garbage
    collector.

    Attributes:
        columns: of every field the numbers of all rows so far.
    """

    order: RowOrder
    columns: dict[str, list[Any]]
    num_rows: int = 0

    def add(self, row: Row) -> None:
        """Append a row, which has every field and no other."""
        assert row.keys() == self.columns.keys(), row.keys() ^ self.columns.keys()
        for name, count in self.order.fields:
            if count == 1:
                self.columns[name].append(row[name])
            else:
                assert len(row[name]) == count, name
                self.columns[name] += row[name]
        self.num_rows += 1

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """(rows, numbers of a row), in the order of the library."""
        columns = [
            torch.tensor(self.columns[name], dtype=dtype).view(self.num_rows, count)
            for name, count in self.order.fields
        ]
        return torch.cat(columns, dim=1)


def strides(shape: Shape, dropped: int | None) -> list[int]:
    """C-order strides of a vector of `shape` without dim `dropped`, 0 along it."""
    found, step = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        if dim != dropped:
            found[dim] = step
            step *= shape[dim]
    return found


def box_row(
    i: int, box: Box, shape: Shape, dims: tuple[int, int] | None, lead_dims: int
) -> Row | None:
    """A block of item i as a row; None if it has too many dims.

    Args:
        shape, dims: of the whole tensor, and its factored dims (d1, d0).
        lead_dims: how many of its dims have a matrix for every index.
    """
    none = [0] * len(shape)
    row, col = (none, none) if dims is None else (strides(shape, dims[1]), strides(shape, dims[0]))
    lead = strides(shape[:lead_dims], None) + [0] * (len(shape) - lead_dims)
    at = [sum(o * s for o, s in zip(box.offsets, of, strict=True)) for of in (row, col, lead)]
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
    return {
        "item": i,
        "sizes": [size for size, _ in merged],
        "local": [steps[0] for _, steps in merged],
        "row": [steps[1] for _, steps in merged],
        "col": [steps[2] for _, steps in merged],
        "lead": [steps[3] for _, steps in merged],
        "local_at": box.local_offset,
        "row_at": at[0],
        "col_at": at[1],
        "lead_at": at[2],
    }


def item_row(item: Item, features: FeatureSet) -> Row:
    """The geometry of a tensor, by its GLOBAL shape; where its numbers lie is for the caller."""
    shard, dims = item.param.shard, item.dims if "row" in item.state else None
    shape = shard.shape
    lead = features.lead(shape) if "momentum" in item.state else ()
    global_numel, leads = math.prod(shape), math.prod(lead)
    none, one = [0] * MAX_LEAD_DIMS, [1] * MAX_LEAD_DIMS
    row: Row = {
        "numel": shard.numel,
        "global_numel": global_numel,
        "shard_start": shard.start,
        "shard_run": shard.run,
        "shard_pitch": shard.pitch,
        "factored": int(dims is not None),
        "rows": 0,
        "cols": 0,
        "size_d0": 0,
        "size_d1": 0,
        "row_outer": 0,
        "row_inner": 0,
        "vector_is_row": 0,
        "leads": leads,
        "lead_numel": global_numel // leads,
        "lead_sizes": one,
        "lead_row": none,
        "lead_col": none,
        "matrix_sizes": one[:2],
        "matrix_row": none[:2],
        "matrix_col": none[:2],
    }
    if dims is None:
        return row
    d1, d0 = dims
    row_shape, d1_in_row = drop_dim(shape, d0), d1 - (d0 < d1)
    last = next((dim for dim in reversed(range(len(shape))) if shape[dim] > 1), d0)
    row |= {
        "rows": math.prod(row_shape),
        "cols": math.prod(drop_dim(shape, d1)),
        "size_d0": shape[d0],
        "size_d1": shape[d1],
        "row_outer": math.prod(row_shape[:d1_in_row]),
        "row_inner": math.prod(row_shape[d1_in_row + 1 :]),
        "vector_is_row": int(last == d1),
    }
    if lead:
        along_row, along_col = strides(shape, d0), strides(shape, d1)
        pad = [0] * (MAX_LEAD_DIMS - len(lead))
        row |= {
            "lead_sizes": [*[1] * len(pad), *lead],
            "lead_row": [*pad, *along_row[:-2]],
            "lead_col": [*pad, *along_col[:-2]],
            "matrix_sizes": list(shape[-2:]),
            "matrix_row": along_row[-2:],
            "matrix_col": along_col[-2:],
        }
    return row


def rule_row(features: FeatureSet, decays: Sequence[float]) -> Row:
    """The numbers of a rule; decays are (momentum x3, rms, factor x3)."""
    return {
        "momentum_decays": list(decays[:3]),
        "rms_decay": decays[3],
        "factor_decays": list(decays[4:]),
        "eps_diag": features.eps_diag,
        "eps_rms": features.eps_rms,
        "eps_normalise": features.eps_normalise,
        "clamp": math.inf if features.clamp is None else features.clamp,
    }
