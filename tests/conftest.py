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
    """Lines that the terminal summary prints: what the parity, virtual-rank and real-rank tests
    measured.
    """
    lines: list[str] = []
    yield lines
    # they travel with the report, also from other workers
    request.node.user_properties += [(FIGURE, line) for line in lines]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end."""
    long = (
        *(
            "test_virtual_ranks",
            "test_environment",
            "test_ds",
            "test_real_ranks",
            "test_resume_loop",
            "test_checkpoint",
        ),
        *(
            "test_zero_backward",
            "test_zero",
            "test_deepspeed_checkpoint",
            "test_deepspeed",
            "test_fibers",
            "test_kernels",
        ),
        *(
            "test_resume",
            "test_gpt2",
            "test_shard",
            "test_ranks",
            "test_parallel",
            "test_benchmarks",
            "test_hf",
        ),
    )
    items.sort(key=lambda item: long.index(item.path.stem) if item.path.stem in long else len(long))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        FIGURES.extend(str(value) for name, value in report.user_properties if name == FIGURE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("measured")
        for line in sorted(FIGURES):
            terminalreporter.write_line(line)
