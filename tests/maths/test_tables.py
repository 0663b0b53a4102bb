"""The tables of the compiled passes: fields by name, the same in C++ and in Python, or not used."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pylo_dist.core.rule import Batch
from pylo_dist.maths import compiled
from pylo_dist.maths.tables import FIELDS, Row, RowOrder, item_row, rule_row
from support.optimizers import Roles, cases

BUILD = {
    name: (case.face, dict(case.arguments))
    for name, case in cases(
        Roles(widths={"matrix": 2.0}, embedding="embedding"), built_in=True
    ).items()
}
MISSING = compiled.library("cpu")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def batch_of(name: str) -> tuple[Batch, Any]:
    """A batch with a matrix, a convolution and a bias, and its rule."""
    face, kwargs = BUILD[name]
    shapes = {"matrix": (4, 6), "convolution": (5, 4, 3, 3), "bias": (7,), "embedding": (3, 2)}
    named = [(fqn, torch.nn.Parameter(torch.ones(shape))) for fqn, shape in shapes.items()]
    optimizer = face(named, **kwargs)
    for _, param in named:
        param.grad = torch.ones_like(param)
    optimizer.step(loss=torch.tensor(1.0))
    (batch,) = optimizer._lineup.batches
    return batch, optimizer.rule


def decoded(table: torch.Tensor, order: RowOrder) -> list[Row]:
    """The rows of a table by name, as the library reads them."""
    rows = []
    for numbers in table.tolist():
        row: Row = {}
        for name, count in order.fields:
            row[name] = numbers[0] if count == 1 else numbers[:count]
            numbers = numbers[count:]
        assert numbers == []
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", BUILD)
def test_every_field_is_filled_with_what_is_its(name: str) -> None:
    batch, rule = batch_of(name)
    kernels, orders = batch.cache["kernels"], compiled.row_orders("cpu")
    items = decoded(kernels.items, orders["items"])
    boxes = decoded(kernels.boxes, orders["boxes"])
    assert len(items) == len(batch.items)
    next_box = next_factor = next_square = 0
    for i, (row, item) in enumerate(zip(items, batch.items, strict=True)):
        assert set(row) == set(FIELDS["items"])
        geometry = item_row(item, rule.features)
        assert {field: row[field] for field in geometry} == geometry
        assert row["numel"] == row["global_numel"] == item.param.value.numel()
        assert (row["first_box"], row["factors_at"]) == (next_box, next_factor)
        assert row["squares_at"] == next_square
        own = boxes[next_box : next_box + row["num_boxes"]]
        assert sum(math.prod(box["sizes"]) for box in own) == row["numel"]
        assert all(set(box) == set(FIELDS["boxes"]) and box["item"] == i for box in own)
        next_box += row["num_boxes"]
        next_factor += 6 * (row["rows"] + row["cols"])
        next_square += 12 * row["leads"] if row["factored"] else 0
    assert next_box == len(boxes)
    assert set(rule_row(rule.features, [0.5] * 7)) == set(FIELDS["rule"])


def test_the_library_says_the_fields_that_are_filled() -> None:
    for table, order in compiled.row_orders("cpu").items():
        assert dict(order.fields) == FIELDS[table]


def test_rows_follow_the_library_whatever_its_order() -> None:
    said = "clamp momentum_decays:3 eps_diag eps_normalise eps_rms factor_decays:3 rms_decay"
    order = RowOrder.read("rule", said)
    batch, rule = batch_of("AdafacLO")
    row = rule_row(rule.features, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    table = order.new_table()
    table.add(row)
    flat = table.tensor(torch.float64)[0].tolist()
    assert flat[1:4] == [0.1, 0.2, 0.3]
    assert flat[-4:] == [0.5, 0.6, 0.7, 0.4]
    assert len(batch.items) == 4


@pytest.mark.parametrize(
    ("table", "change", "named"),
    [
        ("items", ("numel g", "g"), "'numel' of items has no numbers there, 1 here"),
        ("items", ("numel g", "elements g"), "'elements' of items has 1 numbers there, no here"),
        ("boxes", ("sizes:5", "sizes:6"), "'sizes' of boxes has 6 numbers there, 5 here"),
        ("rule", ("clamp", "clamp other"), "'other' of rule has 1 numbers there, no here"),
    ],
)
def test_a_library_with_other_fields_is_not_used(
    monkeypatch: pytest.MonkeyPatch, table: str, change: tuple[str, str], named: str
) -> None:
    said = torch.ops.pylo_dist.table_fields

    def other(asked: str) -> str:
        return said(asked).replace(*change) if asked == table else said(asked)

    found = refused(monkeypatch, SimpleNamespace(table_fields=other))
    assert "was built for another version of pylo_dist" in found
    assert named in found


def test_a_library_that_does_not_say_its_fields_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = refused(monkeypatch, SimpleNamespace())
    assert "was built for another version of pylo_dist" in found
    assert "build it again" in found


def test_a_library_without_a_table_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "networks", {"hidden": 1})
    found = refused(monkeypatch, torch.ops.pylo_dist)
    assert "was built for another version of pylo_dist" in found
    assert "there is no table 'networks'" in found
    assert "\n" not in found


def refused(monkeypatch: pytest.MonkeyPatch, operators: Any) -> str:
    """Why the CPU's library would not be used if it had these operators."""
    loaded = SimpleNamespace(pylo_dist=operators, load_library=lambda path: None)
    monkeypatch.setattr(compiled, "torch", SimpleNamespace(ops=loaded))
    monkeypatch.setattr(compiled, "row_orders", compiled.row_orders.__wrapped__)
    reason: str = compiled.library.__wrapped__("cpu")
    return reason
