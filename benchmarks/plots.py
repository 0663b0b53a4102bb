"""Draw the plots of the documents from the JSON of the benchmarks; writes SVG, measures nothing.

    python benchmarks/plots.py --results benchmarks/results --out docs

A plot whose JSON is missing there is drawn from that of a quick run, in `quick`, and says so; where
there is none either it is left out and named. Each says below itself where its figures come from.
Backgrounds are transparent, and inks stand out from white and from black alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from quality import outcomes

ROOT = Path(__file__).resolve().parents[1]
INK, FAINT = "#7a7a7a", "#7a7a7a55"
COLOURS = {"AdafacLO": "#2f81bd", "VeLO": "#d4603f", "AdamW": "#868686", "Muon": "#5c9a45"}
COLOURS |= {"CELO2": "#9467c4", "Celo": "#b98018"}
LAYOUTS = {"plain": "one process", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2"}
LAYOUTS |= {"fsdp2": "FSDP2", "hsdp": "HSDP", "tp": "TP", "torch zero": "torch's ZeRO"}
LAYOUTS |= {f"deepspeed{stage}": f"DeepSpeed {stage}" for stage in (1, 2, 3)}
LIGHT = 0.45  # opacity of what is beside the point
STYLE = {
    "svg.hashsalt": "pylo_dist",
    "svg.fonttype": "none",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}
Result = dict[str, Any]


def optimizer_in(name: str) -> str:
    """The optimizer that a contender's name begins with."""
    word = name.replace(",", " ").split()[0]
    return {"small_fc": "AdafacLO", "velo": "VeLO"}.get(word, word)


def colour_of(name: str) -> str:
    return COLOURS.get(optimizer_in(name), INK)


def by_optimizer(rows: Result) -> Result:
    """The rows of one optimizer together, in the order of their first ones."""
    order = list(dict.fromkeys(map(optimizer_in, rows)))
    return dict(sorted(rows.items(), key=lambda item: order.index(optimizer_in(item[0]))))


def source_of(result: Result) -> str:
    """Where figures come from, for the foot of a plot."""
    hardware = result["hardware"]
    where = ", ".join(hardware.get("gpus", [])) or f"{hardware['cpu']}, {hardware['cores']} cores"
    notes = [where, f"torch {result['versions']['torch']}", f"commit {result['commit'][:10]}"]
    notes += ["quick run"] if result.get("quick") else []
    notes += ["the machine was shared"] if result.get("machine_was_shared") else []
    return "; ".join(notes)


def millis(value: float) -> str:
    """Milliseconds in two digits or more: 0.43 ms, 9.1 ms, 981 ms, 5.6 s."""
    if value >= 1e4:
        return f"{value / 1e3:.0f} s"
    if value >= 1e3:
        return f"{value / 1e3:.1f} s"
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> None:
    """Horizontal bars, the first on top, with a text behind each; no axis of values."""
    places = range(len(names))[::-1]
    axes.barh(list(places), values, color=[colour_of(name) for name in names], height=0.66)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", size=8)
    axes.set_yticks(list(places), names)
    axes.set_xlim(0, 1.85 * max(values))  # room for the texts
    axes.tick_params(left=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)


def at_the_end(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """A line's name, to the right of its last point."""
    axes.annotate(
        text,
        (x, y),
        (7, 0),
        textcoords="offset points",
        va="center",
        size=8,
        color=colour,
        annotation_clip=False,
    )


# -------------------------------------------------------------------------------------------- plots


def seed_figures(result: Result) -> Figure:
    """ViT by batch size, one layer, GPT-2 sizes, the sharded step."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(2, 2, gridspec_kw={"wspace": 0.12})
    clock = "CPU time of one thread" if result["device"] == "cpu" else result["device"]
    _vit(panels[0][0], result["vit"], clock)

    rows = by_optimizer(result["layer"]["rows"])
    axes = panels[0][1]
    texts = [
        f"{millis(row['step_ms'])}, {row['launches']} launch{'es' * (row['launches'] > 1)}"
        for row in rows.values()
    ]
    names = [", ".join([optimizer_in(name), *name.split(", ")[1:]]) for name in rows]
    bars(axes, names, [row["step_ms"] for row in rows.values()], texts)
    axes.set_title(f"One step of one 1000 x 1000 layer\n{clock}")

    axes, sizes = panels[1][0], result["gpt2"]
    computed = any(
        row["whole_model_is_computed"] for size in sizes.values() for row in size["rows"].values()
    )
    numbers = [size["parameters"] for size in sizes.values()]
    for name in next(iter(sizes.values()))["rows"]:
        rows = [size["rows"][name] for size in sizes.values()]
        axes.plot(numbers, [row["whole_model_ms"] for row in rows], "o-", color=colour_of(name))
        cost = median(row["ns_per_parameter"] for row in rows)
        at_the_end(
            axes,
            numbers[-1],
            rows[-1]["whole_model_ms"],
            f"{name}\n{cost:.2g} ns a parameter",
            colour_of(name),
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters of GPT-2", ylabel="ms per step")
    axes.set_xticks(numbers, [f"{number / 1e6:.0f}M" for number in numbers])
    axes.xaxis.set_minor_formatter(NullFormatter())
    how = ", computed from blocks of the model" if computed else ""
    axes.set_title(f"A step's cost grows as the parameters do\n{clock}{how}")

    # PyLO's have an eighth
    run = max(result["sharded"]["runs"], key=lambda run: (run["parameters"], run["ranks"]))
    rows = by_optimizer(run["contenders"])
    texts = [
        f"{millis(r['cpu_ms_busiest_rank'])}, balance {r['elements_max_over_mean']:.2f}"
        for r in rows.values()
    ]
    names = [
        name.replace("torch ZeroRedundancyOptimizer", "torch's ZeRO").replace("ours", "pylo_dist")
        for name in rows
    ]
    bars(panels[1][1], names, [r["cpu_ms_busiest_rank"] for r in rows.values()], texts)
    what = "CPU time" if result["device"] == "cpu" else "time"
    panels[1][1].set_title(
        f"A step of {run['parameters'] / 1e6:.1f}M parameters on {run['ranks']} ranks\n"
        f"{what} of the busiest one"
    )
    return figure


def _vit(axes: Axes, found: Result, clock: str) -> None:
    """Stacked bars of an iteration, by batch size and optimizer; names in the highest."""
    place, groups = 0.0, []
    by_batch = found["ms_by_batch"]
    heights = {
        batch: max(sum(row.values()) for row in by_batch[batch].values()) for batch in by_batch
    }
    highest = max(heights.values())
    for batch, rows in by_batch.items():
        first = place
        for name, row in rows.items():
            passes = row["forward"] + row["backward"]
            axes.bar(place, row["forward"], color=INK, alpha=0.3, width=0.8)
            axes.bar(place, row["backward"], bottom=row["forward"], color=INK, alpha=0.5, width=0.8)
            axes.bar(place, row["step"], bottom=passes, color=colour_of(name), width=0.8)
            share = f"{row['step'] / (passes + row['step']):.0%}"
            axes.text(
                place,
                passes + row["step"] + 0.01 * highest,
                share,
                ha="center",
                size=8,
                color=colour_of(name),
            )
            if heights[batch] == highest:
                axes.text(
                    place, 0.03 * highest, name, ha="center", va="bottom", rotation=90, size=8
                )
            place += 1
        groups.append(((first + place - 1) / 2, f"batch {batch}"))
        place += 0.7
    axes.set_xticks(*map(list, zip(*groups, strict=True)))
    axes.tick_params(bottom=False)
    axes.set_ylabel("ms per iteration: forward, backward, step in colour")
    axes.set_title(f"The step's share of an iteration of {found['model']}\n{clock}")


def training(result: Result) -> Figure:
    """Tokens per second beside AdamW by layout, at the fewest and the most tokens."""
    run = result["runs"][-1]
    rows = {name: row for name, row in run["contenders"].items() if name != run["baseline"]}
    ranked = [*LAYOUTS, *(name.split(", ")[1] for name in rows)]
    from_below = [*rows.items()][::-1]
    rows = dict(sorted(from_below, key=lambda item: -ranked.index(item[0].split(", ")[1])))
    figure = Figure(figsize=(9, 0.32 * len(rows) + 1.9), layout="constrained")
    axes, names = figure.subplots(), list(rows)
    for place, (name, row) in enumerate(rows.items()):
        cells = list(row["by_tokens_per_rank"].values())
        few, many = cells[0]["over_baseline"], cells[-1]["over_baseline"]
        axes.plot([few, many], [place, place], "-", color=colour_of(name), lw=2, alpha=LIGHT)
        axes.plot(few, place, "o", color=colour_of(name), mfc="none", ms=7)
        axes.plot(many, place, "o", color=colour_of(name), ms=7)
        at_the_end(axes, max(few, many), place, f"{many:.2f}", colour_of(name))
    pairs = [name.split(", ") for name in names]
    axes.set_yticks(
        range(len(names)), [f"{LAYOUTS.get(where, where)}, {name}" for name, where in pairs]
    )
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(colour_of(name))
    axes.axvline(1.0, color=INK, lw=1)
    tokens = list(next(iter(rows.values()))["by_tokens_per_rank"])
    baseline = run["baseline"].replace(", torch zero", " under torch's ZeroRedundancyOptimizer")
    axes.set_xlabel(
        f"tokens per second over those of {baseline} ({run['ranks']} ranks, {run['backend']})\n"
        f"hollow: {tokens[0]} tokens per rank and step, filled: {tokens[-1]}"
    )
    axes.set_title("The more tokens a step has, the less optimizer and sharding cost")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    return figure


def scaling(result: Result) -> Figure:
    """The model against measurement, and what is predicted of the exchange on one network."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes, beside = figure.subplots(1, 2)
    rows, error = result["check"]["rows"], result["check"]["largest_error"]
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    ranks = list(dict.fromkeys(row["ranks"] for row in rows))
    for row in rows:
        place = ranks.index(row["ranks"]) + 0.27 * (optimizers.index(row["optimizer"]) - 1)
        colour, measured = colour_of(row["optimizer"]), row["measured_ms"]
        axes.bar(place, measured, width=0.24, color=colour, alpha=LIGHT)
        modelled = row["modelled_ms"]["exposed"]
        axes.plot([place - 0.12, place + 0.12], [modelled, modelled], color=colour, lw=3)
        if row["ranks"] == ranks[0]:
            axes.text(
                place,
                1.02 * max(measured, modelled),
                row["optimizer"],
                ha="center",
                va="bottom",
                size=8,
                color=colour,
            )
    axes.set_xticks(range(len(ranks)), [f"{n} rank{'s' * (n > 1)}" for n in ranks])
    axes.tick_params(bottom=False)
    axes.set_ylabel("ms per step; bars: measured, lines: the model")
    shown = "" if error is None else f" is off by {error:.0%} at most"
    axes.set_title(
        f"The model of a step{shown}\ncalibrated on 1 rank, {result['check']['cores']} cores, gloo"
    )

    rows = [row for row in result["predictions"]["exchange"] if row["optimizer"] == "AdafacLO"]
    network = rows[0]["network"]
    rows = [row for row in rows if row["network"] == network]
    names = [f"GPT-2 {row['model']}, {row['ranks']} ranks" for row in rows]
    for place, row in zip(range(len(rows))[::-1], rows, strict=True):
        both, small = row["reduce_scatter_ms"] + row["all_gather_ms"], row["small_all_reduces_ms"]
        beside.plot([small, both], [place, place], color=INK, lw=1, alpha=LIGHT)
        beside.plot(both, place, "o", color=INK)
        beside.plot(small, place, "o", color=COLOURS["AdafacLO"])
        at_the_end(beside, both, place, millis(both), INK)
        beside.annotate(
            millis(small),
            (small, place),
            (-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            size=8,
            color=COLOURS["AdafacLO"],
        )
    beside.set_yticks(range(len(rows))[::-1], names)
    beside.set_xscale("log")
    large = max(row["reduce_scatter_ms"] + row["all_gather_ms"] for row in rows)
    beside.set_xlim(0.2 * min(row["small_all_reduces_ms"] for row in rows), 4 * large)
    beside.set_xlabel(
        "ms per step, nothing hidden; blue: the two small all-reduces of AdafacLO,\n"
        "grey: gradients and parameters, as of any ZeRO"
    )
    beside.set_title(f"PREDICTED: what a learned step adds to ZeRO's exchange\n{network}")
    beside.tick_params(left=False)
    beside.spines["left"].set_visible(False)
    return figure


def memory(result: Result) -> Figure:
    """Bytes per parameter and rank by layout, beside AdamW."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
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
            color=COLOURS[name],
            alpha=LIGHT,
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
            color="#3f9c93",
            label="parameters" if name == "AdamW" else None,
        )
        for place, value in zip(places, peak, strict=True):
            axes.text(place, value, f"{value:.1f}", ha="center", va="bottom", fontsize=7)
    peaks = {(row["layout"], row["optimizer"]): row["bytes_per_parameter"]["peak"] for row in rows}
    more = sorted(peaks[layout, "AdafacLO"] - peaks[layout, "AdamW"] for layout in layouts)
    axes.set_xticks(range(len(layouts)), [LAYOUTS.get(layout, layout) for layout in layouts])
    axes.set_ylabel("bytes per parameter on a rank")
    parameters = f"{result['layouts']['parameters'] / 1e6:.1f}M parameters"
    axes.set_title(
        f"AdafacLO's peak is {more[-1]:.0f} bytes per parameter above AdamW's, sharded "
        f"{more[0]:.0f} to {more[-2]:.0f}\n{ranks} ranks, float32, {parameters} (gloo)"
    )
    axes.legend(fontsize=7)
    return figure


def quality(result: Result) -> Figure:
    """Held-out loss by step and by CPU second, a row of panels for each task that has runs."""
    by_task: dict[str, list[Result]] = {}
    for run in result["runs"]:
        by_task.setdefault(run["task"], []).append(run)
    figure = Figure(figsize=(11, 3.4 * len(by_task)), layout="constrained")
    panels = figure.subplots(len(by_task), 2, squeeze=False, sharey="row")
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
        by_step.set(xlabel="step", ylabel="held-out loss, nats: lower is better", title=task)
        by_step.legend(fontsize=7)
        by_second.set(
            xlabel="CPU seconds in forward, backward and step", title="the same by CPU second"
        )
    return figure


# By file name: which results they are drawn from, the first that is there, and what draws them.
PLOTS: dict[str, tuple[tuple[str, ...], Callable[[Result], Figure]]] = {
    "seed_figures.svg": (("seed_figures_cuda.json", "seed_figures_cpu.json"), seed_figures),
    "training.svg": (("train.json",), training),
    "scaling.svg": (("scaling.json",), scaling),
    "memory.svg": (("memory.json",), memory),
    "quality.svg": (("quality.json",), quality),
}


def figures(results: Path) -> Iterator[tuple[str, Figure]]:
    """By file name what there is JSON for, in `results`, or in `quick` there."""
    for name, (files, plot) in PLOTS.items():
        paths = (folder / file for folder in (results, results / "quick") for file in files)
        source = next((path for path in paths if path.is_file()), None)
        if source is None:
            continue
        result = json.loads(source.read_text())
        with matplotlib.rc_context(STYLE):
            figure = plot(result)
            foot = f"{source.name}: {source_of(result)}"
            figure.supxlabel(foot, x=0.01, ha="left", fontsize=7)
            yield name, figure


def draw(results: Path, out: Path) -> list[str]:
    """Draw what there is JSON for into `out`; the names of plots that lack theirs."""
    out.mkdir(parents=True, exist_ok=True)
    missing = list(PLOTS)
    for name, figure in figures(results):
        figure.savefig(out / name, metadata={"Date": None})
        missing.remove(name)
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
