"""Pages over several runs: their curves in the same plots, and the list of all runs of a folder."""

import contextlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from foundation.json_text import read_json
from foundation.pages import Figures, Section, Table, link, render_page
from foundation.plots import shades
from model.errors import ConfigError
from pipeline.reporting.curves import Curve, Plot, figure
from pipeline.reporting.final_figures import final_figures
from pipeline.reporting.metrics import METRICS_NAME, Scalars, read_metrics
from pipeline.reporting.run_events import Event, run_events

_MOST_COMPARED = 16
_PLOTS = (
    ("Loss, head 1", "nats per token", "loss_head_1"),
    ("Held-out loss, head 1", "nats per token", "eval_loss_head_1"),
    ("Held-out tokens per forward", "tokens", "eval_tokens_per_forward"),
    ("Learning rate", "", "learning_rate"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Throughput", "tokens/s", "tokens_per_s"),
)
_WORDS = {
    "resume": "resumes",
    "layout": "layout changes",
    "rollback": "rollbacks",
    "skip": "skipped steps",
    "save": "saves",
}
# Named as in `pipeline.launching.verdict` and `pipeline.distributed.lease`; reports need no torch.
_VERDICT, _LEASE = "verdict.json", "lease.json"
_BEATEN_WITHIN_S = 60.0
_MAX_BYTES = 1 << 16


def comparison_page(run_dirs: Sequence[Path]) -> str:
    """A page with a plot per figure, a curve per run, and what happened to each run.

    Raises:
        ConfigError: a folder has no metrics, or the runs are too many.
    """
    if len(run_dirs) > _MOST_COMPARED:
        raise ConfigError(
            f"{len(run_dirs)} runs are more than the {_MOST_COMPARED} that one plot can show; name "
            "fewer of them"
        )
    names = _names(run_dirs)
    runs = [_records(run_dir) for run_dir in run_dirs]
    colors = shades(len(runs))
    plots = [
        Plot(
            title,
            unit,
            tuple(
                Curve(key, name, color, run=number)
                for number, (name, color) in enumerate(zip(names, colors, strict=True))
            ),
        )
        for title, unit, key in _PLOTS
    ]
    drawn = [svg for plot in plots if (svg := figure(plot, runs)) is not None]
    # One plot per run bears the marks: those of several runs would hide one another.
    happened = [
        run_events(run_dir, records) for run_dir, records in zip(run_dirs, runs, strict=True)
    ]
    marked = [
        figure(
            Plot(f"Loss of {name}", "nats per token", (Curve("loss_head_1", "head 1", color),)),
            [records],
            events,
        )
        for name, color, records, events in zip(names, colors, runs, happened, strict=True)
    ]
    sections = [
        Section("Final figures", [_figures_side_by_side(names, runs)]),
        Section("Curves", [Figures(drawn)]),
        Section(
            "What happened",
            [_event_counts(names, happened), Figures([svg for svg in marked if svg is not None])],
        ),
    ]
    lead = "Losses are of head 1, the ordinary next-token model."
    return render_page("comparison", f"{len(runs)} runs", lead, sections)


def index_page(folder: Path) -> str:
    """A page with a row for each run below a folder, last written first.

    Raises:
        ConfigError: there is no run.
    """
    run_dirs = [path.parent for path in folder.glob(f"*/{METRICS_NAME}")]
    if not run_dirs:
        raise ConfigError(f"{folder} has no runs; give the folder that holds their folders")
    rows = sorted(((_last_written(run_dir), run_dir) for run_dir in run_dirs), reverse=True)
    heads = ["Run", "Status", "Step", "Loss, head 1", "Held-out loss", "Tokens/s", "Last written"]
    table = Table([_row(run_dir, written_s) for written_s, run_dir in rows], heads)
    lead = "Status is what the last start of a run said at its end; names link to reports."
    return render_page("index", str(folder.resolve().name), lead, [Section("Runs", [table])])


def _row(run_dir: Path, written_s: float) -> list[object]:
    try:
        records = read_metrics(run_dir)
    except ConfigError:
        records = []
    report = run_dir / "report.html"
    target = report if report.is_file() else run_dir / METRICS_NAME
    last = {key: value for record in records for key, value in record.items() if value is not None}

    def shown(key: str, form: str) -> str:
        return f"{last[key]:{form}}" if key in last else "-"

    return [
        link(f"{run_dir.name}/{target.name}", run_dir.name),
        _status(run_dir),
        shown("step", ",.0f"),
        shown("loss_head_1", ".4f"),
        shown("eval_loss_head_1", ".4f"),
        shown("tokens_per_s", ",.0f"),
        datetime.fromtimestamp(written_s, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    ]


def _status(run_dir: Path) -> str:
    """The verdict on the last start; a run whose job shows signs of life is running."""
    with contextlib.suppress(OSError):
        if time.time() - (run_dir / _LEASE).stat().st_mtime < _BEATEN_WITHIN_S:
            return "running"
    try:
        verdict = read_json(run_dir / _VERDICT, _MAX_BYTES)
    except (OSError, ValueError):
        return "unknown"
    outcome = verdict.get("outcome") if isinstance(verdict, dict) else None
    return outcome if isinstance(outcome, str) else "unknown"


def _last_written(run_dir: Path) -> float:
    try:
        return (run_dir / METRICS_NAME).stat().st_mtime
    except OSError:
        return 0.0


def _records(run_dir: Path) -> list[Scalars]:
    records = read_metrics(run_dir)
    if not records:
        raise ConfigError(f"{run_dir} has no metrics yet; wait until the run has done a step")
    return records


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Names of the folders; where two have the same one, their paths."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]


def _figures_side_by_side(names: Sequence[str], runs: Sequence[Sequence[Scalars]]) -> Table:
    columns = [dict(final_figures(records, num_heads=1)) for records in runs]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [[label, *(column.get(label, "-") for column in columns)] for label in labels]
    return Table(rows, ["", *names])


def _event_counts(names: Sequence[str], happened: Sequence[Sequence[Event]]) -> Table:
    rows = [
        [words, *(sum(event.kind == kind for event in events) for events in happened)]
        for kind, words in _WORDS.items()
    ]
    return Table(rows, ["", *names])
