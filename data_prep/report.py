"""Command line: a page about a shard set, `python -m data_prep.report DIR`.

One HTML file that needs no other file and no network: totals, sources, lengths of documents, what
rows of a length make of them, and what was rejected, why and where.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from data_prep.errors import run_command
from data_prep.loading.length_figures import histogram, percentiles, sequence_figures
from data_prep.shards.atomic import write_whole
from data_prep.shards.manifest import TRAIN, VALIDATION, InputEntry, Ledger, Manifest
from data_prep.shards.shard_set import ShardSet
from foundation.pages import Block, Figures, Paragraph, Section, Table, render_page
from foundation.plots import svg_plot

EPILOG = """\
example:
  PROG data/corpus --output corpus.html

exit status: 0 written, 1 an error, 2 wrong arguments, 130 after Ctrl-C
"""
LISTED_FILES = 10
Cells = Sequence[object]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_prep.report") -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a page about a shard set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a shard set")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page (report.html)",
    )
    given = parser.parse_args(arguments)

    def run() -> int:
        write_whole(given.output, make_page(given.directory).encode("utf-8", "backslashreplace"))
        print(given.output)
        return 0

    return run_command(run)


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
        Section("Totals", [Table(_totals(manifest, lengths))]),
        Section("Splits", [_splits(manifest)]),
        Section("Sources", [_sources(manifest)]),
        Section("Lengths of documents", _lengths(parts)),
        Section("Sequences of a length", [_rows(parts[TRAIN])]),
        Section("Rejected records", _rejects(manifest)),
    ]
    lead = f"fingerprint {manifest.fingerprint}"
    return render_page("shard set", directory.resolve().name, lead, sections)


def _totals(manifest: Manifest, lengths: NDArray[np.int64]) -> list[Cells]:
    ledger, tokenizer, tokens = manifest.totals, manifest.tokenizer, int(lengths.sum())
    return [
        ("Documents", f"{ledger.documents:,}"),
        ("Tokens, ends of documents included", f"{tokens:,}"),
        *_targets(manifest),
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


def _targets(manifest: Manifest) -> list[Cells]:
    """How many tokens are targets, where a part of the set says so."""
    if not manifest.has_targets:
        return []
    count = sum(shard.targets.count if shard.targets else shard.tokens for shard in manifest.shards)
    return [("Targets: completions, and texts", f"{count:,}")]


def _splits(manifest: Manifest) -> Table:
    rows = [
        (name, f"{split.rows:,}", f"{split.tokens:,}", f"{split.shards:,}")
        for name, split in manifest.splits.items()
    ]
    return Table(rows, ("Split", "Documents", "Tokens", "Shards"))


def _sources(manifest: Manifest) -> Table:
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
    return Table(rows, (*heads, "Rejected"))


def _lengths(parts: Mapping[str, NDArray[np.int64]]) -> list[Block]:
    drawn = {name: lengths for name, lengths in parts.items() if len(lengths)}
    heads = ["Tokens per document", *(name for name, _ in percentiles(next(iter(drawn.values()))))]
    rows = [
        (name, *(f"{value:,}" for _, value in percentiles(lengths)))
        for name, lengths in drawn.items()
    ]
    figure = _histogram(np.concatenate(list(drawn.values())))
    return [Figures([figure]), Table(rows, heads)]


def _histogram(lengths: NDArray[np.int64]) -> Markup:
    """Shares of documents and of tokens by length, as an svg element."""
    documents, tokens = histogram(lengths)
    places = np.arange(len(documents))

    def draw(axes: Any) -> None:
        axes.bar(places - 0.2, documents / documents.sum(), 0.4, label="documents", color="#1f6feb")
        axes.bar(places + 0.2, tokens / tokens.sum(), 0.4, label="tokens", color="#d29922")
        axes.set_xticks(places, [f"{1 << place:,}" for place in places], rotation=45)
        axes.set_xlabel("tokens per document, from this number to the next")
        axes.set_ylabel("share")
        axes.legend(frameon=False)

    return svg_plot("lengths", draw, size_inches=(7.2, 3.6))


def _rows(lengths: NDArray[np.int64]) -> Block:
    if not len(lengths):
        return Paragraph("The training split is empty.")
    rows = [
        (f"{f.sequence_length:,}", f"{f.fitting:.2%}", f"{f.cut:.2%}", f"{f.padding:.2%}")
        for f in sequence_figures(lengths)
    ]
    heads = (
        "Sequence of tokens",
        "Documents that fit",
        "Of those, cut by concatenation",
        "Padding in best-fit packing",
    )
    return Table(rows, heads)


def _rejects(manifest: Manifest) -> list[Block]:
    """Reasons over all files, and the files with the most rejected records."""
    reasons = manifest.totals.rejects_by_reason
    if not reasons:
        return [Paragraph("None.")]
    by_count = sorted(reasons.items(), key=lambda item: -item[1])

    def rejects(entry: InputEntry) -> int:
        return entry.ledger.rejects

    files = sorted(manifest.inputs, key=rejects, reverse=True)[:LISTED_FILES]
    listed = [
        (entry.path, f"{rejects(entry):,}", f"{entry.ledger.records:,}")
        for entry in files
        if rejects(entry)
    ]
    return [
        Table([(why, f"{count:,}") for why, count in by_count], ("Reason", "Records")),
        Paragraph("Each is listed with its file and place in rejects.jsonl. Most are in:"),
        Table(listed, ("File", "Rejected", "Of records")),
    ]


if __name__ == "__main__":
    sys.exit(main())
