"""Checkpoints that earlier versions wrote, and newer ones of torch, loaded to the bit: folders, and
state dicts that went through torch.save.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pylo_dist
from pylo_dist import checkpoint

SAVED = Path(__file__).parent / "saved"

_spec = importlib.util.spec_from_file_location("write", SAVED / "write.py")
assert _spec is not None
assert _spec.loader is not None
write = importlib.util.module_from_spec(_spec)  # it uses the public contract alone
_spec.loader.exec_module(write)

FOLDERS = sorted(path.parent for path in SAVED.glob("*/*/checkpoint"))
STATES = sorted(path.parent for path in SAVED.glob("*/*/state.pt"))
ZERO = "_zero2_bfloat16"


def build(folder: Path, zero: bool = False) -> tuple[Any, Any]:
    return write.build(folder.name.removesuffix(ZERO), zero=zero or folder.name.endswith(ZERO))


def assert_same(model: Any, state: dict[str, Any], folder: Path) -> None:
    wanted, found = load_file(folder / "expected.safetensors"), write.flat(model, state)
    assert set(wanted) <= set(found)  # newer versions may keep more
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_there_are_checkpoints_of_every_optimizer() -> None:
    assert {folder.name for folder in FOLDERS} >= {*write.OPTIMIZERS, f"adafac{ZERO}"}
    assert {folder.name for folder in STATES} >= {*write.OPTIMIZERS}


@pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_a_folder_loads_to_the_bit(folder: Path) -> None:
    model, optimizer = build(folder)
    checkpoint.load(folder / "checkpoint", {"model": model, "optimizer": optimizer})
    assert_same(model, pylo_dist.full_state_dict(optimizer), folder)
    write.step(model, optimizer, write.STEPS)  # and it goes on
    assert int(optimizer.param_groups[0]["step"]) == write.STEPS + 1


@pytest.mark.parametrize("folder", STATES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_state_dict_loads_to_the_bit(folder: Path) -> None:
    model, optimizer = build(folder)
    checkpoint.load(folder / "checkpoint", {"model": model})
    optimizer.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    assert_same(model, optimizer.state_dict(), folder)
