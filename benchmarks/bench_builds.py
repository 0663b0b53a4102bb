"""What a change costs: this checkout's step beside that of another one, in one run.

    git worktree add ../before acc4d19      # with compiled passes built in it
    python benchmarks/bench_builds.py --other ../before

Each case has the processes of both builds alive at once, and lets them take a few steps in turns,
the order alternating, so that a busy machine slows both alike. Figures are CPU milliseconds of all
ranks per step, since waiting for a rank that got no core is no cost of a build, and ratios this
build / the other: of medians over all turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import torch.distributed as dist
import turns
from torch import nn

CASES = (  # optimizer, layout, tensors
    ("AdafacLO", "plain", "many"),
    ("VeLO", "plain", "many"),
    ("AdafacLO", "plain", "layers"),
    ("AdafacLO", "zero1", "many"),
    ("AdafacLO", "zero1", "layers"),
    ("AdafacLO", "zero2", "layers"),
    ("VeLO", "zero1", "layers"),
)
RANKS = 2  # of the sharded layouts


class Many(nn.Module):
    """300 matrices of 16 x 16: what a step costs per tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(0.02 * torch.randn(16, 16) for _ in range(300))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x @ matrix for matrix in self.matrices])


class Layers(nn.Sequential):
    """8 layers of 384 x 384, 1.2M parameters: what it costs per element."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(384, 384), nn.GELU()) for _ in range(8)))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "many": (Many, 16),
    "layers": (Layers, 384),
}


# ------------------------------------------------------------------------------------ in a process


def worker(name: str, layout: str, tensors: str) -> None:
    """One rank of one build: a line of standard input is a number of steps, the answer CPU s."""
    import pylo_dist  # from the checkout that PYTHONPATH names
    from support.golden import velo_weights

    torch.set_num_threads(1)
    if layout != "plain":
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    make, width = MODELS[tensors]
    model, x = make(), torch.randn(8, width)
    settings: dict[str, Any] = {"weights": "demo"}
    if name == "VeLO":
        settings = {"weights": velo_weights("release"), "num_steps": 10_000}
    if layout == "plain":
        optimizer = getattr(pylo_dist, name)(model.named_parameters(), **settings)
    else:
        optimizer = pylo_dist.ZeroOptimizer(
            model, getattr(pylo_dist, name), stage=int(layout[-1]), bucket_cap_mb=1, **settings
        )

    def step() -> None:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step(loss.detach())

    def step_alone() -> None:  # on gradients that stay
        optimizer.step(torch.tensor(1.0))

    if layout == "plain":
        model(x).square().mean().backward()
    take = step_alone if layout == "plain" else step
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.process_time()
        for _ in range(int(line)):
            take()
        print(time.process_time() - begin, flush=True)


# --------------------------------------------------------------------------------- of both builds


def measured(case: tuple[str, str, str], other: Path, count: int, steps: int) -> dict[str, Any]:
    """One row: milliseconds of both, and their ratio."""
    name, layout, tensors = case
    ranks = 1 if layout == "plain" else RANKS
    spent: list[list[float]] = [[], []]
    with turns.both_builds(other, Path(__file__), case, ranks) as builds:
        for build in builds:
            build.ask("2")
        for i in turns.in_turns(count):
            spent[i].append(1e3 * sum(map(float, builds[i].ask(str(steps)))) / steps)
    mine, theirs = map(median, spent)
    return {
        "optimizer": name,
        "layout": layout,
        "tensors": tensors,
        "this_ms": mine,
        "other_ms": theirs,
        "ratio": mine / theirs,
        "ratio_of_minima": min(spent[0]) / min(spent[1]),
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = turns.command_line(
        "Steps of this checkout beside another's.", 20, record.RESULTS / "builds.json"
    )
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    args = turns.parsed(parser, argv, worker)
    if args is None:
        return {}
    return turns.write(
        "CPU milliseconds of a step, all ranks together: this checkout and another one, in turns "
        "within one run, medians",
        args,
        {"turns": args.turns, "steps": args.steps, "ranks": RANKS},
        CASES,
        lambda case: [measured(case, args.other, args.turns, args.steps)],
        ".3f",
    )


if __name__ == "__main__":
    main()
