"""The compiled passes of a CPU: this checkout's beside those of another one, in one run.

    git worktree add ../before 4df57e0      # with compiled passes built in it
    python benchmarks/bench_passes.py --other ../before

One matrix that the last-level cache holds, in the processes of both builds, which work in turns: an
optimizer's own calls of its operators, one operator after the other many times. Figures are CPU
nanoseconds per element on one thread, medians over the turns, their sum, and ratios this build /
the other.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import turns
from torch.utils._python_dispatch import TorchDispatchMode

CASES = tuple(
    (name, instructions, "512x512")
    for instructions in ("avx512", "avx2")
    for name in ("AdafacLO", "VeLO", "CELO2")
)
PASSES = {"gradient_pass": "A", "feature_pass": "B", "update_pass": "C"}
CALLS = 5  # of an operator in a turn
STARTS = 3  # of the processes: where memory comes to lie changes a pass by a few percent


# ------------------------------------------------------------------------------------ in a process


class Calls(TorchDispatchMode):
    """Keeps the calls of this package's operators, by letter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Callable[[], object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pylo_dist" and (name := func.name().split("::")[1]) in PASSES:
            self.calls[PASSES[name]] = partial(func, *args)
        return func(*args, **(kwargs or {}))


def worker(name: str, instructions: str, shape: str) -> None:
    """A line of standard input is a number of calls, the answer CPU seconds of one of each pass."""
    import pylo_dist  # from the checkout that PYTHONPATH names

    torch.set_num_threads(1)
    torch.manual_seed(0)
    architecture = {"AdafacLO": "small_fc", "VeLO": "velo", "CELO2": "celo2"}[name]
    sizes = {"H": 512, "P": 256} if name == "VeLO" else None  # as published
    settings: dict[str, Any] = {
        "weights": pylo_dist.random_weights(architecture, sizes=sizes).tensors
    }
    if name == "VeLO":
        settings["num_steps"] = 100_000
    if name == "CELO2":
        settings["orthogonalize"] = False
    param = torch.nn.Parameter(0.02 * torch.randn(*map(int, shape.split("x"))))
    param.grad = 1e-2 * torch.randn(param.shape)
    optimizer = getattr(pylo_dist, name)([param], **settings)
    with Calls() as kept:
        optimizer.step(torch.tensor(1.0))
    torch.ops.pylo_dist.instruction_set(instructions)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = {}
        for letter, call in kept.calls.items():
            call()  # brings the matrix into the cache
            begin = time.process_time()
            for _ in range(int(line)):
                call()
            seconds[letter] = (time.process_time() - begin) / int(line)
        print(json.dumps(seconds), flush=True)


# --------------------------------------------------------------------------------- of both builds


def measured(
    case: tuple[str, str, str], other: Path, count: int, starts: int = STARTS
) -> dict[str, Any]:
    """One row: nanoseconds of every pass of both, and their ratios."""
    name, instructions, shape = case
    rows, columns = map(int, shape.split("x"))
    spent: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    for _ in range(starts):
        with turns.both_builds(other, Path(__file__), case) as builds:
            for i in turns.in_turns(count):
                seconds = json.loads(builds[i].ask(str(CALLS))[0])
                for letter, of_call in {**seconds, "all": sum(seconds.values())}.items():
                    spent[i][letter].append(1e9 * of_call / (rows * columns))
    row: dict[str, Any] = {"optimizer": name, "instructions": instructions, "matrix": shape}
    for letter in (*PASSES.values(), "all"):
        mine, theirs = (median(build[letter]) for build in spent)
        row |= {f"{letter}_ns": mine, f"{letter}_other_ns": theirs}
        row[f"{letter}_ratio"] = mine / theirs
    return row


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = turns.command_line(
        "Compiled passes of this checkout beside another's.", 10, record.RESULTS / "passes.json"
    )
    args = turns.parsed(parser, argv, worker)
    if args is None:
        return {}
    return turns.write(
        "CPU nanoseconds per element of the compiled passes on one thread: this checkout and "
        "another one, in turns within one run, medians",
        args,
        {"turns": args.turns, "calls": CALLS, "starts": STARTS},
        CASES,
        lambda case: [measured(case, args.other, args.turns)],
        ".3f",
    )


if __name__ == "__main__":
    main()
