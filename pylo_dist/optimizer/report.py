"""The routing report: which rule and which layout every parameter has. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..core.pieces import ShardBinding
from ..core.rule import LearnedRule
from ..core.shards import TensorShard
from ..core.state import StateField
from ..layouts.plain import local_tensor

COLUMNS = (
    "fqn",
    "shape",
    "start",
    "numel",
    "rule",
    "dtype",
    "state_bytes",
    "group_size",
    "replicas",
)


class Report(list[dict[str, Any]]):
    """One dict per parameter (keys: COLUMNS); `str()` is a table with totals.

    Attributes:
        heading: lines above the table.
        totals: summed figures, e.g. `numel`, `global_numel`, `sharded_state_bytes`,
            `replicated_state_bytes`.
    """

    def __init__(
        self, rows: list[dict[str, Any]], heading: list[str], totals: dict[str, Any]
    ) -> None:
        super().__init__(rows)
        self.heading = heading
        self.totals = totals

    def __str__(self) -> str:
        cells = [[_cell(row[column]) for column in COLUMNS] for row in self]
        widths = [
            max(len(line[c]) for line in [list(COLUMNS), *cells]) for c in range(len(COLUMNS))
        ]
        numeric = {"start", "numel", "state_bytes", "group_size", "replicas"}

        def line(values: list[str]) -> str:
            padded = (
                value.rjust(width) if column in numeric else value.ljust(width)
                for column, value, width in zip(COLUMNS, values, widths, strict=True)
            )
            return "  ".join(padded).rstrip()

        totals = ", ".join(f"{name} {_cell(value)}" for name, value in self.totals.items())
        return "\n".join(
            [*self.heading, line(list(COLUMNS)), *(line(c) for c in cells), f"total: {totals}"]
        )


def report_of(
    heading: str,
    rule: LearnedRule,
    parameters: Iterable[tuple[ShardBinding, Tensor, dict[str, StateField], Mapping[str, Tensor]]],
) -> Report:
    """The report of an optimizer.

    Args:
        parameters: per parameter where it lies, itself, and its state: which there is, and the
            tensors on this rank.
    """
    rows = []
    totals = {
        "parameters": 0,
        "numel": 0,
        "global_numel": 0,
        "sharded_state_bytes": 0,
        "replicated_state_bytes": 0,
    }
    for binding, param, fields, state in parameters:
        shard, ranks = binding.shard, comm.size(binding.group)
        driver = rule.describe(fields, binding) if param.requires_grad else "frozen"
        rows.append(report_row(shard, param.dtype, driver, state, ranks, binding.replicas))
        totals["parameters"] += 1
        totals["numel"] += shard.numel
        totals["global_numel"] += shard.global_numel
        for name, tensor in state.items():
            kind = "sharded" if fields[name].replicated is None else "replicated"
            totals[f"{kind}_state_bytes"] += num_bytes(tensor)
    return Report(rows, [heading], totals)


def report_row(
    shard: TensorShard,
    dtype: torch.dtype,
    rule: str,
    state: Mapping[str, Any],
    group_size: int,
    replicas: int = 1,
) -> dict[str, Any]:
    """One parameter's row; `state_bytes` counts the tensors in `state` on this rank."""
    return {
        "fqn": shard.fqn,
        "shape": shard.shape,
        "start": shard.start,
        "numel": shard.numel,
        "rule": rule,
        "dtype": str(dtype).removeprefix("torch."),
        "state_bytes": sum(num_bytes(t) for t in state.values() if isinstance(t, Tensor)),
        "group_size": group_size,
        "replicas": replicas,
    }


def num_bytes(tensor: Tensor) -> int:
    """Bytes of what this rank holds."""
    return local_tensor(tensor).numel() * tensor.element_size()


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def group_settings(groups: list[dict[str, Any]]) -> list[str]:
    """The hyperparameters of groups as text."""
    entries = (
        (i, k, v)
        for i, group in enumerate(groups)
        for k, v in sorted(group.items())
        if k not in ("params", "param_names")
    )
    return [f"group {i}: {k}={v.tolist() if isinstance(v, Tensor) else v}" for i, k, v in entries]
