"""Command line: a page about a shard set, `python -m data_prep.report DIR`.

One HTML file that needs no other file and no network: totals, sources, lengths of documents, what
rows of a length make of them, and what was rejected, why and where.
"""

import argparse
import html
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.loading.length_figures import histogram, percentiles, row_figures
from data_prep.shards.atomic import write_whole
from data_prep.shards.manifest import TRAIN, VALIDATION, InputEntry, Ledger, Manifest
from data_prep.shards.shard_set import ShardSet

LISTED_FILES = 10
Cells = Sequence[object]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff;
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.lead { color: #566; margin-top: .2rem; overflow-wrap: anywhere; }
figure { margin: 0; max-width: 720px; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; }
td, th { padding: .25rem .9rem .25rem 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; font-weight: 600; overflow-wrap: anywhere; }
tr { border-bottom: 1px solid #dde; }
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_prep.report") -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="Write a page about a shard set.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)"
    )
    given = parser.parse_args(arguments)
    try:
        write_whole(given.output, make_page(given.directory).encode())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(given.output)
    return 0


def make_page(directory: Path) -> str:
    """The page as HTML.

    Raises:
        DataError: The set cannot be opened or read.
    """
    train = ShardSet.open(directory, TRAIN)
    manifest = train.manifest
    parts = {
        TRAIN: train.document_lengths(),
        VALIDATION: ShardSet.open(directory, VALIDATION).document_lengths(),
    }
    lengths = np.concatenate(list(parts.values()))
    sections = [
        ("Totals", _table(("", ""), _totals(manifest, lengths))),
        ("Splits", _splits(manifest)),
        ("Sources", _sources(manifest)),
        ("Lengths of documents", _lengths(parts)),
        ("Rows of a length", _rows(parts[TRAIN])),
        ("Rejected records", _rejects(manifest)),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{content}" for title, content in sections)
    name = html.escape(directory.resolve().name)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: shard set</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p class="lead">fingerprint {manifest.fingerprint}</p>
{body}
</body>
</html>
"""


def _totals(manifest: Manifest, lengths: NDArray[np.int64]) -> list[Cells]:
    ledger, tokenizer, tokens = manifest.totals, manifest.tokenizer, int(lengths.sum())
    return [
        ("Documents", f"{ledger.documents:,}"),
        ("Tokens, ends of documents included", f"{tokens:,}"),
        ("Text", f"{ledger.text_bytes / 1e6:,.1f} MB"),
        ("Bytes of text per token", f"{ledger.text_bytes / max(tokens, 1):.3f}"),
        ("Shards", f"{len(manifest.shards):,}"),
        ("On disk", f"{sum(shard.bytes for shard in manifest.shards) / 1e6:,.1f} MB"),
        ("Tokenizer", f"{tokenizer.spec}, {tokenizer.vocab_size:,} tokens, {manifest.dtype}"),
        ("Records", f"{ledger.records:,}"),
        ("Empty", f"{ledger.empty:,}"),
        ("Duplicates", f"{ledger.duplicates:,}"),
        ("Rejected", f"{ledger.rejects:,}"),
    ]


def _splits(manifest: Manifest) -> str:
    return _table(
        ("Split", "Documents", "Tokens", "Shards"),
        [
            (name, f"{split.rows:,}", f"{split.tokens:,}", f"{split.shards:,}")
            for name, split in manifest.splits.items()
        ],
    )


def _sources(manifest: Manifest) -> str:
    """Documents and tokens of each source, its ledger, and its weight in a mixture."""
    all_tokens = sum(shard.tokens for shard in manifest.shards)
    rows = []
    weights = {source.name: source.weight for source in manifest.sources}
    for name in dict.fromkeys(shard.source for shard in manifest.shards):
        shards = [shard for shard in manifest.shards if shard.source == name]
        tokens = sum(shard.tokens for shard in shards)
        ledger = Ledger.total(
            entry.ledger for entry in manifest.inputs if entry.source in (name, "")
        )
        weight = weights.get(name)
        rows.append(
            (
                name,
                f"{sum(shard.rows for shard in shards):,}",
                f"{tokens:,}",
                f"{tokens / max(all_tokens, 1):.1%}",
                "by tokens" if weight is None else f"{weight:g}",
                f"{ledger.text_bytes / max(tokens, 1):.3f}",
                f"{ledger.duplicates:,}",
                f"{ledger.rejects:,}",
            )
        )
    heads = ("Source", "Documents", "Tokens", "Share", "Weight", "Bytes per token", "Duplicates")
    return _table((*heads, "Rejected"), rows)


def _lengths(parts: Mapping[str, NDArray[np.int64]]) -> str:
    drawn = {name: lengths for name, lengths in parts.items() if len(lengths)}
    heads = ["Tokens per document", *(name for name, _ in percentiles(next(iter(drawn.values()))))]
    rows = [
        (name, *(f"{value:,}" for _, value in percentiles(lengths)))
        for name, lengths in drawn.items()
    ]
    figure = _histogram(np.concatenate(list(drawn.values())))
    return f"<figure>{figure}</figure>\n{_table(heads, rows)}"


def _histogram(lengths: NDArray[np.int64]) -> str:
    """Shares of documents and of tokens by length, as an svg element."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    documents, tokens = histogram(lengths)
    places = np.arange(len(documents))
    # The salt keeps the ids of the elements equal from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lengths", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes: Any = figure.add_subplot()
        axes.bar(places - 0.2, documents / documents.sum(), 0.4, label="documents", color="#1f6feb")
        axes.bar(places + 0.2, tokens / tokens.sum(), 0.4, label="tokens", color="#d29922")
        axes.set_xticks(places, [f"{1 << place:,}" for place in places], rotation=45)
        axes.set_xlabel("tokens per document, from this number to the next")
        axes.set_ylabel("share")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": "lengths"})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _rows(lengths: NDArray[np.int64]) -> str:
    if not len(lengths):
        return "<p>The training split is empty.</p>"
    return _table(
        (
            "Row of tokens",
            "Documents that fit",
            "Of those, cut by concatenation",
            "Padding in best-fit packing",
        ),
        [
            (f"{f.row_length:,}", f"{f.fitting:.2%}", f"{f.cut:.2%}", f"{f.padding:.2%}")
            for f in row_figures(lengths)
        ],
    )


def _rejects(manifest: Manifest) -> str:
    """Reasons over all files, and the files with the most rejected records."""
    reasons = manifest.totals.rejects_by_reason
    if not reasons:
        return "<p>None.</p>"
    by_count = sorted(reasons.items(), key=lambda item: -item[1])

    def rejects(entry: InputEntry) -> int:
        return entry.ledger.rejects

    files = sorted(manifest.inputs, key=rejects, reverse=True)[:LISTED_FILES]
    return "\n".join(
        [
            _table(("Reason", "Records"), [(why, f"{count:,}") for why, count in by_count]),
            "<p>Each is listed with its file and place in rejects.jsonl. Most are in:</p>",
            _table(
                ("File", "Rejected", "Of records"),
                [
                    (entry.path, f"{rejects(entry):,}", f"{entry.ledger.records:,}")
                    for entry in files
                    if rejects(entry)
                ],
            ),
        ]
    )


def _table(heads: Sequence[str], rows: Iterable[Cells]) -> str:
    lines = ["<table>"]
    if any(heads):
        cells = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
        lines.append(f"<tr>{cells}</tr>")
    for row in rows:
        cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


if __name__ == "__main__":
    sys.exit(main())
