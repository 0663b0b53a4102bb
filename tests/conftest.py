"""Settings of the whole suite, and figures printed at the end of the run."""

from __future__ import annotations

import pytest
import torch

FIGURES: list[str] = []

torch.set_num_threads(1)  # the tensors here are tiny: more threads only wait for each other


@pytest.fixture(scope="session")
def figures() -> list[str]:
    """Lines that the terminal summary prints: what the parity, virtual-rank and real-rank tests measured."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("measured")
        for line in FIGURES:
            terminalreporter.write_line(line)
