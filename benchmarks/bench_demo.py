"""Measure the demo weights against AdamW on the quickstart's model; write
results/demo_vs_adamw.json and print a table.

The loop, the model and the data are those of launch/gpt2.py. AdamW: betas 0.9 / 0.95, weight decay
0.1 on matrices, 20 steps of linear warm-up, then a constant rate. Demo weights: lr 1, nothing else;
their own schedule warms up and decays. For each seed all optimizers see the same initial
parameters, the same samples in the same order, and the same validation samples.

Losses are in nats per byte. Times are CPU seconds of a run of one thread, validation included: on
an idle machine its wall clock, on a busy one still comparable.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from learner import Learner, import_package, try_out
from loop import Diverged, train
from options import Options, parse
from place import Place
from presets import PRESETS
from record import environment, markdown, write
from run import open_data
from watch import Row

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo_vs_adamw.json"
SETTINGS = {
    "preset": "micro",
    "steps": 300,
    "eval_every": 100,
    "eval_batches": 16,
    "device": "cpu",
    "threads": 1,
}
SEEDS = (0, 1, 2)  # none of those that the weights were calibrated on, see demo_weights.py
ADAMW_LRS = (3e-4, 1e-3, 3e-3)
CONTENDERS: dict[str, dict[str, Any]] = {
    "demo weights": {"optimizer": "adafaclo", "weights": "demo"},
    **{f"AdamW {lr:g}": {"optimizer": "adamw", "lr": lr, "warmup": 20} for lr in ADAMW_LRS},
}


class Rows(list[Row]):
    """What loop.train reports, kept in memory."""

    def add(self, row: Row) -> None:
        self.append(row)


@dataclass(frozen=True, slots=True)
class Run:
    """One training run.

    Attributes:
        val_loss: nats per byte by step.
        cpu_seconds: of the whole run.
        optimizer_share: of the wall clock of the training steps, 0 to 1.
    """

    val_loss: dict[int, float]
    cpu_seconds: float
    optimizer_share: float

    @property
    def final(self) -> float:
        """The validation loss after the last step."""
        return self.val_loss[max(self.val_loss)]


def options_of(**flags: Any) -> Options:
    """The options of `launch/gpt2.py --flag value ...`."""
    return parse(
        [
            word
            for name, value in flags.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
    )


def run_once(**flags: Any) -> Run:
    """Train and validate as `launch/gpt2.py --flag value ...` does, in this process; a diverged run
    has the loss inf.
    """
    options = options_of(**flags)
    torch.set_num_threads(options.threads or 1)
    place, plan = Place.find(options), options.plan(1)
    rows = Rows()
    learner, data = Learner(options, place), open_data(options, place)
    diverged = False
    start = time.process_time()
    try:
        train(learner, data, options, place, plan, rows)
    except Diverged:
        diverged = True
    cpu_seconds = time.process_time() - start
    losses = {row.step: row.val_loss for row in rows if row.val_loss is not None}
    if diverged:
        losses[options.steps] = float("inf")
    share = sum(row.optimizer_ms for row in rows) / max(1e-9, sum(row.step_ms for row in rows))
    return Run(losses, cpu_seconds, share)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure the demo weights against AdamW; about 20 minutes on one CPU core."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    settings = {**SETTINGS, "steps": args.steps}
    found = environment()  # before the runs: the commit that was measured

    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name, flags in CONTENDERS.items():
            run = run_once(**settings, **flags, seed=seed)
            runs.append(
                {
                    "name": name,
                    "seed": seed,
                    **flags,
                    "val_loss": {str(step): round(loss, 4) for step, loss in run.val_loss.items()},
                    "cpu_seconds": round(run.cpu_seconds, 1),
                    "optimizer_share": round(run.optimizer_share, 3),
                }
            )
            print(
                f"seed {seed}, {name}: {run.final:.4f} nats per byte, {run.cpu_seconds:.0f} CPU-s",
                file=sys.stderr,
                flush=True,
            )

    def finals(name: str) -> list[float]:
        return [run["val_loss"][str(args.steps)] for run in runs if run["name"] == name]

    means = {name: round(mean(finals(name)), 4) for name in CONTENDERS}
    best = min(means[name] for name in CONTENDERS if name.startswith("AdamW"))
    config = PRESETS[settings["preset"]]
    plan = parse(["--preset", settings["preset"]]).plan(1)
    result = {
        "what": "validation loss in nats per byte of launch/gpt2.py's model after the same steps, "
        "built-in text",
        **found,
        "weights": try_out(import_package().AdafacLO, {"weights": "demo"}),
        "settings": {
            **settings,
            "batch_size": plan.global_batch,
            "block_size": config.block_size,
            "n_layer": config.n_layer,
            "n_embd": config.n_embd,
            "validation_bytes": settings["eval_batches"] * plan.global_batch * config.block_size,
            "adamw": {
                "betas": [0.9, 0.95],
                "weight_decay_of_matrices": 0.1,
                "schedule": "constant after the warm-up",
            },
        },
        "means": means,
        "demo_over_best_adamw": round(means["demo weights"] / best, 4),
        "runs": runs,
    }
    write(result, args.out)

    middle = list(range(settings["eval_every"], args.steps, settings["eval_every"]))
    head = [
        "optimizer",
        *(f"step {step}" for step in middle),
        f"step {args.steps}",
        "spread (sd)",
        "CPU seconds per run",
    ]
    lines = [head]
    for name in CONTENDERS:
        own = [run for run in runs if run["name"] == name]
        spread = f"{stdev(finals(name)):.3f}" if len(own) > 1 else "-"
        losses = [
            f"{mean(run['val_loss'].get(str(step), float('inf')) for run in own):.3f}"
            for step in middle
        ]
        lines.append(
            [
                name,
                *losses,
                f"{means[name]:.3f}",
                spread,
                f"{mean(run['cpu_seconds'] for run in own):.0f}",
            ]
        )
    print(markdown(lines))
    print(f"\ndemo weights / best AdamW: {result['demo_over_best_adamw']:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
