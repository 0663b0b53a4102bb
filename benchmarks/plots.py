"""Draw the plots of the documents from the JSON of the benchmarks; writes SVG, measures nothing.

    python benchmarks/plots.py --results benchmarks/results --out docs

A plot whose JSON is missing is left out and named. Each says below itself where its figures come
from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from quality import outcomes

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"AdafacLO": "#1b6ca8", "VeLO": "#c8553d", "AdamW": "#8a8a8a", "Muon": "#6a994e"}
COLOURS |= {"CELO2": "#7b4fa3", "Celo": "#e09f3e"}
LIGHT = {"AdafacLO": "#a9cbe3", "VeLO": "#eebfb4", "AdamW": "#d4d4d4", "Muon": "#c5d8b9"}
Result = dict[str, Any]


def colour_of(name: str, colours: dict[str, str] = COLOURS) -> str:
    """By the optimizer that a name is of."""
    aliases = {"small_fc": "AdafacLO", "velo": "VeLO"}
    word = name.replace(",", " ").split()[0]
    return colours.get(aliases.get(word, word), "#444444")


def source_of(result: Result) -> str:
    """Where figures come from, for the foot of a plot."""
    hardware = result["hardware"]
    where = ", ".join(hardware.get("gpus", [])) or f"{hardware['cpu']}, {hardware['cores']} cores"
    notes = [where, f"torch {result['versions']['torch']}", f"commit {result['commit'][:10]}"]
    notes += ["quick run"] if result.get("quick") else []
    notes += ["the machine was shared"] if result.get("machine_was_shared") else []
    return "; ".join(notes)


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    label: str,
    title: str,
    texts: Sequence[str],
) -> None:
    """Horizontal bars, the first on top, with a text behind each."""
    places = range(len(names))[::-1]
    axes.barh(list(places), values, color=[colour_of(name) for name in names], height=0.7)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.text(value, place, f" {text}", va="center", fontsize=7)
    axes.set_yticks(list(places), names, fontsize=7)
    axes.set_xlim(0, 1.5 * max(values))  # room for the texts
    axes.set_xlabel(label)
    axes.set_title(title)


# -------------------------------------------------------------------------------------------- plots


def seed_figures(result: Result) -> Figure:
    """ViT by batch size, one layer, GPT-2 sizes, the sharded step."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 8))
    clock = "CPU time of one thread" if result["device"] == "cpu" else result["device"]
    axes = panels[0][0]
    rows = result["vit"]["ms_by_batch"]
    batches, optimizers = list(rows), list(next(iter(rows.values())))
    for part, style in (("forward", "o:"), ("backward", "s:")):
        axes.plot(
            batches,
            [median(rows[b][n][part] for n in optimizers) for b in batches],
            style,
            color="#444444",
            label=part,
        )
    for name in optimizers:
        axes.plot(
            batches,
            [rows[b][name]["step"] for b in batches],
            "^-",
            color=COLOURS[name],
            label=f"step of {name}",
        )
    axes.set(
        xlabel="batch size, images",
        ylabel="ms",
        yscale="log",
        title=f"{result['vit']['model']} ({clock})",
    )
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=7)

    rows = result["layer"]["rows"]
    texts = [f"{row['step_ms']:.1f} ms, {row['launches']} launches" for row in rows.values()]
    bars(
        panels[0][1],
        list(rows),
        [row["step_ms"] for row in rows.values()],
        f"ms per step ({clock})",
        "one 1000 x 1000 layer",
        texts,
    )

    axes, sizes = panels[1][0], result["gpt2"]
    computed = any(
        row["whole_model_is_computed"] for size in sizes.values() for row in size["rows"].values()
    )
    for name in optimizers:
        axes.plot(
            list(sizes),
            [s["rows"][name]["whole_model_ms"] for s in sizes.values()],
            "o-",
            color=COLOURS[name],
            label=name,
        )
    how = ", computed from blocks of it" if computed else ""
    axes.set(
        xlabel="GPT-2", ylabel="ms per step", yscale="log", title=f"the step by model size{how}"
    )
    axes.legend(fontsize=7)

    # PyLO's have an eighth
    run = max(result["sharded"]["runs"], key=lambda run: (run["parameters"], run["ranks"]))
    rows = run["contenders"]
    texts = [
        f"{r['cpu_ms_busiest_rank']:.1f} ms, balance {r['elements_max_over_mean']:.2f}"
        for r in rows.values()
    ]
    label = "CPU ms of the busiest rank" if result["device"] == "cpu" else "ms of the busiest rank"
    title = f"the step alone on {run['ranks']} ranks, {run['parameters'] / 1e6:.1f}M parameters"
    bars(
        panels[1][1],
        list(rows),
        [r["cpu_ms_busiest_rank"] for r in rows.values()],
        label,
        title,
        texts,
    )
    return figure


def training(result: Result) -> Figure:
    """Tokens per second beside AdamW by layout, and the goal."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1))
    axes, run = panels[0], result["runs"][-1]
    for name, row in run["contenders"].items():
        cells = row["by_tokens_per_rank"]
        style = {"zero1": "o-", "zero2": "s--", "fsdp2": "^-.", "deepspeed2": "v:"}.get(
            name.split(", ")[1], "x-"
        )
        axes.plot(
            list(cells),
            [c["over_baseline"] for c in cells.values()],
            style,
            color=colour_of(name),
            label=name,
            lw=1,
            ms=4,
        )
    axes.axhline(1.0, color="#444444", lw=0.5)
    what = f"tokens/s over {run['baseline']}"
    axes.set(
        xlabel="tokens per rank and step",
        ylabel=what,
        title=f"whole steps, {run['ranks']} ranks ({run['backend']})",
    )
    axes.legend(fontsize=6, ncol=2)
    axes, goal = panels[1], result.get("goal")
    if goal is None:
        axes.set_axis_off()
        return figure
    axes.bar(
        list(goal["ratio"]),
        list(goal["ratio"].values()),
        color=[colour_of(name) for name in goal["ratio"]],
        width=0.6,
    )
    for place, value in enumerate(goal["ratio"].values()):
        axes.text(place, value, f"{value:.3f}", ha="center", va="bottom", fontsize=8)
    axes.axhline(goal["wanted"], color="#444444", ls="--", lw=1, label=f"goal {goal['wanted']}")
    how = f"COMPUTED from parts,\n{goal['on']}" if goal["computed"] else "measured"
    axes.set(
        ylim=(0, 1.15),
        ylabel="tokens/s over AdamW, ZeRO-1",
        title=f"GPT-2 124M, 16384 tokens per rank,\n8 ranks; {how}",
    )
    axes.legend(fontsize=7, loc="lower right")
    return figure


def scaling(result: Result) -> Figure:
    """The model against measurement, and what is predicted of the exchange."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    axes, rows = panels[0], result["check"]["rows"]
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == name]
        ranks = [str(row["ranks"]) for row in own]
        axes.plot(
            ranks,
            [row["measured_ms"] for row in own],
            "o-",
            color=COLOURS[name],
            label=f"{name}, measured",
        )
        axes.plot(
            ranks,
            [row["modelled_ms"]["exposed"] for row in own],
            "x--",
            color=COLOURS[name],
            label=f"{name}, model",
        )
    error = result["check"]["largest_error"]
    shown = "" if error is None else f"; largest error {error:.0%}"
    axes.set(
        xlabel="ranks",
        ylabel="ms per step",
        title=f"{result['check']['cores']} cores, gloo{shown}\n(calibrated on 1 rank)",
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    axes, rows = (
        panels[1],
        [row for row in result["predictions"]["exchange"] if row["optimizer"] == "AdafacLO"],
    )
    for network, style in zip(
        dict.fromkeys(row["network"] for row in rows), ("-", "--"), strict=False
    ):
        for model, colour in zip(
            dict.fromkeys(row["model"] for row in rows),
            ("#1b6ca8", "#c8553d", "#6a994e"),
            strict=False,
        ):
            own = [row for row in rows if (row["network"], row["model"]) == (network, model)]
            ranks = [str(row["ranks"]) for row in own]
            both = [row["reduce_scatter_ms"] + row["all_gather_ms"] for row in own]
            axes.plot(
                ranks,
                both,
                "o" + style,
                color=colour,
                label=f"{model}, {network.split()[0]}: gradients, parameters",
                lw=1,
            )
            axes.plot(
                ranks,
                [row["small_all_reduces_ms"] for row in own],
                "." + style,
                color=colour,
                lw=0.5,
            )
    axes.set(xlabel="ranks", ylabel="ms per step, nothing hidden", yscale="log")
    axes.set_title("PREDICTED exchange, AdafacLO, ZeRO\n(thin lines: its two small all-reduces)")
    axes.legend(fontsize=6)
    return figure


def memory(result: Result) -> Figure:
    """Bytes per parameter and rank by layout, beside AdamW."""
    figure, axes = plt.subplots(figsize=(11, 3.8))
    rows, ranks = result["layouts"]["rows"], result["layouts"]["ranks"]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    for shift, name in ((-0.2, "AdafacLO"), (0.2, "AdamW")):
        own = [row for row in rows if row["optimizer"] == name]
        places = [layouts.index(row["layout"]) + shift for row in own]
        parameters, state, peak = (
            [row["bytes_per_parameter"][key] for row in own]
            for key in ("parameters", "state", "peak")
        )
        axes.bar(
            places,
            peak,
            width=0.36,
            color=LIGHT[name],
            label=f"{name}: peak of a step, transients included",
        )
        axes.bar(
            places,
            state,
            bottom=parameters,
            width=0.36,
            color=COLOURS[name],
            label=f"{name}: state",
        )
        axes.bar(
            places,
            parameters,
            width=0.36,
            color="#444444",
            label="parameters" if name == "AdamW" else None,
        )
        for place, value in zip(places, peak, strict=True):
            axes.text(place, value, f"{value:.1f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(layouts)), layouts)
    axes.set_ylabel("bytes per parameter on a rank")
    axes.set_title(
        f"memory of a rank, {ranks} ranks, float32, {result['layouts']['parameters'] / 1e6:.1f}M "
        "parameters (gloo)"
    )
    axes.legend(fontsize=7)
    return figure


def quality(result: Result) -> Figure:
    """Held-out loss by step and by CPU second, a row of panels for each task that has runs."""
    by_task: dict[str, list[Result]] = {}
    for run in result["runs"]:
        by_task.setdefault(run["task"], []).append(run)
    figure, panels = plt.subplots(
        len(by_task), 2, figsize=(11, 3.4 * len(by_task)), squeeze=False, sharey="row"
    )
    for (by_step, by_second), (task, runs) in zip(panels, by_task.items(), strict=True):
        for name, found in outcomes(runs).items():
            if not found.is_best_rate or not found.losses:
                continue
            seeds = f"{found.seeds} seed{'s' * (found.seeds > 1)}"
            left = f", {found.diverged} diverged" if found.diverged else ""
            style: dict[str, Any] = {"color": colour_of(name), "lw": 1.2, "ms": 3}
            style["ls"] = "--" if name.endswith("constant") else "-"
            by_step.plot(
                found.steps, found.losses, marker="o", label=f"{name} ({seeds}{left})", **style
            )
            by_second.plot(found.cpu_s, found.losses, marker="o", **style)
        by_step.set(xlabel="step", ylabel="held-out loss, nats", title=task)
        by_step.legend(fontsize=7)
        by_second.set(xlabel="CPU seconds in forward, backward and step", title=f"{task}, by cost")
    return figure


# By file name: which results they are drawn from, the first that is there, and what draws them.
PLOTS: dict[str, tuple[tuple[str, ...], Callable[[Result], Figure]]] = {
    "seed_figures.svg": (("seed_figures_cuda.json", "seed_figures_cpu.json"), seed_figures),
    "training.svg": (("train.json",), training),
    "scaling.svg": (("scaling.json",), scaling),
    "memory.svg": (("memory.json",), memory),
    "quality.svg": (("quality.json",), quality),
}


def draw(results: Path, out: Path) -> list[str]:
    """Draw what there is JSON for into `out`; the names of plots that lack theirs."""
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "pylo_dist",
            "svg.fonttype": "none",
            "axes.titlesize": 9,
            "axes.labelsize": 8,
        }
    )
    matplotlib.rcParams.update(
        {
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    missing = []
    for name, (files, plot) in PLOTS.items():
        source = next((results / file for file in files if (results / file).is_file()), None)
        if source is None:
            missing.append(name)
            continue
        result = json.loads(source.read_text())
        figure = plot(result)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.text(0.01, 0.005, f"{source.name}: {source_of(result)}", fontsize=6, color="#666666")
        figure.savefig(out / name, metadata={"Date": None})
        plt.close(figure)
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Draw the plots of the documents from the JSON of the benchmarks."
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    missing = draw(args.results, args.out)
    for name in missing:
        print(
            f"{name}: not drawn, none of {', '.join(PLOTS[name][0])} in {args.results}",
            file=sys.stderr,
        )
    return 1 if len(missing) == len(PLOTS) else 0


if __name__ == "__main__":
    sys.exit(main())
