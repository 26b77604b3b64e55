"""Plots of reports as SVG: text stays text, and the same figures give the same bytes."""

import io
from collections.abc import Callable
from typing import Any

from markupsafe import Markup


def svg_plot(
    title: str, draw: Callable[[Any], None], size_inches: tuple[float, float] = (6.4, 3.8)
) -> Markup:
    """One plot as an svg element that can be put into a page with others.

    Args:
        title: of the plot, for readers of the markup; it also keeps the ids of several plots in one
            page apart, so it is to differ from theirs.
        draw: puts curves, labels and so on into the axes it is given.
        size_inches: width and height.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the ids; by default they would be random.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(figsize=size_inches, layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])


def shades(count: int) -> list[str]:
    """Colors from dark to light, for curves that have an order."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["viridis"]
    return [to_hex(scale(0.9 * number / max(count - 1, 1))) for number in range(count)]
