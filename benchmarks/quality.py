"""What the runs of bench_quality.py came to: means over seeds, and their tables. Reads what JSON
held, trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import mean, stdev
from typing import Any

import numpy as np
from record import markdown

TUNED = ("AdamW", "Muon")  # what has several rates; the first is what others are compared with
Record = Mapping[str, Any]
HEAD = (
    "optimizer",
    "held-out loss",
    "sd",
    "minus tuned AdamW (sd)",
    "at its CPU time",
    "seeds",
    "CPU s a run",
    "optimizer's share",
)


def key(record: Record) -> str:
    """Of a record the `str` of its run."""
    return f"{record['task']}, {record['name']}, seed {record['seed']}"


def final(record: Record) -> float:
    """The held-out loss after the last step; inf where the run diverged."""
    return math.inf if record["diverged_at"] else list(record["val_loss"].values())[-1]


def seconds(record: Record) -> float:
    """CPU seconds until the last validation; inf where the run diverged."""
    return math.inf if record["diverged_at"] else list(record["cpu_s"].values())[-1]


def loss_at(record: Record, cpu_s: float) -> float:
    """The held-out loss after so many CPU seconds, on a straight line between validations; of a run
    that had ended by then its last, of one that diverged inf.
    """
    if record["diverged_at"]:
        return math.inf
    return float(
        np.interp(cpu_s, list(record["cpu_s"].values()), list(record["val_loss"].values()))
    )


def family(name: str) -> str:
    """A name without its rate."""
    word = name.split()[0]
    return word if word in TUNED else name


def wanted(
    records: Sequence[Record], contenders: Sequence[str], seeds: Sequence[int]
) -> set[tuple[str, int]]:
    """(contender, seed) of the runs that a task wants, whose `records` there are so far: rates are
    searched on the first seed, and the best of each goes on to the others, once all its rivals have
    run.
    """
    first, *others = seeds
    known = {record["name"]: final(record) for record in records if record["seed"] == first}
    rates: dict[str, list[str]] = {}
    for name in contenders:
        rates.setdefault(family(name), []).append(name)
    chosen = [
        min(names, key=lambda name: known.get(name, 0.0))
        for whole, names in rates.items()
        if names == [whole] or all(name in known for name in names)
    ]
    return {*product(contenders, [first]), *product(chosen, others)}


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; nan where there are too few values, or one is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return mean(values), stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the runs of one optimizer at one rate came to in a task, over its seeds. nan: not known,
    or it diverged.

    Attributes:
        is_best_rate: of those of its family that ran with the most seeds, by the loss.
        loss, apart: mean and standard deviation of the last held-out loss, and of its difference
            from AdamW's at the best rate, seed by seed.
        loss_at: mean of the loss after the CPU seconds that this AdamW took for all of its run.
        steps, losses, cpu_s: the mean curve, by validation.
    """

    seeds: int
    diverged: int
    is_best_rate: bool
    loss: tuple[float, float]
    apart: tuple[float, float]
    loss_at: float
    optimizer_share: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    cpu_s: tuple[float, ...]


def outcomes(records: Sequence[Record]) -> dict[str, Outcome]:
    """By name what the `records` of one task came to."""
    by_name: dict[str, dict[int, Record]] = {}
    for record in records:
        by_name.setdefault(record["name"], {})[record["seed"]] = record
    best: dict[str, str] = {}
    for name in sorted(
        by_name, key=lambda n: (-len(by_name[n]), mean(map(final, by_name[n].values())))
    ):
        best.setdefault(family(name), name)
    tuned = by_name.get(best.get(TUNED[0], ""), {})
    found = {}
    for name, own in by_name.items():
        pairs = [(record, tuned[seed]) for seed, record in own.items() if seed in tuned]
        whole = [record for record in own.values() if not record["diverged_at"]]
        steps = list(whole[0]["val_loss"]) if whole else []
        found[name] = Outcome(
            len(own),
            len(own) - len(whole),
            best[family(name)] == name,
            mean_sd([final(record) for record in own.values()]),
            mean_sd([final(record) - final(rival) for record, rival in pairs]),
            mean_sd([loss_at(record, seconds(rival)) for record, rival in pairs])[0],
            mean(record["optimizer_share"] for record in own.values()),
            tuple(map(int, steps)),
            tuple(mean(record["val_loss"][step] for record in whole) for step in steps),
            tuple(mean(record["cpu_s"][step] for record in whole) for step in steps),
        )
    return found


def table(found: Mapping[str, Outcome]) -> str:
    """Markdown of the `outcomes` of one task; the best rates are bold."""

    def shown(value: float, digits: str) -> str:
        return "-" if math.isnan(value) else format(value, digits)

    lines: list[Sequence[str]] = [HEAD]
    for name, row in found.items():
        loss, apart = shown(row.loss[0], ".3f"), shown(row.apart[0], "+.3f")
        lines.append(
            [
                f"**{name}**" if row.is_best_rate and family(name) != name else name,
                f"diverged in {row.diverged} of {row.seeds}" if row.diverged else loss,
                shown(row.loss[1], ".3f"),
                apart if math.isnan(row.apart[1]) else f"{apart} ({row.apart[1]:.3f})",
                shown(row.loss_at, ".3f"),
                str(row.seeds),
                f"{row.cpu_s[-1]:.0f}" if row.cpu_s else "-",
                f"{row.optimizer_share:.0%}",
            ]
        )
    return markdown(lines)


def report(result: Record) -> str:
    """Markdown of all tasks of a result of bench_quality.py, and what has not been run."""
    parts, lacking = [], []
    contenders, seeds = result["contenders"], result["seeds"]
    number = len(contenders) + len(set(map(family, contenders))) * (len(seeds) - 1)
    for task, what in result["tasks"].items():
        own = [record for record in result["runs"] if record["task"] == task]
        if own:
            parts.append(f"**{task}**: {what}.\n\n{table(outcomes(own))}")
        done = {(record["name"], record["seed"]) for record in own}
        done &= wanted(own, contenders, seeds)
        if len(done) < number:
            lacking.append(f"{task} ({len(done)} of {number} runs are there)")
    if lacking:
        parts.append(f"Not complete: {'; '.join(lacking)}.")
    return "\n\n".join(parts)
