"""`--parallel`: every layout follows the curve of one rank, and wrong meshes are refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpt2
import parallel
import pytest
import torch
from options import WrongInput, parse
from ranks import run_ranks
from watch import Row

FLAGS = ["--preset", "nano", "--batch-size", "4", "--block-size", "32", "--device", "cpu", "--qkv", "split", "--eval-every", "0"]
VELO = ["--optimizer", "velo", "--max-grad-norm", "1"]
ADAMW = ["--optimizer", "adamw", "--max-grad-norm", "0.5"]
LAYOUTS = {
    "fsdp2": ["--parallel", "fsdp2"],
    "hsdp": ["--parallel", "hsdp", "--replicas", "2"],
    "tp": ["--parallel", "tp", "--tp", "2"],
    "ddp": ["--parallel", "ddp"],
}


class Rows:
    """In the place of a run's folder."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)


def losses(rank: int, world: int, command: list[str]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of the launcher's own loop: the loss of every step, and the whole model behind the last."""
    options = parse(command)
    place = gpt2.Place(rank, world, torch.device("cpu"))
    learner = gpt2.Learner(options, place)
    rows: Any = Rows()
    plan = options.plan(parallel.data_ranks(options, world))
    gpt2.train(learner, gpt2.open_data(options, place), options, place, plan, rows)
    model = parallel.whole_model(learner.model, options, place.device)
    return [row.loss for row in rows.rows], {name: p.detach().clone() for name, p in model.named_parameters()}


def all_losses(rank: int, world: int, more: list[str]) -> dict[str, Any]:
    runs = {f"{name} velo": losses(rank, world, [*FLAGS, *VELO, *more, *flags]) for name, flags in LAYOUTS.items()}
    adamw = [*FLAGS, *ADAMW, *more[:-2]]
    return runs | {f"{name} adamw": losses(rank, world, [*adamw, *LAYOUTS[name]]) for name in ("hsdp", "tp")}


def test_every_layout_follows_one_rank(learned_weights: dict[str, Path], tokens_folder: Path) -> None:
    more = ["--steps", "6", "--data", str(tokens_folder), "--weights", str(learned_weights["velo"])]
    ranks = run_ranks(4, all_losses, more)
    one = {"velo": losses(0, 1, [*FLAGS, *VELO, *more]), "adamw": losses(0, 1, [*FLAGS, *ADAMW, *more[:-2]])}
    for result in ranks:
        for name, (curve, model) in result.items():
            wanted, whole = one[name.split()[1]]
            assert len(curve) == 6
            # sums over ranks round in another order; 1e-4 of a loss is what a reader cannot see
            assert max(abs(a - b) for a, b in zip(curve, wanted, strict=True)) <= 1e-4, name
            assert model.keys() == whole.keys()
            assert all(torch.equal(p, ranks[0][name][1][key]) for key, p in model.items()), name
    assert one["adamw"][0][-1] < one["adamw"][0][0] - 0.1
    assert len(set(one["velo"][0])) == 6


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--tp", "2"], "--tp is for --parallel tp and means nothing to zero1"),
        (["--parallel", "fsdp2", "--replicas", "2"], "--replicas is for --parallel hsdp"),
        (["--parallel", "hsdp", "--replicas", "3"], "--replicas 3 does not divide 4 ranks"),
        (["--parallel", "tp", "--tp", "3"], "--tp 3 does not divide 4 ranks"),
        (["--parallel", "tp", "--n-head", "2"], "--tp 4 does not divide the 2 heads"),
    ],
)
def test_wrong_meshes(flags: list[str], match: str, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=match):
        parallel.data_ranks(parse([*FLAGS, *flags, "--out", str(tmp_path / "run")]), 4)
