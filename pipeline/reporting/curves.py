"""Curves of metrics over steps, with marks for what happened to the run meanwhile."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from foundation.plots import svg_plot
from pipeline.reporting.final_figures import values_of
from pipeline.reporting.metrics import Scalars
from pipeline.reporting.run_events import Event, Kind

_LARGEST_DRAWN = 1e100  # what is larger has no axis; it stays in the table
_MOST_MARKS = 300  # of a kind: the last ones
# Label, color and line of each kind; saves are many, and are ticks at the bottom.
_MARKS: dict[Kind, tuple[str, str, str]] = {
    "resume": ("resumed", "#8a94a3", "--"),
    "layout": ("resumed in another layout", "#d9822b", "-"),
    "rollback": ("rolled back", "#c62828", "--"),
    "skip": ("step skipped", "#c62828", ":"),
    "save": ("saved", "#2e7d32", ""),
}


class Curve(NamedTuple):
    """One line of a plot: a metric over steps.

    Attributes:
        key: of the records.
        label: for people.
        color: of the line.
        dashed: rather than solid.
        run: which of the records that are drawn together.
    """

    key: str
    label: str
    color: str = "#1f6feb"
    dashed: bool = False
    run: int = 0


class Plot(NamedTuple):
    """One plot; only the curves with data in the records are drawn."""

    title: str
    unit: str
    curves: tuple[Curve, ...]


def figure(
    plot: Plot, runs: Sequence[Sequence[Scalars]], events: Sequence[Event] = ()
) -> Markup | None:
    """One plot as an svg element; None when no record has a value for it.

    Args:
        plot: its curves.
        runs: the records of each run.
        events: marked, where the plot is of one run.
    """
    drawn = [curve for curve in plot.curves if values_of(runs[curve.run], curve.key)]
    if not drawn:
        return None

    def draw(axes: Any) -> None:
        for curve in drawn:
            _draw(axes, curve, runs[curve.run])
        marked = _mark(axes, events)
        axes.set_title(plot.title)
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        axes.grid(alpha=0.25)
        if len(drawn) > 1 or marked:
            axes.legend(frameon=False, fontsize=8, ncols=2)

    return svg_plot(plot.title, draw)


def _mark(axes: Any, events: Sequence[Event]) -> bool:
    """Draw marks at the steps of events; whether there are any."""
    for kind, (label, color, line) in _MARKS.items():
        steps = [event.step for event in events if event.kind == kind][-_MOST_MARKS:]
        if steps and kind == "save":
            bottom = axes.get_xaxis_transform()
            heights = [0.015] * len(steps)
            axes.plot(steps, heights, "^", ms=3, color=color, label=label, transform=bottom)
            continue
        for number, step in enumerate(steps):
            shown = label if number == 0 else None
            axes.axvline(step, color=color, linestyle=line, linewidth=0.9, label=shown)
    return bool(events)


def _draw(axes: Any, curve: Curve, records: Sequence[Scalars]) -> None:
    found = [(r["step"], float(v)) for r in records if (v := r.get(curve.key)) is not None]
    points = [(step, v if abs(v) < _LARGEST_DRAWN else math.nan) for step, v in found]
    few = len(points) <= 50
    axes.plot(
        [step for step, _ in points],
        [value for _, value in points],
        label=curve.label.replace("$", r"\$"),  # which would begin a formula
        color=curve.color,
        linestyle="--" if curve.dashed else "-",
        linewidth=1.4 if curve.dashed else 1.1,
        marker="o" if few else "",
        markersize=3,
    )
