"""The tables of the compiled passes: fields by name, the same in C++ and in Python, or not used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pylo_dist.core.rule import Batch
from pylo_dist.maths import compiled
from pylo_dist.maths.tables import FIELDS, RowOrder, box_row, item_row, rule_row
from support.optimizers import BUILD

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
    (rule, batch), *_ = optimizer._lineup.engine.work
    return batch, rule


@pytest.mark.parametrize("name", BUILD)
def test_every_field_is_filled_and_none_besides(name: str) -> None:
    batch, rule = batch_of(name)
    places = {"factors_at", "squares_at", "a_buffer", "a_audit", "a_at", "b_buffer", "b_at"}
    places |= {"moments_at", "first_box", "num_boxes"}
    for item in batch.items:
        dims = item.dims if "row" in item.state else None
        assert set(item_row(item, rule.features)) | places == set(FIELDS["items"])
        for box in item.param.shard.boxes():
            row = box_row(0, box, item.param.shard.shape, dims, 0)
            assert row is not None
            assert set(row) == set(FIELDS["boxes"])
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


def refused(monkeypatch: pytest.MonkeyPatch, operators: Any) -> str:
    """Why the CPU's library would not be used if it had these operators."""
    loaded = SimpleNamespace(pylo_dist=operators, load_library=lambda path: None)
    monkeypatch.setattr(compiled, "torch", SimpleNamespace(ops=loaded))
    monkeypatch.setattr(compiled, "row_orders", compiled.row_orders.__wrapped__)
    reason: str = compiled.library.__wrapped__("cpu")
    return reason
