"""Command line: check a shard set from end to end, `python -m data_prep.verify DIR`."""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.building.journal import find_edit
from data_prep.errors import DataError, explain, printable, run_command, shown
from data_prep.shards.manifest import (
    TOKENIZER,
    Manifest,
    find_contradiction,
    load_manifest,
    read_manifest,
)
from data_prep.shards.shard_checks import ShardChecks
from data_prep.shards.shard_set import TOKENIZER_BYTES
from data_prep.tokenization.tokenizer import Tokenizer
from foundation.bounded_files import read_bounded

EPILOG = """\
examples:
  PROG data/corpus
  PROG data/corpus --sample 100000

exit status: 0 the set is whole, 1 it is not (each problem is a line), 2 wrong arguments,
130 after Ctrl-C
"""
SAMPLED_DOCUMENTS = 1000


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_prep.verify") -> int:
    """Run the command: one line per problem, exit status 1 when there is any."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Check the files, counts, ids and documents of a shard set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a shard set")
    parser.add_argument(
        "--sample",
        type=int,
        default=SAMPLED_DOCUMENTS,
        metavar="N",
        help="documents that are decoded back (1000)",
    )
    given = parser.parse_args(arguments)
    return run_command(lambda: _verify(given.directory, given.sample))


def _verify(directory: Path, sample: int) -> int:
    """Print what is wrong with a set, or what it holds; give the exit status."""
    problems = 0
    try:
        for problem in find_problems(directory, sample):
            problems += 1
            print(printable(" ".join(problem.splitlines())), file=sys.stderr)
    except (DataError, OSError) as error:
        problems += 1
        explained = explain(error) if isinstance(error, OSError) else error
        print(printable(str(explained)), file=sys.stderr)
    if problems:
        print(f"{shown(directory)}: {problems} problems")
        return 1
    manifest = load_manifest(directory)
    for line in describe(manifest):
        print(line)
    if why := _open_tokenizer(directory, manifest).why_lossy:
        print(f"documents were not decoded back to their text: {why}")
    print(f"{shown(directory)}: ok")
    return 0


def find_problems(directory: Path, sample: int = SAMPLED_DOCUMENTS) -> Iterator[str]:
    """Yield one line for each thing that is wrong with a shard set.

    Args:
        directory: The shard set.
        sample: About how many documents to decode back, spread over all shards.

    Raises:
        DataError: The set cannot be opened at all.
    """
    manifest = read_manifest(directory)
    if contradiction := find_contradiction(directory, manifest):
        yield contradiction
    if problem := find_edit(directory):
        yield problem
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = _open_tokenizer(directory, manifest)
    except DataError as error:
        yield str(error)
    if tokenizer is not None:
        for name in ("vocab_size", "eos_id", "max_token_id"):
            has, says = getattr(tokenizer, name), getattr(manifest.tokenizer, name)
            if has != says:
                yield f"{directory}: the tokenizer's {name} is {has}, the manifest says {says}"
    stride = max(1, manifest.totals.documents // max(sample, 1))
    checks = ShardChecks(directory, manifest, tokenizer, stride)
    for shard in manifest.shards:
        yield from checks.find_problems(shard)
    if checks.is_complete:
        yield from _count_problems(manifest, checks.documents)


def _open_tokenizer(directory: Path, manifest: Manifest) -> Tokenizer:
    known, path = manifest.tokenizer, directory / TOKENIZER
    try:
        content = read_bounded(path, TOKENIZER_BYTES)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); copy the set again") from error
    if hashlib.sha256(content).hexdigest() != known.sha256:
        raise DataError(
            f"{path} is not the tokenizer the shards were made with; copy the set again"
        )
    return Tokenizer(content, known.eos_token, str(path), manifest.special_tokens)


def _count_problems(manifest: Manifest, documents: Mapping[int, int]) -> Iterator[str]:
    """Compare the documents found in the shards with the ledgers, by file and by source."""
    by_source: Counter[str] = Counter()
    for number, entry in enumerate(manifest.inputs):
        count = documents.get(number, 0)
        by_source[entry.source] += count
        if count != entry.ledger.documents:
            yield (
                f"{entry.path}: {count:,} documents are in the shards, "
                f"{entry.ledger.documents:,} in the ledger"
            )
    for source in manifest.sources:
        found = by_source[source.name]
        if found != source.totals.documents:
            yield (
                f"source {source.name}: {found:,} documents are in the shards, "
                f"{source.totals.documents:,} in its totals"
            )


def describe(manifest: Manifest) -> Iterator[str]:
    """What a set holds, one line per source."""
    for name in dict.fromkeys(shard.source for shard in manifest.shards):
        shards = [shard for shard in manifest.shards if shard.source == name]
        yield (
            f"source {name}: {len(shards):,} shards, {sum(s.rows for s in shards):,} documents, "
            f"{sum(s.tokens for s in shards):,} tokens"
        )


if __name__ == "__main__":
    sys.exit(main())
