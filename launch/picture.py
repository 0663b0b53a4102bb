"""loss.png: how far a run has come from the untrained model, and what was trained beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import tell
from watch import Beside, Row, last_loss, optional

OWN, OTHER, GREY = "#1b6ca8", "#c8553d", "#666666"


def draw(
    rows: Sequence[Row], path: Path, *, unit: str, title: str, name: str, beside: Beside | None
) -> None:
    """Write the picture of a run's `rows`. One that cannot be drawn is one line: the run is done
    without it.
    """
    try:
        with optional(path):
            figure = figure_of(rows, unit=unit, title=title, name=name, beside=beside)
            figure.savefig(path, dpi=120)
    except ImportError as error:
        tell(
            f"{path} was not drawn, since matplotlib cannot be imported ({error}): pip install "
            "'pylo-dist[launch]', or matplotlib"
        )
    except Exception as error:  # of its fonts, caches and settings, which differ by machine
        tell(f"{path} was not drawn ({type(error).__name__}: {' '.join(str(error).split())})")


def figure_of(
    rows: Sequence[Row], *, unit: str, title: str, name: str, beside: Beside | None
) -> Any:
    """Validation losses in thick lines, those of training in thin ones, names at their ends.

    The loss of step n is of a model after n - 1 updates, its validation of one after n.
    """
    from matplotlib.figure import Figure  # without pyplot: no display on servers
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    labels = [(last_loss(rows)[1], name, OWN)]
    if beside is not None and beside.rows:
        labels.append((last_loss(beside.rows)[1], f"{beside.name}, lr {beside.lr:g}", OTHER))
        _curve(axes, beside.rows, OTHER)
    _curve(axes, rows, OWN)
    highest = max(row.loss for row in rows)
    if rows[0].step == 1:  # not where the first rows of a run are lost
        untrained = rows[0].loss
        axes.axhline(untrained, color=GREY, lw=1, ls=":")
        labels.append((untrained, "untrained", GREY))
    lowest = min(value for value, *_ in labels)
    lowest = min([lowest, *(row.loss for row in rows)])
    room = 0.06 * (highest - lowest) or 0.1
    axes.set_ylim(lowest - room, highest + room)  # what diverges beside it leaves the picture
    axes.set_xlim(0, 1.01 * rows[-1].step)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for place, (value, text, colour) in zip(
        _apart([value for value, *_ in labels], room, highest + room), labels, strict=True
    ):
        axes.annotate(
            f"{text}  {value:{'.3f' if value < 1e4 else '.3g'}}",
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            annotation_clip=False,
        )
    measured = any(row.val_loss is not None for row in rows)
    key = " (thick: validation, thin: training)" if measured else ""
    axes.set(xlabel=f"updates{key}", ylabel=f"loss, nats per {unit}")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curve(axes: Any, rows: Sequence[Row], colour: str) -> None:
    measured = [(row.step, row.val_loss) for row in rows if row.val_loss is not None]
    axes.plot(
        [row.step - 1 for row in rows],
        [row.loss for row in rows],
        lw=0.8,
        alpha=0.4 if measured else 1.0,
        color=colour,
    )
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", lw=2, ms=4, color=colour)


def _apart(values: Sequence[float], least: float, highest: float) -> list[float]:
    """Places near `values`, none above `highest`, each at least `least` from the next."""
    places, order = list(values), sorted(range(len(values)), key=lambda i: values[i])
    below, above = -float("inf"), highest + least
    for i in order:
        below = places[i] = max(places[i], below + least)
    for i in reversed(order):
        above = places[i] = min(places[i], above - least)
    return places
