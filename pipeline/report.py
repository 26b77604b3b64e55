"""report.html from a run's metrics: plots, final figures and the configuration, in one file.

Command line: python -m pipeline.report RUN_DIR
"""

import argparse
import math
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from foundation.bounded_files import read_bounded
from foundation.command_line import exit_status
from foundation.durable_files import write_whole
from foundation.pages import Figures, Listing, Section, Table, render_page
from foundation.plots import shades, svg_plot
from model.errors import ConfigError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.reporting.final_figures import final_figures, values_of
from pipeline.reporting.metrics import Scalars, read_metrics

EPILOG = """\
examples:
  PROG runs/7b

exit status: 0 RUN_DIR/report.html is written, 1 there are no metrics to read (in one line), 2 wrong
arguments
"""
REPORT_NAME = "report.html"
_LARGEST_DRAWN = 1e100  # what is larger has no axis; it stays in the table
_MOST_CURVES = 64  # of heads or sources

_LEAD = "Head k predicts the token k positions ahead. Dashed curves are held-out data."


class Curve(NamedTuple):
    """One line of a plot: a metric over steps."""

    key: str
    label: str
    color: str = "#1f6feb"
    dashed: bool = False


class Plot(NamedTuple):
    """One plot; only the curves with data in the records are drawn."""

    title: str
    unit: str
    curves: tuple[Curve, ...]


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run, whole or still going on, into its folder.

    Returns:
        The path of the report; it needs no other file and no network to be read.

    Raises:
        ConfigError: The folder holds no metrics, or cannot be written.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    if not records:
        raise ConfigError(f"{run_dir} has no metrics yet; wait until the run has done a step")
    heads = _num_heads(records)
    figures = [_figure(plot, records) for plot in _plots(heads, _sources(records))]
    config = _config_text(run_dir / RESOLVED_CONFIG_NAME)
    sections = [
        Section("Final figures", [Table(final_figures(records, heads))]),
        Section("Curves", [Figures([figure for figure in figures if figure is not None])]),
    ]
    if config:
        sections.append(Section("Configuration", [Listing(config)]))
    page = render_page("training report", run_dir.resolve().name, _LEAD, sections)
    path = run_dir / REPORT_NAME
    try:
        write_whole(path, page.encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; make room or make the folder writable"
        ) from error
    return path


def _config_text(path: Path) -> str:
    """The resolved configuration, as far as it is text; empty when it cannot be read."""
    try:
        text = read_bounded(path).decode(errors="replace")
    except OSError:
        return ""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _num_heads(records: Sequence[Scalars]) -> int:
    """Heads that the records have losses of; of very many the first ones."""
    keys = {key for record in records for key in record}
    present = (f"loss_head_{head}" in keys for head in range(1, _MOST_CURVES + 1))
    return sum(takewhile(bool, present))


def _sources(records: Sequence[Scalars]) -> list[str]:
    """Names of the sources of a mixture; none of a run on one source, of very many the first."""
    keys = dict.fromkeys(key for record in records for key in record)
    names = [key.removeprefix("epochs_") for key in keys if key.startswith("epochs_")]
    return names[:_MOST_CURVES]


def _plots(num_heads: int, sources: Sequence[str]) -> list[Plot]:
    # From dark to light: the further a head looks ahead, the lighter its curve.
    colors = shades(num_heads)
    heads = range(1, num_heads + 1)
    train = [Curve(f"loss_head_{k}", f"head {k}", colors[k - 1]) for k in heads]
    held_out = [
        Curve(f"eval_loss_head_{k}", f"head {k}, held out", colors[k - 1], dashed=True)
        for k in heads
    ]
    return [
        Plot("Loss per head", "nats per token", (*train, *held_out)),
        Plot("Learning rate", "", (Curve("learning_rate", "learning rate"),)),
        Plot("Gradient norm", "before clipping", (Curve("grad_norm", "gradient norm"),)),
        Plot("Throughput", "tokens/s", (Curve("tokens_per_s", "tokens/s"),)),
        Plot("Peak memory", "GiB", (Curve("memory_peak_gib", "peak memory"),)),
        Plot(
            "Held-out tokens per forward",
            "tokens",
            (Curve("eval_tokens_per_forward", "tokens per forward", dashed=True),),
        ),
        Plot(
            "Epochs of each source",
            "epochs",
            tuple(
                Curve(f"epochs_{name}", name, color)
                for name, color in zip(sources, shades(len(sources)), strict=True)
            ),
        ),
    ]


def _figure(plot: Plot, records: Sequence[Scalars]) -> Markup | None:
    """One plot as an svg element; None when no record has a value for it."""
    drawn = [curve for curve in plot.curves if values_of(records, curve.key)]
    if not drawn:
        return None

    def draw(axes: Any) -> None:
        for curve in drawn:
            _draw(axes, curve, records)
        axes.set_title(plot.title)
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        axes.grid(alpha=0.25)
        if len(drawn) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=2)

    return svg_plot(plot.title, draw)


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


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.report") -> int:
    """Write the report of the run folder named on the command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a report of a run: one HTML page, without links to anything outside.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, with metrics.jsonl")
    options = parser.parse_args(arguments)
    return exit_status(lambda: print(write_report(options.run_dir)), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
