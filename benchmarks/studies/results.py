"""A study's table and page: mean and range over seeds, for each setting."""

import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from markupsafe import Markup

from benchmarks.studies.grid import SEED, Grid
from benchmarks.tables import machine_line, replace_section
from foundation.durable_files import write_whole
from foundation.pages import Figures, Paragraph, Section, Table, render_page
from foundation.plots import shades, svg_plot

Group = tuple[str, ...]


def write_results(
    title: str,
    columns: Mapping[str, str],
    grid: Grid,
    results: Sequence[Mapping[str, Any]],
    output: Path | None,
    curves: Mapping[str, Mapping[str, str]],
) -> str:
    """The table as Markdown; with `output` also its section of README.md there, and result.html.

    Args:
        title: of the page.
        columns: figures, with their headings.
        grid: of the study.
        results: of all points.
        output: where to write.
        curves: by title, figures that follow one another, likewise: each title a table and a plot.
    """
    settings = [key for key in results[0]["settings"] if key != SEED]
    groups = grouped(results, settings)
    names = [key.rpartition(".")[2] for key in settings]
    tables = {"": _table(names, columns, groups)}
    for curve, places in curves.items():
        measured = {
            group: found
            for group, found in groups.items()
            if any(place in figures for figures in found for place in places)
        }
        tables[curve] = _table(names, places, measured)
    markdown = "\n\n".join(
        f"{curve}:\n\n{_markdown(table)}" if curve else _markdown(table)
        for curve, table in tables.items()
    )
    told = _told(grid, results)
    if output is not None:
        replace_section(output / "README.md", grid.variant or "study", f"{told}\n\n{markdown}")
        plots = [_plot(name, heading, groups) for name, heading in columns.items()]
        plots += [_curves(curve, places, groups) for curve, places in curves.items()]
        page = _page(title, told, tables, plots)
        name = "-".join(filter(None, ["result", grid.variant]))
        write_whole(output / f"{name}.html", page.encode())
    return f"{told}\n\n{markdown}"


def grouped(
    results: Sequence[Mapping[str, Any]], settings: Sequence[str]
) -> dict[Group, list[dict[str, float]]]:
    """Figures of all seeds, by the values of the other settings."""
    groups: dict[Group, list[dict[str, float]]] = defaultdict(list)
    for result in results:
        groups[tuple(str(result["settings"][key]) for key in settings)].append(result["figures"])
    return dict(groups)


def _cell(values: Sequence[float]) -> str:
    """Mean and range over seeds: `0.52 (0.49 to 0.55)`; a dash where it was not measured."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _table(
    names: Sequence[str],
    columns: Mapping[str, str],
    groups: Mapping[Group, Sequence[Mapping[str, float]]],
) -> Table:
    """A row for each setting."""
    rows = [
        [
            *group,
            *(
                _cell([figures[column] for figures in found if column in figures])
                for column in columns
            ),
        ]
        for group, found in groups.items()
    ]
    return Table(rows, [*names, *columns.values()])


def _markdown(table: Table) -> str:
    heads, *rows = ("| " + " | ".join(map(str, line)) + " |" for line in (table.heads, *table.rows))
    return "\n".join([heads, "|" + "---|" * len(table.heads), *rows])


def _told(grid: Grid, results: Sequence[Mapping[str, Any]]) -> str:
    """What was run, and where."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    command = f"python -m benchmarks.studies.{Path(sys.argv[0]).parent.name}"
    if grid.variant:
        command += f" --variant {grid.variant}"
    seeds = ", ".join(map(str, grid.axes.get(SEED, [1])))
    hours = sum(result["seconds"] for result in results) / 3600
    return (
        f"{machine_line()} Commit {commit or 'unknown'}, `{command}`, seeds {seeds}: mean, and "
        f"least to most, over seeds; {hours:.1f} hours in all."
    )


def _page(title: str, told: str, tables: Mapping[str, Table], plots: Sequence[Markup]) -> str:
    whiskers = "Bars and points are means, whiskers reach from the least seed to the most."
    return render_page(
        "study",
        title,
        told,
        [
            *(Section(curve or "Figures", [table]) for curve, table in tables.items()),
            Section("Over settings", [Figures(plots)]),
            Section("", [Paragraph(whiskers)]),
        ],
    )


def _plot(name: str, heading: str, groups: Mapping[Group, Sequence[Mapping[str, float]]]) -> Markup:
    """One bar for each setting."""

    def draw(axes: Any) -> None:
        colors = shades(len(groups))
        for place, (group, found) in enumerate(groups.items()):
            values = [figures[name] for figures in found if name in figures]
            if not values:
                continue
            middle = mean(values)
            error = [[middle - min(values)], [max(values) - middle]]
            axes.bar(place, middle, yerr=error, color=colors[place], label=", ".join(group))
        axes.set_xticks(range(len(groups)), [", ".join(group) for group in groups], rotation=30)
        axes.set_ylabel(heading)

    return svg_plot(heading, draw)


def _curves(
    title: str,
    places: Mapping[str, str],
    groups: Mapping[Group, Sequence[Mapping[str, float]]],
) -> Markup:
    """One line for each setting, over the places."""

    def draw(axes: Any) -> None:
        colors = shades(len(groups))
        for color, (group, found) in zip(colors, groups.items(), strict=True):
            seeds = [[figures[place] for figures in found if place in figures] for place in places]
            if not all(seeds):
                continue
            means = [mean(values) for values in seeds]
            errors = [
                [middle - min(values) for middle, values in zip(means, seeds, strict=True)],
                [max(values) - middle for middle, values in zip(means, seeds, strict=True)],
            ]
            axes.errorbar(
                range(len(places)), means, yerr=errors, color=color, label=", ".join(group)
            )
        axes.set_xticks(range(len(places)), list(places.values()))
        axes.legend()

    return svg_plot(title, draw)
