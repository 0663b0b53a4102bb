"""docs/doors.md says what works with a test's name: each of them exists, and every row says how it
is known.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
VERSIONED = re.compile(r"\w \d+\.\d+")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "doors.md").read_text().splitlines()
    if line.startswith("|")
]


@cache
def functions_of(file: str) -> set[str]:
    body = ast.parse((ROOT / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = [pair for row in ROWS for pair in NAMED.findall(row[-1])]
    assert len(named) > 20
    gone = [f"{file}::{name}" for file, name in named if not (ROOT / file).is_file()]
    assert gone == []
    gone = [f"{file}::{name}" for file, name in named if name not in functions_of(file)]
    assert gone == []


def test_every_row_says_how_it_is_known() -> None:
    rows = [row for row in ROWS if "known by" not in row[-1] and not row[0].startswith("---")]
    assert len(rows) > 20
    unknown = [row for row in rows if not (NAMED.search(row[-1]) or VERSIONED.search(row[-1]))]
    assert unknown == []
