"""Command line: corpora to Arrow shards, `python data_prep/shard.py --input PATH --output DIR`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console

from data_prep.build import REJECTS, build
from data_prep.errors import DataError
from data_prep.file_names import IGNORED_DIRECTORIES
from data_prep.job import BuildOptions
from data_prep.manifest import VALIDATION, Manifest
from data_prep.progress import ProgressLine
from data_prep.sources import LARGEST_DOCUMENT_BYTES

EXIT_DATA_ERROR = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    options = parse_options(arguments)
    progress = ProgressLine(Console(stderr=True))
    try:
        try:
            manifest = build(options, progress)
        finally:
            progress.close()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DATA_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(summarize(manifest, options.output))
    return 0


def parse_options(arguments: Sequence[str] | None) -> BuildOptions:
    """Turn the command line into options."""
    given = _make_parser().parse_args(arguments)
    return BuildOptions(
        inputs=tuple(given.input),
        output=given.output,
        tokenizer=given.tokenizer,
        workers=given.workers,
        validation_fraction=given.validation_fraction,
        globs=tuple(given.glob),
        exclude=tuple(given.exclude),
        text_key=given.text_key,
        on_bad=given.on_bad,
        max_bad_fraction=given.max_bad_fraction,
        shard_tokens=given.shard_tokens,
        unit_bytes=given.unit_bytes,
        eos_token=given.eos_token,
        source=given.source,
        special_tokens=given.special_tokens,
        max_document_bytes=given.max_document_bytes,
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python data_prep/shard.py",
        description=(
            "Tokenize .jsonl files, text files and directories of source files into Arrow shards "
            "with a held-out split. Killed at any point, the same command finishes the rest. "
            "Folders named " + ", ".join(sorted(IGNORED_DIRECTORIES)) + " are left out."
        ),
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, type=Path, metavar="PATH", action="extend")
    add("--output", required=True, type=Path, metavar="DIR")
    add(
        "--tokenizer",
        required=True,
        metavar="FILE|train:8192|bytes",
        help="a tokenizer.json or a directory with one; one trained on the input; or plain bytes",
    )
    add("--workers", type=int, metavar="N", help="processes (default: the cores it may use)")
    add("--validation-fraction", type=float, default=0.01, metavar="F", help="(0.01)")
    add(
        "--glob",
        nargs="+",
        default=[],
        action="extend",
        metavar="PATTERN",
        help="files to take from directories (default: names that look like text or source)",
    )
    add(
        "--exclude",
        nargs="+",
        default=[],
        action="extend",
        metavar="PATTERN",
        help="files and folders to leave out of directories",
    )
    add("--text-key", default="text", metavar="KEY", help="key of the text in .jsonl (text)")
    add(
        "--on-bad",
        choices=("skip", "fail"),
        default="skip",
        help="count and list bad records, or stop at the first (skip)",
    )
    add(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="largest share of bad .jsonl records that is still accepted (0.001)",
    )
    add("--shard-tokens", type=int, default=1 << 27, metavar="N", help="(134217728)")
    add("--unit-bytes", type=int, metavar="N", help="input bytes per unit of work (by input size)")
    add("--eos-token", metavar="TOKEN", help="end of document (the usual names)")
    add("--source", default="corpus", metavar="NAME", help="folder name in shards/SPLIT (corpus)")
    add(
        "--special-tokens",
        choices=("text", "id", "reject"),
        default="text",
        help="text that spells a special token is plain text, the token, or a reject (text)",
    )
    add(
        "--max-document-bytes",
        type=int,
        default=LARGEST_DOCUMENT_BYTES,
        metavar="N",
        help="a longer file or record is rejected, to bound the memory (67108864)",
    )
    return parser


def summarize(manifest: Manifest, output: Path) -> str:
    """A few lines on what the set holds; the counts of the first line add up."""
    totals = manifest.totals
    lines = [
        f"{totals.records:,} records = {totals.documents:,} documents + {totals.empty:,} empty + "
        f"{totals.rejects:,} rejects"
    ]
    if totals.rejects:
        reasons = ", ".join(f"{count:,} {why}" for why, count in totals.rejects_by_reason.items())
        lines.append(f"rejects: {reasons}; listed in {output / REJECTS}")
    for name, split in manifest.splits.items():
        lines.append(
            f"{name}: {split.rows:,} documents, {split.tokens:,} tokens, {split.shards:,} shards, "
            f"{split.bytes / 1e6:,.1f} MB"
        )
        if not split.rows and name == VALIDATION and manifest.validation_fraction:
            lines.append(
                f"note: no document fell into the held-out {manifest.validation_fraction:g}; "
                "raise --validation-fraction to evaluate on this corpus"
            )
    num_tokens = sum(split.tokens for split in manifest.splits.values())
    lines.append(
        f"tokenizer: {manifest.tokenizer.vocab_size:,} tokens, {manifest.dtype}, "
        f"{totals.text_bytes / max(num_tokens, 1):.2f} bytes per token"
    )
    lines.append(f"fingerprint {manifest.fingerprint[:16]}, complete in {output}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
