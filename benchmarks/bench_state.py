"""What state in bfloat16 trains to, beside float32 state, and the figures of state_figures.py;
write results/state.json, a run or a figure at a time, and print its tables.

    python benchmarks/bench_state.py --weights FOLDER     all that is not there yet; an hour
    python benchmarks/bench_state.py --parts means step   these alone
    python benchmarks/bench_state.py --table              of what is there; measures nothing

FOLDER holds celo2.safetensors and celo.safetensors, whose numbers are no part of this repository.
The runs are those of bench_quality.py: one seed gives the same initial parameters, the same samples
in the same order and the same held-out samples to both. float32 runs that are in its JSON count
here, where settings and weights are the same; each says which commit it measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import state_figures
from bench_quality import (
    LEARNED,
    QUICK,
    SEEDS,
    TASKS,
    Ledger,
    Run,
    Task,
    at_hand,
    bytes_task,
    chosen,
    command_line,
)
from place import Place
from quality import final, mean_sd
from record import RESULTS, environment, markdown
from run import open_data

HALVED = ", bfloat16"  # after the name of an optimizer
LOSS_SHARE = 0.005  # of the float32 loss, that bfloat16's may be apart

Case = tuple[Task, str]  # and a name of LEARNED


_TASKS = {str(task): task for task in TASKS}
CASES: tuple[Case, ...] = (
    (_TASKS["bytes, 300 steps"], "AdafacLO, demo"),
    (
        bytes_task(
            "nano bytes",
            "byte-level GPT-2 of 0.12M parameters (preset nano), 8 x 64 bytes a step, built-in "
            "text",
            3000,
            preset="nano",
            batch_size=8,
        ),
        "AdafacLO, demo",
    ),
    (_TASKS["bytes, 1000 steps"], "CELO2"),
    (_TASKS["bytes, 1000 steps"], "Celo"),
)
QUICK_CASES: tuple[Case, ...] = ((QUICK[0], "AdafacLO, demo"),)


def runs(cases: Sequence[Case], seeds: Sequence[int], weights: Path | None) -> Iterator[Run]:
    """All of the gate: of a case and seed float32 state and bfloat16 state."""
    for task, name in cases:
        pair = {name: LEARNED[name], name + HALVED: {**LEARNED[name], "state_dtype": "bfloat16"}}
        found = at_hand(pair, task, weights)
        for seed in seeds:
            for one, flags in found.items():
                yield Run(task, one, flags, seed)


# ------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the seeds of a task and optimizer came to.

    Attributes:
        full, halved: mean and standard deviation of the last held-out losses.
        apart: of halved minus full, seed by seed.
        allowed: how far the means may be apart: 0.5 % of the loss, or one standard deviation of
            the seeds with float32 state, whichever is more.
    """

    seeds: int
    full: tuple[float, float]
    halved: tuple[float, float]
    apart: tuple[float, float]
    allowed: float

    @property
    def holds(self) -> bool:
        return abs(self.apart[0]) <= self.allowed


def verdict(records: Sequence[Mapping[str, Any]], task: str, name: str) -> Verdict:
    """Of the seeds that ran with both."""

    def losses(of: str) -> dict[int, float]:
        return {r["seed"]: final(r) for r in records if (r["task"], r["name"]) == (task, of)}

    full, halved = losses(name), losses(name + HALVED)
    both = sorted(full.keys() & halved.keys())
    own = mean_sd([full[seed] for seed in both])
    return Verdict(
        len(both),
        own,
        mean_sd([halved[seed] for seed in both]),
        mean_sd([halved[seed] - full[seed] for seed in both]),
        max(LOSS_SHARE * own[0], 0.0 if math.isnan(own[1]) else own[1]),
    )


def gate_table(result: Mapping[str, Any]) -> str:
    lines: list[Sequence[str]] = [
        (
            *("task", "optimizer", "float32 (sd)", "bfloat16 (sd)"),
            *("difference, seed by seed (sd)", "allowed", "seeds", "holds"),
        )
    ]
    records = result.get("runs", ())
    pairs = dict.fromkeys((r["task"], r["name"].removesuffix(HALVED)) for r in records)
    for task, name in pairs:
        v = verdict(records, task, name)
        if v.seeds:
            cells = (f"{m:.4f} ({sd:.4f})" for m, sd in (v.full, v.halved))
            apart = f"{v.apart[0]:+.4f} ({v.apart[1]:.4f})"
            last = (f"{v.allowed:.4f}", str(v.seeds), "yes" if v.holds else "no")
            lines.append((task, name, *cells, apart, *last))
    return markdown(lines)


@dataclass(frozen=True, slots=True)
class Part:
    """What stands beside the runs in the JSON: how it is measured (of the folder of weights and of
    whether it is quick), and its table.
    """

    what: str
    measure: Callable[[Path | None, bool], dict[str, Any]]
    table: Callable[[Mapping[str, Any]], str]


def updates(weights: Path | None, quick: bool) -> dict[str, Any]:
    """On the model and the first samples of the first case, seed 0."""
    task, name = (QUICK_CASES if quick else CASES)[0]
    options = Run(task, name, LEARNED[name], 0).options(None)
    tokens, _ = open_data(options, Place.find(options))
    size = task.flags["batch_size"]
    batches = [tokens.read(tokens.windows(0, 0, i, size)) for i in range(2 if quick else 20)]
    return state_figures.updates(options.config(), batches, weights)


PARTS = {
    "updates": Part(
        "distance of updates from those of float32 state, the same gradients (preset micro)",
        updates,
        state_figures.updates_table,
    ),
    "means": Part(
        "error of a mean m <- b m + (1 - b) x of normal numbers n in the long run, in units of "
        "the root mean square of the exact one",
        lambda _, quick: state_figures.means(*(((0.9,), 256) if quick else ())),
        state_figures.means_table,
    ),
    "peak": Part(
        "peak of a rank of ZeRO-2, 6.4M parameters in float32, gloo",
        lambda _, quick: state_figures.peak((2,) if quick else (2, 4)),
        state_figures.peak_table,
    ),
    "step": Part(
        "a step of VeLO in turns: CPU time of all threads, wall clock, CPU time of the passes",
        lambda _, quick: state_figures.step(quick),
        state_figures.step_table,
    ),
}


def report(result: Mapping[str, Any]) -> str:
    """Markdown of all tables of a result."""
    told = [f"**gate**: held-out loss after the last step.\n\n{gate_table(result)}"]
    for name, part in PARTS.items():
        if name in result:
            told.append(f"**{name}**: {part.what}.\n\n{part.table(result[name])}")
    return "\n\n".join(told)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(
        "Training with state in bfloat16 beside float32, and figures of it",
        "celo2.safetensors, celo.safetensors, celo_adam.safetensors",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("runs", *PARTS),
        metavar="PART",
        help=f"of runs, {', '.join(PARTS)} these alone; figures also where they are there",
    )
    parser.add_argument(
        "--quality",
        type=Path,
        default=RESULTS / "quality.json",
        help="JSON of bench_quality.py, whose float32 runs count",
    )
    args = parser.parse_args(argv)
    out = args.out or (RESULTS / "quick" if args.quick else RESULTS) / "state.json"
    cases, seeds = (QUICK_CASES, SEEDS[:1]) if args.quick else (CASES, SEEDS)
    if not args.table:
        head = {
            "what": "learned optimizers with state in bfloat16 beside float32: held-out loss, nats "
            "per byte, and figures of updates, means, memory and time",
            **environment(),
            "quick": args.quick,
            "tasks": {str(task): task.what for task, _ in cases},
            "seeds": list(seeds),
        }
        names = [(str(task), one) for task, name in cases for one in (name, name + HALVED)]
        ledger = Ledger(out, head, names)
        there = json.loads(out.read_text()) if out.is_file() else {}
        parts = args.parts or ["runs", *(name for name in PARTS if name not in there)]
        for name in parts:
            if name != "runs":
                measured = {**ledger.where, "load": head["load_average_before"]}
                found = PARTS[name].measure(args.weights, args.quick)
                ledger.put(name, {**found, "measured": measured})
        if "runs" in parts:
            todo = chosen(list(runs(cases, seeds, args.weights)), args.only)
            ledger.adopt(todo, args.quality)
            ledger.go_on(todo, args.weights)
    if not out.is_file():
        parser.error(f"nothing was run, and there is no {out}")
    print(report(json.loads(out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
