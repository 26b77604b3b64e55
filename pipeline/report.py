"""report.html from a run's metrics: plots, final figures and the configuration, in one file.

Command line: python -m pipeline.report RUN_DIR
"""

import argparse
import html
import io
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import ConfigError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.reporting.metrics import Scalars, read_metrics
from pipeline.reporting.progress import clock

REPORT_NAME = "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.lead { color: #566; margin-top: .2rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
tr { border-bottom: 1px solid #dde; } td { font-variant-numeric: tabular-nums; }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; font-size: .85rem; }
"""


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
        ConfigError: The folder holds no metrics.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    if not records:
        raise ConfigError(f"{run_dir} has no metrics yet; wait until the run has done a step")
    heads = _num_heads(records)
    figures = [_figure(plot, records) for plot in _plots(heads, _sources(records))]
    config_path = run_dir / RESOLVED_CONFIG_NAME
    config = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    page = _page(run_dir.resolve().name, records, [f for f in figures if f], config, heads)
    path = run_dir / REPORT_NAME
    aside = path.with_name(REPORT_NAME + ".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def final_figures(records: Sequence[Scalars], num_heads: int) -> list[tuple[str, str]]:
    """The table of a report: name and value of each figure that the records hold."""
    last = records[-1]
    rows = [("Steps", f"{last['step']:,}")]
    if last.get("tokens") is not None:
        rows.append(("Tokens trained on", f"{last['tokens']:,}"))
    for name, key in (("Training loss", "loss_head_"), ("Held-out loss", "eval_loss_head_")):
        for head in range(1, num_heads + 1):
            values = _values(records, f"{key}{head}")
            if values:
                rows.append((f"{name}, head {head}", f"{values[-1]:.4f} (first {values[0]:.4f})"))
    for name, key, form in (
        ("Held-out tokens per forward", "eval_tokens_per_forward", ".2f"),
        ("Final learning rate", "learning_rate", ".3g"),
    ):
        values = _values(records, key)
        if values:
            rows.append((name, f"{values[-1]:{form}}"))
    for name, key, form in (
        ("Tokens per second, median", "tokens_per_s", ",.0f"),
        ("Model FLOPS utilisation, median", "mfu", ".1%"),
    ):
        values = _values(records, key)
        if values:
            rows.append((name, f"{statistics.median(values):{form}}"))
    if memory := _values(records, "memory_peak_gib"):
        rows.append(("Peak memory", f"{max(memory):.2f} GiB"))
    if times := _values(records, "step_time_s"):
        rows.append(("Time per step, median", f"{statistics.median(times):.3f} s"))
        rows.append(("Time in reported steps", clock(sum(times))))
    if skipped := sum(1 for record in records if record.get("skipped")):
        rows.append(("Skipped steps", str(skipped)))
    return rows


def _num_heads(records: Sequence[Scalars]) -> int:
    keys = {key for record in records for key in record}
    numbers = [int(m[1]) for key in keys if (m := re.fullmatch(r"loss_head_(\d+)", key))]
    return max(numbers, default=0)


def _sources(records: Sequence[Scalars]) -> list[str]:
    """Names of the sources of a mixture; none of a run on one source."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [key.removeprefix("epochs_") for key in keys if key.startswith("epochs_")]


def _plots(num_heads: int, sources: Sequence[str]) -> list[Plot]:
    colors = _head_colors(num_heads)
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
                for name, color in zip(sources, _head_colors(len(sources)), strict=True)
            ),
        ),
    ]


def _head_colors(num_heads: int) -> list[str]:
    """Colours from dark to light: the further a head looks ahead, the lighter its curve."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shades = colormaps["viridis"]
    return [to_hex(shades(0.9 * k / max(num_heads - 1, 1))) for k in range(num_heads)]


def _figure(plot: Plot, records: Sequence[Scalars]) -> str:
    """One plot as an svg element; empty when no record has a value for it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawn = [curve for curve in plot.curves if _values(records, curve.key)]
    if not drawn:
        return ""
    # The salt keeps the ids of several plots in one page apart, and equal from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.title, "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.add_subplot()
        for curve in drawn:
            _draw(axes, curve, records)
        axes.set_title(plot.title)
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(drawn) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": plot.title})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axes: Any, curve: Curve, records: Sequence[Scalars]) -> None:
    points = [(r["step"], r[curve.key]) for r in records if r.get(curve.key) is not None]
    few = len(points) <= 50
    axes.plot(
        [step for step, _ in points],
        [value for _, value in points],
        label=curve.label,
        color=curve.color,
        linestyle="--" if curve.dashed else "-",
        linewidth=1.4 if curve.dashed else 1.1,
        marker="o" if few else "",
        markersize=3,
    )


def _page(
    name: str, records: Sequence[Scalars], figures: Sequence[str], config: str, num_heads: int
) -> str:
    rows = "\n".join(
        f"<tr><th scope='row'>{html.escape(label)}</th><td>{html.escape(value)}</td></tr>"
        for label, value in final_figures(records, num_heads)
    )
    plots = "\n".join(f"<figure>{figure}</figure>" for figure in figures)
    shown_config = f"<h2>Configuration</h2>\n<pre>{html.escape(config)}</pre>" if config else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}: training report</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(name)}</h1>
<p class="lead">Head k predicts the token k positions ahead. Dashed curves are held-out data.</p>
<h2>Final figures</h2>
<table>
{rows}
</table>
<h2>Curves</h2>
<div class="plots">
{plots}
</div>
{shown_config}
</body>
</html>
"""


def _values(records: Sequence[Scalars], key: str) -> list[float]:
    return [float(value) for record in records if (value := record.get(key)) is not None]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.report") -> int:
    """Write the report of the run folder named on the command line."""
    parser = argparse.ArgumentParser(prog=prog, description="Write a report of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run, with metrics.jsonl")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.run_dir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
