"""Command line: corpora to Arrow shards, `python data_prep/shard.py --input PATH --output DIR`."""

import os
import sys

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first, where its own modules (inspect) would be looked
    # for before the library's; the packages are found from its parent.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep.building.build import REJECTS, build
from data_prep.building.data_config import read_config
from data_prep.building.journal import claims_folder
from data_prep.building.options import BuildOptions
from data_prep.errors import (
    EXIT_BAD_RECORDS,
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    DataError,
    print_error,
    printable,
    run_command,
)
from data_prep.inputs.file_names import IGNORED_DIRECTORIES
from data_prep.shards.manifest import VALIDATION, Manifest
from data_prep.workers.array_tasks import ArrayWorkers, find_array_task
from data_prep.workers.mpi import MpiWorkers, World, join_world
from data_prep.workers.phase import Workers
from data_prep.workers.pool import LocalWorkers
from data_prep.workers.progress import ProgressLine

DESCRIPTION = f"""\
Tokenize .jsonl, .json and text files (also .gz, .zst, .xz), .parquet, .arrow, saved Hugging Face
datasets and directories of them into Arrow shards with a held-out split. In a directory .json files
are taken only by --glob. Killed at any point, the same command finishes the rest.

Folders left out: {", ".join(sorted(IGNORED_DIRECTORIES)[:8])},
{", ".join(sorted(IGNORED_DIRECTORIES)[8:])}.
"""
EPILOG = f"""\
examples:
  PROG --input raw/*.jsonl.gz --output data/corpus --tokenizer train:32000
  PROG --input src docs --exclude tests --output data/code --tokenizer bytes --dedup
  PROG --input hf:allenai/c4:en@train --output data/c4 --tokenizer train:8192
  PROG --input qa.jsonl --prompt-key q --completion-key a --output qa --tokenizer bytes
  PROG --config configs/data/mixture.yaml

exit status: 0 complete, {EXIT_ERROR} an error, 2 wrong arguments,
{EXIT_BAD_RECORDS} more bad records than --max-bad-fraction, {EXIT_INTERRUPTED} after Ctrl-C
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python data_prep/shard.py") -> int:
    """Run the command on every rank that was started; give its exit status."""
    try:
        world = join_world(os.environ)
    except DataError as error:
        print_error(error)
        return EXIT_ERROR
    if world is None:
        return _run(arguments, prog, None)
    return world.run(lambda: _run(arguments, prog, world))


def _run(arguments: Sequence[str] | None, prog: str, world: World | None) -> int:
    """Build the set; under MPI on rank 0, which coordinates the others."""
    progress = ProgressLine(Console(stderr=True))

    def run() -> int:
        try:
            options, task = parse_options(arguments, prog)
            manifest = build(options, progress, _choose_workers(options, task, world))
        finally:
            progress.close()
        print(printable(summarize(manifest, options.output)))
        return 0

    return run_command(run, "interrupted; run the same command again to resume")


def _choose_workers(options: BuildOptions, task: str | None, world: World | None) -> Workers:
    if world is not None:
        if options.workers is not None or task is not None:
            raise DataError(
                f"--workers and --array-task have no effect with {world.size} MPI ranks: each is "
                "one worker; leave them out and start one rank per core"
            )
        return MpiWorkers(world)
    array_task = find_array_task(task, os.environ)
    if array_task is not None:
        return ArrayWorkers(array_task, claims_folder(options.output), options.workers)
    return LocalWorkers(options.workers)


def parse_options(
    arguments: Sequence[str] | None, prog: str = "python data_prep/shard.py"
) -> tuple[BuildOptions, str | None]:
    """Turn the command line, and the file that it names, into options and --array-task.

    Raises:
        DataError: The file is at fault, or the output or the tokenizer is not named.
    """
    given = vars(_make_parser(prog).parse_args(arguments))
    config: Path | None = given.pop("config", None)
    task: str | None = given.pop("array_task", None)
    options = read_config(config) if config else {}
    if given.keys() & {"inputs", "source"}:
        options.pop("sources", None)
    options |= {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    missing = [name for name in ("output", "tokenizer") if name not in options]
    if missing:
        named = " and ".join(f"--{name}" for name in missing)
        raise DataError(f"{named} is missing; give it here or in a --config file")
    return BuildOptions(**options), task


def _make_parser(prog: str) -> argparse.ArgumentParser:
    """The options; those that are not given stay out, so that a file or a default can say."""
    parser = argparse.ArgumentParser(
        prog=prog,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML with any of these options, and sources")
    add(
        "--input",
        dest="inputs",
        nargs="+",
        type=Path,
        metavar="PATH",
        action="extend",
        help="files, directories, and datasets of the Hugging Face Hub or of folders laid out like "
        "those there: hf:NAME[:CONFIG][@SPLIT][#REVISION]",
    )
    add("--output", type=Path, metavar="DIR", help="folder of the shard set")
    add(
        "--tokenizer",
        metavar="FILE|train:8192|bytes",
        help="a tokenizer.json or a directory with one; one trained on the input; or plain bytes",
    )
    add("--workers", type=int, metavar="N", help="processes (default: what the input is worth)")
    add(
        "--array-task",
        metavar="I/N",
        help="be one of N processes, maybe on other machines, that share --output and nothing else "
        "(in a Slurm array: by itself)",
    )
    add(
        "--validation-fraction",
        type=float,
        metavar="F",
        help="share of the documents that is held out (0.01)",
    )
    add(
        "--glob",
        dest="globs",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="files to take from directories (default: names that look like text or source code)",
    )
    add(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="files and folders to leave out of directories",
    )
    add("--text-key", metavar="KEY", help="key or column of the text; a.b is nested (text)")
    add("--prompt-key", metavar="KEY", help="key of prompts: context, on which there is no loss")
    add("--completion-key", metavar="KEY", help="key of the completions to them")
    add(
        "--messages-key",
        metavar="KEY",
        help="key of lists of messages; the loss is on what the assistant says",
    )
    add(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template that writes messages out (that of the tokenizer's folder)",
    )
    add(
        "--dedup",
        nargs="?",
        const="exact",
        choices=("none", "exact"),
        help="exact: of documents with the same text keep the first, over all sources (none)",
    )
    add(
        "--on-bad",
        choices=("skip", "fail"),
        help="count and list bad records, or stop at the first (skip)",
    )
    add(
        "--max-bad-fraction",
        type=float,
        metavar="F",
        help="largest share of bad records in files of records that is still accepted (0.001)",
    )
    add("--shard-tokens", type=int, metavar="N", help="most tokens of one shard (16777216)")
    add("--unit-bytes", type=int, metavar="N", help="input bytes per unit of work (by input size)")
    add("--eos-token", metavar="TOKEN", help="name of the end-of-document token (the usual names)")
    add("--source", metavar="NAME", help="folder name in shards/SPLIT for --input (corpus)")
    add(
        "--special-tokens",
        choices=("text", "id", "reject"),
        help="text that spells a special token is plain text, the token, or a reject (text)",
    )
    add(
        "--max-document-bytes",
        type=int,
        metavar="N",
        help="a longer file or record is rejected, to bound the memory (67108864)",
    )
    add(
        "--encoder",
        choices=("auto", "gigatoken", "tokenizers"),
        help="library that encodes; the ids are the same, gigatoken is many times faster (auto)",
    )
    return parser


def summarize(manifest: Manifest, output: Path) -> str:
    """A few lines on what the set holds; the counts of the first line add up."""
    totals = manifest.totals
    lines = [
        f"{totals.records:,} records = {totals.documents:,} documents + {totals.empty:,} empty + "
        + (f"{totals.duplicates:,} duplicates + " if manifest.dedup == "exact" else "")
        + f"{totals.rejects:,} rejects"
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
                f"note: no document was chosen for the held-out {manifest.validation_fraction:g}; "
                "raise --validation-fraction to evaluate on this corpus"
            )
    if len(manifest.sources) > 1:
        lines += [
            f"source {source.name}: {source.totals.documents:,} documents, "
            f"{sum(split.tokens for split in source.splits.values()):,} tokens"
            + ("" if source.weight is None else f", weight {source.weight:g}")
            for source in manifest.sources
        ]
    num_tokens = sum(split.tokens for split in manifest.splits.values())
    lines.append(
        f"tokenizer: {manifest.tokenizer.vocab_size:,} tokens, {manifest.dtype}, "
        f"{totals.text_bytes / max(num_tokens, 1):.2f} bytes per token"
    )
    lines.append(f"fingerprint {manifest.fingerprint[:16]}, complete in {output}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
