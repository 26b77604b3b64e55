"""Command line: a split as Megatron's `.bin` and `.idx`, `python -m data_prep.export_megatron`.

A shard has both inside: its values are the `.bin`, its offsets the `.idx`. So the export copies
tokens and computes sizes; nothing is encoded again. The format is megatron-core's IndexedDataset:

    magic "MMIDIDX" and two zero bytes, version 1 (uint64), code of the type (uint8),
    number of sequences (uint64), number of document marks (uint64),
    tokens of each sequence (int32), byte offset of each in the .bin (int64),
    document marks (int64): 0, 1, 2, ..., number of sequences (a sequence is a document here)
"""

import argparse
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError, run_command
from data_prep.shards.atomic import whole_file
from data_prep.shards.shard_set import ShardSet

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# Megatron has no unsigned type of four bytes; ids are far below 2^31.
TYPES: dict[str, tuple[int, np.dtype[Any]]] = {
    "uint16": (8, np.dtype("<u2")),
    "uint32": (4, np.dtype("<i4")),
}
COPIED_TOKENS = 1 << 22
EPILOG = """\
example:
  PROG data/corpus megatron/corpus_train --split train

exit status: 0 written, 1 an error, 2 wrong arguments, 130 after Ctrl-C
"""


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m data_prep.export_megatron"
) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a split of a shard set as PREFIX.bin and PREFIX.idx.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.replace("PROG", prog),
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a shard set")
    parser.add_argument("prefix", metavar="PREFIX", help="path of the files without .bin and .idx")
    parser.add_argument("--split", default="train", metavar="NAME", help="train or validation")
    parser.add_argument("--source", metavar="NAME", help="only this source")
    given = parser.parse_args(arguments)

    def run() -> int:
        shards = ShardSet.open(given.directory, given.split, given.source)
        export(shards, given.prefix)
        print(
            f"{given.prefix}.bin and .idx: {shards.num_documents:,} documents, "
            f"{shards.num_tokens:,} tokens"
        )
        return 0

    return run_command(run)


def export(shards: ShardSet, prefix: str) -> None:
    """Write `prefix`.bin and then `prefix`.idx, each whole or not at all.

    The memory does not depend on the size of the set: tokens are copied in parts, and the index is
    written in three passes over the lengths of the documents of one shard at a time.

    Raises:
        DataError: There is nothing to export, or a file cannot be read or written.
    """
    if not shards.num_documents:
        raise DataError(f"{shards.directory} has no documents in its split {shards.split}")
    if shards.has_targets:
        raise DataError(
            f"{shards.directory} ({shards.split}) says which tokens are targets, which Megatron's "
            "format cannot hold; export --source NAME of a source of texts, or make shards of the "
            "prompts and completions as texts (--text-key)"
        )
    longest = max(int(lengths.max()) for lengths in _lengths(shards))
    if longest >= 1 << 31:
        raise DataError(f"a document of {longest:,} tokens does not fit Megatron's index")
    code, dtype = TYPES[str(shards.dtype)]
    with whole_file(Path(prefix + ".bin")) as temporary, open(temporary, "wb") as file:
        _write_tokens(file, shards, dtype)
    with whole_file(Path(prefix + ".idx")) as temporary, open(temporary, "wb") as file:
        _write_index(file, shards, code, dtype.itemsize)


def _write_tokens(file: BinaryIO, shards: ShardSet, dtype: np.dtype[Any]) -> None:
    for start in range(0, shards.num_tokens, COPIED_TOKENS):
        tokens = shards.read(start, min(COPIED_TOKENS, shards.num_tokens - start))
        file.write(tokens.astype(dtype, copy=False).tobytes())


def _write_index(file: BinaryIO, shards: ShardSet, code: int, itemsize: int) -> None:
    count = shards.num_documents
    file.write(MAGIC + struct.pack("<QBQQ", VERSION, code, count, count + 1))
    for lengths in _lengths(shards):
        file.write(lengths.astype("<i4").tobytes())
    position = 0
    for lengths in _lengths(shards):
        ends = position + np.cumsum(lengths * itemsize)
        file.write(np.concatenate([[position], ends[:-1]]).astype("<i8").tobytes())
        position = int(ends[-1])
    for start in range(0, count + 1, COPIED_TOKENS):
        marks = np.arange(start, min(start + COPIED_TOKENS, count + 1), dtype="<i8")
        file.write(marks.tobytes())


def _lengths(shards: ShardSet) -> Iterator[NDArray[np.int64]]:
    """Tokens of the documents, shard by shard."""
    for number, shard in enumerate(shards.shards):
        if shard.rows:
            yield shards.lengths_in_shard(number)


if __name__ == "__main__":
    sys.exit(main())
