"""A run under torchrun follows the curve of a run on one process, and its replicated state is the
same on every rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import gpt2
import pytest
import torch
import torch.distributed as dist
from learner import Learner
from loop import train
from options import WrongInput, parse
from place import Place
from run import open_data
from watch import BESIDE, rows_until

from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SHARED = ["--preset", "nano", "--batch-size", "12", "--device", "cpu", "--threads", "1"]


def curves(command: list[str], num_ranks: int, folder: Path) -> dict[int, list[float]]:
    """Training and validation losses of a run in this process, and of the same under torchrun."""
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_ranks}",
        str(ROOT / "launch" / "gpt2.py"),
    ]
    assert gpt2.main([*command, "--out", str(folder / "1")]) == 0
    done = subprocess.run(
        [sys.executable, *torchrun, *command, "--out", str(folder / str(num_ranks))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for ranks in (1, num_ranks):
        rows = [
            json.loads(line)
            for line in (folder / str(ranks) / "metrics.jsonl").read_text().splitlines()
        ]
        found[ranks] = [row["loss"] for row in rows] + [
            row["val_loss"] for row in rows if "val_loss" in row
        ]
    return found


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        (["--optimizer", "adafaclo", "--weights", "demo"], 50),
        (["--optimizer", "adamw", "--max-grad-norm", "0.5"], 20),
    ],
    ids=["adafaclo", "adamw"],
)
def test_three_ranks_follow_one(
    optimizer: list[str], steps: int, tokens_folder: Path, tmp_path: Path
) -> None:
    command = [
        *SHARED,
        *optimizer,
        "--steps",
        str(steps),
        "--eval-every",
        str(steps),
        "--data",
        str(tokens_folder),
    ]
    found = curves(command, 3, tmp_path)
    assert len(found[1]) == steps + 1
    worst = max(abs(a - b) for a, b in zip(found[1], found[3], strict=True))
    print(f"{optimizer[1]}: 3 ranks and 1 differ by {worst:.1e} nats at most over {steps} steps")
    # The same samples; sums over ranks round in another order. 1e-4 of a loss is what a reader
    # cannot see.
    assert worst <= 1e-4
    assert found[1][-1] < found[1][0] - 1  # and the curve is one of learning


def test_leaving_ends_a_group_that_is_held_in_a_cycle(tmp_path: Path) -> None:
    """Kept until the process ends, its threads would now and then abort it: exit code 1 of a run
    that is done.
    """
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    cycle = [dist.group.WORLD]
    cycle.append(cycle)
    del cycle
    Place(rank=0, world_size=2, device=torch.device("cpu")).leave()
    assert group() is None


def lstm_after_a_run(
    rank: int, world: int, command: list[str]
) -> tuple[dict[str, str], float, float]:
    """Of the launcher's own run on this rank: sha256 of the loss means and of the LSTM rows that it
    keeps, how far these have moved at least, the first loss mean.
    """
    options = parse(command)
    place = Place(rank, world, torch.device("cpu"))
    learner = Learner(options, place)
    if world > 1:  # what rank 1 has otherwise is an error of all
        with pytest.raises(
            WrongInput, match=r"--seed of rank 1: 9, of rank 0: 0; all ranks need the same"
        ):
            place.agree((parse([*command, "--seed", "9"]) if rank else options).shared())
        folder = Path(command[command.index("--data") + 1])
        with pytest.raises(WrongInput, match=r"training tokens of rank 1: \w{64}, of rank 0: "):
            open_data(
                parse([*command, "--data", str(folder / "val.bin")]) if rank else options, place
            )
    data = open_data(options, place)
    train(learner, data, options, place, options.plan(world), None)
    inner = learner.optimizer.inner if world > 1 else learner.optimizer
    initial, moved, digests = inner.weights.tensors, [], {}

    def keep(what: str, tensor: torch.Tensor) -> None:
        digests[what] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    for binding, param in inner.layouts():
        for i, name in enumerate(("lstm_hidden", "lstm_cell")):
            row = inner.state[param][name]
            assert len(row) == (len(initial[f"lstm_init_state.{i}"][0]) if param.numel() else 0)
            if len(row):
                keep(f"{name} of {binding.shard.fqn}", row)
                moved.append(float((row - initial[f"lstm_init_state.{i}"][0]).abs().max()))
    means = inner.param_groups[0]["loss_means"]
    keep("loss_means", means)
    return digests, min(moved), float(means[0])


def test_velo_on_two_ranks(
    learned_weights: dict[str, Path], tokens_folder: Path, tmp_path: Path
) -> None:
    command = [
        *SHARED,
        "--optimizer",
        "velo",
        "--weights",
        str(learned_weights["velo"]),
        "--data",
        str(tokens_folder),
    ]
    command += ["--steps", "3", "--eval-every", "0"]
    found = curves([*command, "--beside", "adamw"], 2, tmp_path)
    assert len(found[1]) == 3
    assert max(abs(a - b) for a, b in zip(found[1], found[2], strict=True)) <= 1e-4
    one, two = (
        [row.loss for row in rows_until(tmp_path / ranks / BESIDE, 3)] for ranks in ("1", "2")
    )
    assert len(one) == 3
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-4
    ranks = run_ranks(2, lstm_after_a_run, command)
    whole, moved, mean = lstm_after_a_run(0, 1, command)
    assert moved > 0.01
    (first, *of_first), (second, *of_second) = ranks
    assert first.keys() | second.keys() == whole.keys()
    shared = first.keys() & second.keys()
    assert len(whole) > len(shared) > 1  # a tensor that was cut, and the means
    assert all(first[what] == second[what] for what in shared)
    assert min(of_first[0], of_second[0]) == pytest.approx(moved, rel=1e-5)
    assert of_first[1] == of_second[1] == pytest.approx(mean, rel=1e-5)
    # The first of VeLO's running means forgets with exp(-1 / 10): each rank gave the loss of its
    # own samples, and it is of all.
    wanted = 0.0
    for loss in found[1]:
        wanted += (1 - math.exp(-0.1)) * (loss - wanted)
    assert mean == pytest.approx(wanted, rel=1e-5)
