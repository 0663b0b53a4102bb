"""What the runs of bench_quality.py came to: means over seeds, tables. Reads what JSON held, trains
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
from record import markdown

TUNED = ("AdamW", "Muon")  # what has several rates
Record = Mapping[str, Any]


def key(record: Record) -> str:
    """Of a record the `str` of its run."""
    return f"{record['task']}, {record['name']}, seed {record['seed']}"


def final(record: Record) -> float:
    """The held-out loss after the last step; inf where the run diverged."""
    losses = list(record["val_loss"].values())
    return math.inf if record["diverged_at"] is not None else losses[-1]


def at(record: Mapping[str, Any], seconds: float) -> float:
    """The held-out loss after so many CPU seconds, between validations on a straight line; of a
    run that had ended by then its last.
    """
    spent, losses = list(record["cpu_s"].values()), list(record["val_loss"].values())
    return float(np.interp(seconds, spent, losses)) if losses else math.inf


def family(name: str) -> str:
    """A name without its rate."""
    word = name.split()[0]
    return word if word in TUNED else name


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the runs of one task came to, by name, over the seeds: see `table` for the words."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for record in found:
        by_name.setdefault(record["name"], []).append(record)
    finals = {name: {r["seed"]: final(r) for r in own} for name, own in by_name.items()}
    best: dict[str, str] = {}
    for name in by_name:
        rival = best.get(family(name), name)
        if (-len(finals[name]), mean(finals[name].values())) <= (
            -len(finals[rival]),
            mean(finals[rival].values()),
        ):
            best[family(name)] = name
    tuned = best.get("AdamW")
    came: dict[str, dict[str, Any]] = {}
    for name, own in by_name.items():
        whole = [r for r in own if r["diverged_at"] is None]
        steps = min((list(r["val_loss"]) for r in whole), key=len, default=[])
        losses = [final(r) for r in whole]
        common = sorted(set(finals[name]) & set(finals.get(tuned or "", {})))
        apart = [finals[name][seed] - finals[tuned][seed] for seed in common if tuned]
        equal = [
            at(r, list(a["cpu_s"].values())[-1])
            for r in own
            for a in by_name.get(tuned or "", [])
            if a["seed"] == r["seed"] and a["diverged_at"] is None
        ]
        came[name] = {
            "seeds": len(own),
            "diverged": len(own) - len(whole),
            "is_best_rate": best[family(name)] == name,
            "loss": round(mean(losses), 4) if losses else None,
            "sd": round(stdev(losses), 4) if len(losses) > 1 else None,
            "minus_adamw": round(mean(apart), 4) if apart and math.isfinite(sum(apart)) else None,
            "minus_adamw_sd": round(stdev(apart), 4)
            if len(apart) > 1 and math.isfinite(sum(apart))
            else None,
            "loss_at_adamws_cpu_time": round(mean(equal), 4) if equal else None,
            "cpu_s": round(mean(list(r["cpu_s"].values())[-1] for r in whole), 1)
            if whole
            else None,
            "optimizer_share": round(mean(r["optimizer_share"] for r in own), 3),
            "curve": {
                step: [
                    round(mean(r["val_loss"][step] for r in whole), 4),
                    round(mean(r["cpu_s"][step] for r in whole), 2),
                ]
                for step in steps
            },
        }
    return came


def table(task: str, what: str, came: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of a `summary`. A best rate is bold."""

    def shown(value: float | None, format_: str) -> str:
        return "-" if value is None else format(value, format_)

    lines = [
        [
            "optimizer",
            "held-out loss",
            "sd",
            "minus tuned AdamW (sd)",
            "at its CPU time",
            "seeds",
            "CPU s a run",
            "optimizer's share",
        ]
    ]
    for name, row in came.items():
        loss = shown(row["loss"], ".3f")
        if row["diverged"]:
            loss = f"diverged in {row['diverged']} of {row['seeds']}"
        apart = shown(row["minus_adamw"], "+.3f")
        if row["minus_adamw_sd"] is not None:
            apart += f" ({row['minus_adamw_sd']:.3f})"
        lines.append(
            [
                f"**{name}**" if row["is_best_rate"] and family(name) in TUNED else name,
                loss,
                shown(row["sd"], ".3f"),
                apart,
                shown(row["loss_at_adamws_cpu_time"], ".3f"),
                str(row["seeds"]),
                shown(row["cpu_s"], ".0f"),
                f"{row['optimizer_share']:.0%}",
            ]
        )
    return f"{task[0].upper()}{task[1:]}: {what}.\n\n{markdown(lines)}"


def report(result: Record) -> str:
    """Markdown of all tasks, and what is still to be run."""
    parts, lacking = [], []
    wanted = len(result["contenders"]) * len(result["seeds"])
    for task, what in result["tasks"].items():
        own = [record for record in result["runs"] if record["task"] == task]
        there = len(own)
        if own:
            came = summary(own)
            parts.append(table(task, what, came))
        if there < wanted:
            lacking.append(f"{task} ({there} of {wanted} runs are there)")
    if lacking:
        parts.append("Not complete: " + "; ".join(lacking) + ".")
    return "\n\n".join(parts)
