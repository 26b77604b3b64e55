"""report.html from a run's metrics: plots, final figures and the configuration, in one file.

Several runs are compared on one page, and a folder of runs gets an index.

Command line: python -m pipeline.report RUN_DIR ... | --index FOLDER
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from foundation.bounded_files import read_bounded
from foundation.command_line import exit_status
from foundation.durable_files import write_whole
from foundation.pages import Figures, Listing, Section, Table, render_page
from foundation.plots import shades
from model.errors import ConfigError
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.reporting.curves import Curve, Plot, figure
from pipeline.reporting.final_figures import final_figures
from pipeline.reporting.metrics import Scalars, read_metrics
from pipeline.reporting.run_events import run_events
from pipeline.reporting.run_pages import comparison_page, index_page

EPILOG = """\
examples:
  PROG runs/7b                          writes runs/7b/report.html
  PROG runs/7b runs/7b_staged           compares them in runs/comparison.html
  PROG runs/reviewed --review           writes review.html: what is learned, forgotten
  PROG --index runs                     lists all runs of the folder in runs/index.html

exit status: 0 the page is written, 1 there are no metrics to read (in one line), 2 wrong arguments
"""
REPORT_NAME, REVIEW_NAME = "report.html", "review.html"
COMPARISON_NAME, INDEX_NAME = "comparison.html", "index.html"
_MOST_CURVES = 64  # of heads or sources

_LEAD = "Head k predicts the token k positions ahead. Dashed curves are held-out data."


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
    events = run_events(run_dir, records)
    figures = [figure(plot, [records], events) for plot in _plots(heads, _sources(records))]
    config = _config_text(run_dir / RESOLVED_CONFIG_NAME)
    sections = [
        Section("Final figures", [Table(final_figures(records, heads))]),
        Section("Curves", [Figures([svg for svg in figures if svg is not None])]),
    ]
    if config:
        sections.append(Section("Configuration", [Listing(config)]))
    page = render_page("training report", run_dir.resolve().name, _LEAD, sections)
    return _write(run_dir / REPORT_NAME, page)


def _write(path: Path, page: str) -> Path:
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


def main(arguments: Sequence[str] | None = None, prog: str = "python -m pipeline.report") -> int:
    """Write the page that the command line asks for; its path is printed."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a page about runs: one HTML file, without links to anything outside.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        nargs="*",
        type=Path,
        help="folder of a run, with metrics.jsonl; several are compared",
    )
    parser.add_argument(
        "--review",
        action="store_true",
        help="of a run with data.review: review.html, with sequences learned and forgotten",
    )
    parser.add_argument("--index", metavar="FOLDER", type=Path, help="list the runs of a folder")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="where a comparison or an index goes"
    )
    options = parser.parse_args(arguments)
    if bool(options.run_dir) == bool(options.index):
        parser.error("give one run, several runs, or --index FOLDER")
    if options.output and len(options.run_dir) == 1:
        parser.error("--output is for comparisons and indexes; a report is in its run's folder")
    if options.review and len(options.run_dir) != 1:
        parser.error("--review is about one run: give its folder")
    return exit_status(lambda: print(_page(options)), ConfigError)


def _page(options: argparse.Namespace) -> Path:
    """Write what was asked for."""
    if options.index:
        return _write(options.output or options.index / INDEX_NAME, index_page(options.index))
    if options.review:
        from pipeline.reporting.review_page import review_page  # late: it reads shards with torch

        (run_dir,) = options.run_dir
        return _write(run_dir / REVIEW_NAME, review_page(run_dir))
    if len(options.run_dir) == 1:
        return write_report(options.run_dir[0])
    beside = options.run_dir[0].absolute().parent / COMPARISON_NAME
    return _write(options.output or beside, comparison_page(options.run_dir))


if __name__ == "__main__":
    sys.exit(main())
