"""Parameters over their life, in every layout and under every rule: each step is that of one
process, or it is refused on all ranks. One table, of which docs/life.md shows the worst rows.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from pylo_dist.testing import largest_changes, layout_error
from support import deepspeed_cases
from support.lives import LIVES, RULES, Outcome, live_all
from support.ranks import run_ranks

ALL, FEW = tuple(RULES), ("AdafacLO", "VeLO", "CELO2")
DEEPSPEED = {f"deepspeed{stage}": FEW for stage in range(4)}
LAYOUTS = {
    "plain": ALL,
    "ddp": FEW,
    "fsdp2": ALL,
    "fsdp1": FEW,
    "hsdp": FEW[:2],
    "tp": FEW,
    "zero1": FEW,
    "zero2": ALL,
    **DEEPSPEED,
}
# by layout, what is refused and what is said then
REFUSED = {
    "ddp": {"built frozen": "'late.weight' was frozen when DistributedDataParallel was given"},
    "zero1": {"built frozen": "'late.weight' was frozen when ZeroOptimizer was built"},
    "zero2": {"built frozen": "'late.weight' was frozen when ZeroOptimizer was built"},
    **{
        layout: {
            "built frozen": "'late.weight' was frozen when DeepSpeed made its partitions",
            "added late": "add_param_group: DeepSpeed has made its partitions",
        }
        for layout in DEEPSPEED
    },
}
PAGE = Path(__file__).parents[2] / "docs" / "life.md"
Outcomes = dict[tuple[str, str, str], list[Outcome]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of all ranks, by layout, rule and life."""
    files = deepspeed_cases.write_weights(tmp_path_factory.mktemp("weights"))
    left_out = {"hsdp"} if importlib.util.find_spec("deepspeed") else {"hsdp", *DEEPSPEED}
    on_2 = {name: rules for name, rules in LAYOUTS.items() if name not in left_out}
    found: Outcomes = {}
    for world, layouts in ((2, on_2), (4, {"hsdp": LAYOUTS["hsdp"]})):
        for result in run_ranks(world, live_all, layouts, files):
            for key, outcome in result.items():
                found.setdefault(key, []).append(outcome)
    return found


def cell(outcomes: Outcomes, layout: str, kind: str, life: str) -> str:
    """The worst share of the layout tolerance, "refused", or "-" where it was not run.

    Raises:
        AssertionError: a step that is neither that of one process nor refused on all ranks.
    """
    key = layout, kind, life
    if key not in outcomes:
        return "-"
    said = REFUSED.get(layout, {}).get(life)
    if said is not None:
        for outcome in outcomes[key]:
            assert outcome.unchanged, key
            assert "PeerError" in outcome.refused or said in outcome.refused, (key, outcome.refused)
        assert any(said in outcome.refused for outcome in outcomes[key]), key
        return "refused"
    wanted = outcomes["plain", kind, life][0].history
    changes = largest_changes(wanted)
    assert all(float(change) > 0.0 for change in changes.values()), key
    share = RULES[kind].share(torch.float32)
    worst = 0.0
    for outcome in outcomes[key]:
        assert not outcome.refused, (key, outcome.refused)
        worst = max(worst, *layout_error(outcome.history[-1], wanted[-1], changes, share).values())
    assert worst <= 1.0, (key, worst)
    return f"{worst:.2g}"


def test_a_parameters_life_is_the_same_in_every_layout(
    outcomes: Outcomes, figures: list[str]
) -> None:
    layouts = list(LAYOUTS)[1:]
    rows = [["life", "rule", *layouts]]
    for life in LIVES:
        for kind in ALL:
            rows.append([life, kind, *(cell(outcomes, layout, kind, life) for layout in layouts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        padded = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        figures.append(f"lives {i:2} | {' | '.join(padded)}")
    figures.append("lives of | shares of the layout tolerance; the last life is of 20 steps")
    for layout in layouts:
        for life in REFUSED.get(layout, {}):
            for outcome in outcomes.get((layout, "AdafacLO", life), [])[:1]:
                figures.append(f"lives why | {layout}, {life}, refused: {outcome.refused}")


def test_the_page_says_what_is_refused() -> None:
    """docs/life.md has a row for every life and a column for every layout."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    table: list[Any] = [[text.strip() for text in line.strip("|").split("|")] for line in lines]
    head, *rows = table[next(i for i, row in enumerate(table) if row[0] == "life") :]
    assert head[1:] == list(LAYOUTS)[1:]
    assert [row[0] for row in rows] == list(LIVES)
    for life, *cells in rows:
        for layout, text in zip(head[1:], cells, strict=True):
            assert text.startswith("refused") == (life in REFUSED.get(layout, {})), (life, layout)
