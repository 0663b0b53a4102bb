"""The tables of registered optimizers, architectures and weights, as they were before a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pylo_dist.optimizer import registry as optimizers
from pylo_dist.weights import registry as weights

TABLES = (
    optimizers._ENTRIES,
    weights._ARCHITECTURES,
    weights._EXAMPLES,
    weights._WEIGHTS,
)


def tables() -> list[dict[str, Any]]:
    """Copies of all of them."""
    return [dict(table) for table in TABLES]


@contextmanager
def restored() -> Iterator[None]:
    """What is registered inside is gone afterwards."""
    before = tables()
    try:
        yield
    finally:
        for table, was in zip(TABLES, before, strict=True):
            table.clear()
            table.update(was)
