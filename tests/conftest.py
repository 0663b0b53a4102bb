"""Settings of the whole suite, and figures printed at the end of the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

FIGURE = "figure"
FIGURES: list[str] = []

torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines that the terminal summary prints: what the parity, virtual-rank and real-rank tests measured."""
    lines: list[str] = []
    yield lines
    request.node.user_properties += [(FIGURE, line) for line in lines]  # they travel with the report, also from other workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests first, so that no worker is left alone with one at the end."""
    long = (
        "test_zero",
        "test_checkpoint",
        "test_virtual_ranks",
        "test_own_rule",
        "test_ranks",
        "test_gpt2",
        "test_dtensor",
        "test_shard",
    )
    items.sort(key=lambda item: item.path.stem not in long)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        FIGURES.extend(str(value) for name, value in report.user_properties if name == FIGURE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("measured")
        for line in sorted(FIGURES):
            terminalreporter.write_line(line)
