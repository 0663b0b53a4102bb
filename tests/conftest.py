"""Shared fixtures: golden files, seeded weights, and figures printed at the end of the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
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


def small_fc_tensors(file: np.lib.npyio.NpzFile) -> dict[str, Tensor]:
    """The meta-network of a small_fc golden file, (in, out) there, under the names of API and PyLO, (out, in)."""
    layers = {"network.input": 0, "network.linear_0": 1, "network.output": 2}
    tensors = {}
    for name, i in layers.items():
        tensors[f"{name}.weight"] = torch.tensor(np.ascontiguousarray(file[f"w{i}"].T))
        tensors[f"{name}.bias"] = torch.tensor(file[f"b{i}"])
    return tensors


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, Tensor]:
    with np.load(GOLDEN / "small_fc_f32.npz") as file:
        return small_fc_tensors(file)
