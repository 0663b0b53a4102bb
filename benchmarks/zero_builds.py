"""bench_zero.py of this checkout beside that of another one, in turns within one run; write
results/zero_builds.json.

    git worktree add ../before acc4d19      # with compiled passes built in it
    python benchmarks/zero_builds.py --other ../before

Every turn runs the script of each checkout once, the order alternating. CPU figures are of all
ranks and threads; those of phases are wall-clock means over ranks, so a machine that is shared
makes them longer than they are. Ratios are of medians over turns, this build / the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import record
import turns
from record import ROOT

# name of the case, and what bench_zero.py is told
CASES = (
    ("mini, 2 ranks", "--preset", "mini", "--ranks", "2"),
    ("mini, 4 ranks", *("--preset", "mini", "--ranks", "4", "--only"), "ZeRO-2 VeLO", "DDP + VeLO"),
)
PHASES = ("reduce-scatter: pack", "B", "C")


def figures(root: Path, words: Sequence[str], rounds: int) -> dict[tuple[str, str], float]:
    """By contender and figure: milliseconds of one run of the script of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "zero.json"
        done = subprocess.run(
            [
                *(sys.executable, str(root / "benchmarks" / "bench_zero.py"), *words),
                *("--rounds", str(rounds), "--no-profiles", "--out", str(out)),
            ],
            env=turns.environment(
                root, *(root / name for name in ("benchmarks", "tests", "launch"))
            ),
            cwd=folder,  # where ranks look first: the folder of a checkout would bring its package
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"bench_zero.py of {root} failed; its error is above")
        (run,) = json.loads(out.read_text())["runs"]
    found = {}
    for name, row in run["contenders"].items():
        found[name, "CPU of all ranks"] = row["cpu_ms_of_all_ranks"]
        found |= {(name, p): row["phases_ms"][p] for p in PHASES if row["phases_ms"].get(p)}
    return found


def compared(case: tuple[str, ...], other: Path, count: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of a case: medians of both, their ratio, and for whole steps this build's over its
    own replicated run, where the case has one.
    """
    called, *words = case
    taken: list[list[dict[tuple[str, str], float]]] = [[], []]
    for i in turns.in_turns(count):
        taken[i].append(figures((ROOT, other)[i], words, rounds))
    rows = []
    for name, figure in taken[0][0]:
        both = [median(run[name, figure] for run in runs) for runs in taken]
        # beside whole tensors of the same optimizer under DDP, in the same run
        beside = f"DDP + {name.split()[-1]}", figure
        over = [
            median(run[name, figure] / run[beside] for run in runs) if beside in runs[0] else ""
            for runs in taken
        ]
        rows.append(
            {
                "case": called,
                "contender": name,
                "figure": f"{figure}, ms",
                "this": both[0],
                "other": both[1],
                "ratio": both[0] / both[1],
                "this / DDP": over[0],
                "other / DDP": over[1],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = turns.command_line(
        "Steps of ZeroOptimizer by phase, of this checkout beside another's.",
        3,
        record.RESULTS / "zero_builds.json",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of bench_zero.py, in a turn")
    args = turns.checked(parser, parser.parse_args(argv))
    return turns.write(
        "bench_zero.py of this checkout and another one, in turns within one run: milliseconds of "
        "a step, CPU time or a phase; medians over turns, and over the replicated run beside it",
        args,
        {
            "turns": args.turns,
            "rounds": args.rounds,
            "cases": {name: words for name, *words in CASES},
        },
        CASES,
        lambda case: compared(case, args.other, args.turns, args.rounds),
        ".3f",
    )


if __name__ == "__main__":
    main()
