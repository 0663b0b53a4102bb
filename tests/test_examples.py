"""Every script of examples/ runs as it stands, and its model learns."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import pylo_dist
from support.ranks import run_ranks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LISTED = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny"}
ON_RANKS = ("ddp", "zero", "fsdp2", "deepspeed_json")


def run(name: str, *words: str) -> str:
    """Run a script in this process; what it printed."""
    said, argv, path = io.StringIO(), sys.argv, list(sys.path)
    sys.argv, sys.path = [name, *words], [str(EXAMPLES), *sys.path]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path
    return said.getvalue()


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss'?:? '?([\d.]+)", said)]


def run_on_rank(rank: int, world: int, names: Sequence[str], folder: str) -> dict[str, str]:
    """What each has printed, one after the other in a process that has its group already."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    begin, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda: None
    said = {}
    for name in names:
        said[name] = run(name, f"{folder}/{name}")
    said["zero again"] = run("zero", f"{folder}/zero")
    dist.init_process_group, dist.destroy_process_group = begin, end
    return said


def test_examples_of_one_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = losses(run("plain"))
    assert len(found) == 3
    assert found[-1] < found[0] - 1.0
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
        found = losses(run("trainer", str(tmp_path)))
        assert found[2] < found[0] - 0.5


def test_examples_of_two_ranks(tmp_path: Path) -> None:
    # which, untrained, tries out that it runs
    pylo_dist.save_weights(tmp_path / "fsdp2", pylo_dist.random_weights("velo"))
    names = [n for n in ON_RANKS if n != "deepspeed_json" or importlib.util.find_spec("deepspeed")]
    said, other = run_ranks(2, run_on_rank, names, str(tmp_path))
    for name in names:
        found = losses(said[name])
        assert len(found) == 2, (name, said[name])
        assert found[1] < found[0] - (0.0 if name == "fsdp2" else 1.0), (name, found)
        assert losses(other[name]) == []
    assert losses(said["zero"]) == losses(said["ddp"])
    assert said["zero again"] == "goes on after step 40\n"


def test_every_example_is_listed_and_run() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert {name for name in LISTED if f"({name}.py)" in listed} == LISTED
    assert {*ON_RANKS, "plain", "trainer"} == LISTED
