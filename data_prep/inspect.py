"""Command line: look at the documents of a shard set, `python -m data_prep.inspect DIR`."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError, run_command
from data_prep.shards.arrow_file import ShardRows, read_shard
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import TokenArray, Tokenizer

EPILOG = """\
examples:
  PROG data/corpus
  PROG data/corpus --split validation --document 5
  PROG data/corpus --search 'def main' --limit 3

exit status: 0 found, 1 an error or nothing found, 2 wrong arguments, 130 after Ctrl-C
"""
CONTEXT_CHARACTERS = 60
SECONDS_BETWEEN_LINES = 10.0


class Part(NamedTuple):
    """A run of tokens of a document: all of them targets, or none."""

    is_target: bool
    num_tokens: int
    text: str


class Document(NamedTuple):
    """One document of a stream.

    Attributes:
        number: Its position in the stream, from 0.
        source: Name of its source.
        origin: Input file and the record's byte offset or row number in it, as `FILE:OFFSET`.
        num_tokens: Tokens, the end-of-document token included.
        text: Its text.
        parts: The same in parts of prompts and targets; None when all of it is targets.
    """

    number: int
    source: str
    origin: str
    num_tokens: int
    text: str
    parts: Sequence[Part] | None = None


def main(arguments: Sequence[str] | None = None, prog: str = "python -m data_prep.inspect") -> int:
    """Run the command; exit status 1 when something asked for is not there."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show what a shard set holds: a summary, a document, or where a text occurs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="a shard set")
    add("--split", default="train", metavar="NAME", help="train (default) or validation")
    add("--source", metavar="NAME", help="only this source")
    add("--document", type=int, metavar="N", help="show document N of the split, from 0")
    add("--search", metavar="TEXT", help="list documents that contain TEXT")
    add("--limit", type=int, default=10, metavar="K", help="most documents of a search (10)")
    given = parser.parse_args(arguments)
    return run_command(lambda: _inspect(given))


def _inspect(given: argparse.Namespace) -> int:
    """Do what was asked for; give the exit status."""
    try:
        shards = ShardSet.open(given.directory, given.split, given.source)
        if given.document is not None:
            _show(find_document(shards, given.document))
        if given.search is not None:
            return _print_matches(shards, given.search, given.limit)
        if given.document is None:
            _summarize(shards)
    except BrokenPipeError:
        # The reader, such as `head`, has enough; nothing more can be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def find_document(shards: ShardSet, number: int) -> Document:
    """Document `number` of a stream.

    Raises:
        DataError: The stream has fewer, or its shard cannot be read.
    """
    if not 0 <= number < shards.num_documents:
        raise DataError(
            f"--document {number} is not in {shards.directory} ({shards.split}), which has "
            f"documents 0 to {shards.num_documents - 1:,}"
        )
    first = 0
    for index, shard in enumerate(shards.shards):
        if number < first + shard.rows:
            return next(_documents(shards, index, first, number - first))
        first += shard.rows
    raise AssertionError(f"document {number} of {shards.num_documents} is in no shard")


def search(
    shards: ShardSet, text: str, say: Callable[[str], None] | None = None
) -> Iterator[Document]:
    """Documents that contain a text, in order; one document in memory at a time.

    Args:
        shards: Where to look.
        text: What to look for.
        say: Shows a line now and then.

    Raises:
        DataError: A shard cannot be read.
    """
    first, said_s = 0, time.monotonic()
    for index, shard in enumerate(shards.shards):
        for document in _documents(shards, index, first, 0):
            if say is not None and time.monotonic() - said_s >= SECONDS_BETWEEN_LINES:
                said_s = time.monotonic()
                say(f"searched {document.number:,} of {shards.num_documents:,} documents")
            if text in document.text:
                yield document
        first += shard.rows


def _documents(shards: ShardSet, index: int, first: int, skipped: int) -> Iterator[Document]:
    """Documents of a shard, without the first `skipped`; `first` is the number of its first."""
    shard = shards.shards[index]
    tokenizer, inputs = shards.open_tokenizer(), shards.manifest.inputs
    rows = _read(shards.directory / shard.path)
    for index_in_shard in range(skipped, shard.rows):
        start, end = (int(offset) for offset in rows.offsets[index_in_shard : index_in_shard + 2])
        ids, targets = rows.tokens[start:end], rows.targets
        file, offset = int(rows.src[index_in_shard]), int(rows.row[index_in_shard])
        yield Document(
            number=first + index_in_shard,
            source=shard.source,
            origin=f"{inputs[file].path}:{offset}",
            num_tokens=end - start,
            text=tokenizer.decode(ids[:-1]),
            parts=None if targets is None else _parts(tokenizer, ids, targets[start:end]),
        )


def _parts(tokenizer: Tokenizer, ids: TokenArray, targets: NDArray[np.bool_]) -> list[Part]:
    """The parts of a document; the end of the document is counted and not shown."""
    borders = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
    return [
        Part(
            bool(targets[first]),
            last - first,
            tokenizer.decode(ids[first : min(last, len(ids) - 1)]),
        )
        for first, last in pairwise(borders)
    ]


def _read(path: Path) -> ShardRows:
    try:
        return read_shard(path)[0]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a shard ({error}); run data_prep.verify") from error


def _show(document: Document) -> None:
    print(f"document  {document.number:,}")
    print(f"source    {document.source}")
    print(f"origin    {document.origin}")
    print(f"tokens    {document.num_tokens:,} with the end of the document")
    print(f"bytes     {len(document.text.encode()):,}")
    print()
    for part in document.parts or ():
        print(f"[{'targets' if part.is_target else 'prompt'}, {part.num_tokens:,} tokens]")
        print(part.text)
    if document.parts is None:
        print(document.text)


def _print_matches(shards: ShardSet, text: str, limit: int) -> int:
    """One line per match: number, source, origin, and the text around the first occurrence."""
    if not text or limit < 1:
        raise DataError("--search needs a text that is not empty, and --limit at least 1")
    found = 0
    for document in search(shards, text, lambda line: print(line, file=sys.stderr)):
        found_at = document.text.index(text)
        start = max(0, found_at - CONTEXT_CHARACTERS)
        end = found_at + len(text) + CONTEXT_CHARACTERS
        excerpt = document.text[start:end].replace("\n", " ").replace("\r", " ")
        print(f"{document.number}\t{document.source}\t{document.origin}\t{excerpt}")
        found += 1
        if found == limit:
            print(f"stopped after {limit} documents; --limit gives more", file=sys.stderr)
            break
    if not found:
        print(f"no document of {shards.directory} ({shards.split}) contains it", file=sys.stderr)
    return 0 if found else 1


def _summarize(shards: ShardSet) -> None:
    """The split, source by source."""
    known = shards.manifest.tokenizer
    print(f"{shards.directory} ({shards.split})")
    print(
        f"tokenizer {known.spec}, {known.vocab_size:,} tokens, {shards.dtype}, "
        f"fingerprint {shards.fingerprint[:16]}"
    )
    for name in shards.sources:
        stream = shards.of_source(name)
        print(
            f"source {name}: {stream.num_documents:,} documents, {stream.num_tokens:,} tokens, "
            f"{len(stream.shards):,} shards, {stream.total_bytes / 1e6:,.1f} MB"
            + (f", {stream.num_targets:,} targets" if stream.has_targets else "")
        )


if __name__ == "__main__":
    sys.exit(main())
