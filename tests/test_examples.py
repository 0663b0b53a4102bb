"""Every script of examples/ runs as it stands, and its model learns."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch.distributed as dist

import pylo_dist
from support.ranks import run_ranks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LISTED = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny"}
# What runs on ranks of one start, in this order, with the package that it needs.
ON_RANKS = {
    "ddp": None,
    "zero": None,
    "fsdp2": None,
    "hsdp": None,
    "tp": None,
    "deepspeed_json": "deepspeed",
    "accelerate_ddp": "accelerate",
}
ONE_RESULT = ("ddp", "zero", "hsdp"), ("fsdp2", "accelerate_ddp")  # as they do the same
UNTRAINED = ("fsdp2", "accelerate_ddp", "lightning_fsdp2")  # their weights here are random
# What starts its own processes: the package, and the ranks that torchrun is to start.
HEAVY = {
    "lightning_ddp": ("lightning", 0),
    "lightning_fsdp2": ("lightning", 0),
    "ray_train": ("ray", 0),
    "torchtitan_container": ("torchtitan", 2),
    "timm_vit": ("timm", 0),
}


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


@cache
def plain() -> list[float]:
    return losses(run("plain"))


def losses(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss'?:? '?([\d.]+)", said)]


def run_on_rank(rank: int, world: int, names: Sequence[str], folder: str) -> dict[str, str]:
    """What each has printed, one after the other in a process that has its group already."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    begin, end = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    said = {}
    for name in names:
        said[name] = run(name, f"{folder}/{name}")
    said["zero again"] = run("zero", f"{folder}/zero")
    dist.init_process_group, dist.destroy_process_group = begin, end
    return said


def test_examples_of_one_process(tmp_path: Path) -> None:
    found = plain()
    assert len(found) == 3
    assert found[-1] < found[0] - 1.0
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate"):
        found = losses(run("trainer", str(tmp_path)))
        assert found[2] < found[0] - 0.5


def test_examples_of_two_ranks(tmp_path: Path) -> None:
    for name in UNTRAINED:
        pylo_dist.save_weights(tmp_path / name, pylo_dist.random_weights("velo"))
    names = [n for n, needs in ON_RANKS.items() if not needs or importlib.util.find_spec(needs)]
    said, other = run_ranks(2, run_on_rank, names, str(tmp_path))
    for name in names:
        found = losses(said[name])
        assert len(found) == 2, (name, said[name])
        assert name in UNTRAINED or found[1] < found[0] - 1.0, (name, found)
        assert losses(other[name]) == []
    for alike in ONE_RESULT:
        assert len({tuple(losses(said[name])) for name in alike if name in names}) == 1, alike
    assert losses(said["tp"]) == plain()[:2]  # of one set of data
    assert said["zero again"] == "goes on after step 40\n"


@pytest.mark.parametrize("name", HEAVY)
def test_examples_that_start_their_processes(name: str, tmp_path: Path) -> None:
    """Only where their packages are installed, as by the job "doors" of .github/workflows."""
    needs, ranks = HEAVY[name]
    pytest.importorskip(needs, reason=f"{needs} is not installed")
    if name in UNTRAINED:
        pylo_dist.save_weights(tmp_path, pylo_dist.random_weights("velo"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [sys.executable, *torchrun[: 4 * bool(ranks)], EXAMPLES / f"{name}.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = losses(done.stdout)
    assert len(found) >= 2, done.stdout
    assert name in UNTRAINED or found[-1] < found[0] - 0.9, (name, found)


def test_every_example_is_listed_and_run() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert {name for name in LISTED if f"({name}.py)" in listed} == LISTED
    assert {*ON_RANKS, *HEAVY, "plain", "trainer"} == LISTED
