"""What all pictures share: size, colors, boxes, arrows, and SVG files without a date."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).resolve().parent
INK, PALE_INK, PAPER = "#1f2933", "#52606d", "#ffffff"
BLUE, GREEN, ORANGE, GRAY, RED = "#dbeafe", "#d9f2e3", "#fde8cf", "#eceff3", "#c0392b"
EDGES = {BLUE: "#3b6fb6", GREEN: "#2f855a", ORANGE: "#b7701b", GRAY: "#7b8794"}


class Canvas:
    """A figure whose unit is a hundredth of an inch, with y growing downwards.

    Args:
        width: in units.
        height: in units.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width / 100, height / 100), facecolor=PAPER)
        self.axes: Any = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.axis("off")

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        color: str,
        title: str = "",
        text: str = "",
        size: float = 9,
        dashed: bool = False,
        layer: float = 3,
    ) -> FancyBboxPatch:
        """A rounded box around its center, with a title and a smaller line below it."""
        patch = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=5",
            facecolor=color,
            edgecolor=EDGES.get(color, PALE_INK),
            linewidth=1.1,
            linestyle=(0, (4, 3)) if dashed else "solid",
            zorder=layer,
        )
        self.axes.add_patch(patch)
        lines = text.count("\n") + 1 if text else 0
        small = size - 1.5
        rise, step = (size * 1.75, small * 1.75) if title else (0.0, small * 1.75)  # of a line
        top = y - (rise + lines * step) / 2
        if title:
            self.label(x, top + rise / 2, title, size=size, bold=True)
        if text:
            color = PALE_INK if title else INK
            self.label(x, top + rise + lines * step / 2, text, size=small, color=color)
        return patch

    def bar(self, x: float, top: float, width: float, height: float, *, color: str) -> None:
        """A bar with its middle at x."""
        self.axes.add_patch(
            Rectangle(
                (x - width / 2, top),
                width,
                height,
                facecolor=color,
                edgecolor=EDGES[color],
                zorder=3,
            )
        )

    def line(
        self, start: tuple[float, float], stop: tuple[float, float], *, color: str = PALE_INK
    ) -> None:
        """A thin line."""
        self.axes.plot(*zip(start, stop, strict=True), color=color, linewidth=1, zorder=4)

    def label(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 9,
        bold: bool = False,
        color: str = INK,
        align: str = "center",
    ) -> None:
        """Text centered vertically on y."""
        self.axes.text(
            x,
            y,
            text,
            fontsize=size,
            color=color,
            fontweight="bold" if bold else "normal",
            ha=align,
            va="center",
            linespacing=1.25,
            zorder=6,
        )

    def arrow(
        self,
        start: tuple[float, float],
        stop: tuple[float, float],
        *,
        color: str = PALE_INK,
        width: float = 1.2,
        bend: float = 0.0,
        dashed: bool = False,
        both: tuple[Any, Any] = (None, None),
    ) -> None:
        """An arrow; with `both` it begins and ends at the borders of two boxes."""
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                stop,
                arrowstyle="-|>",
                mutation_scale=9,
                color=color,
                linewidth=width,
                linestyle=(0, (3, 2)) if dashed else "solid",
                connectionstyle=f"arc3,rad={bend}",
                patchA=both[0],
                patchB=both[1],
                shrinkA=1,
                shrinkB=1,
                zorder=4,
            )
        )

    def save(self, path: Path, description: str = "") -> None:
        """Write the figure; letters become outlines, so that it looks the same everywhere."""
        metadata = {"Date": None, "Creator": None, "Description": description or None}
        with rc_context({"svg.hashsalt": "headway", "svg.fonttype": "path"}):
            self.figure.savefig(
                path,
                facecolor=PAPER,
                dpi=160,
                metadata=metadata if path.suffix == ".svg" else None,
            )


def target(name: str, arguments: Sequence[str] | None = None) -> Path:
    """Where the picture goes: beside its script, or where the command line says (.svg or .png)."""
    parser = argparse.ArgumentParser(description="Draw a picture of the documentation.")
    parser.add_argument("output", nargs="?", type=Path, default=FOLDER / name)
    output: Path = parser.parse_args(arguments).output
    return output
