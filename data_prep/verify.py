"""Command line: check a shard set from end to end, `python -m data_prep.verify DIR`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import DataError
from data_prep.manifest import InputEntry, Manifest, ShardEntry
from data_prep.reading import read_text
from data_prep.records import LARGEST_DOCUMENT_BYTES, Reading
from data_prep.shard_set import ShardSet
from data_prep.shards import ShardRows, read_shard
from data_prep.sources import InputFile
from data_prep.tokenizer import Tokenizer

SAMPLED_DOCUMENTS = 1000
LARGEST_SAMPLED_TOKENS = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: one line per problem, exit status 1 when there is any."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.verify",
        description="Check the files, counts, ids and documents of a shard set.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument(
        "--sample",
        type=int,
        default=SAMPLED_DOCUMENTS,
        metavar="N",
        help="documents that are decoded back (1000)",
    )
    given = parser.parse_args(arguments)
    problems = 0
    try:
        for problem in find_problems(given.directory, given.sample):
            problems += 1
            print(problem, file=sys.stderr)
    except DataError as error:
        problems += 1
        print(error, file=sys.stderr)
    print(f"{given.directory}: {problems} problems" if problems else f"{given.directory}: ok")
    return 1 if problems else 0


def find_problems(directory: Path, sample: int = SAMPLED_DOCUMENTS) -> Iterator[str]:
    """Yield one line for each thing that is wrong with a shard set.

    Args:
        directory: The shard set.
        sample: About how many documents to decode back, spread over all shards.

    Raises:
        DataError: The set cannot be opened at all.
    """
    manifest: Manifest | None = None
    tokenizer: Tokenizer | None = None
    for split in ("train", "validation"):
        shards = ShardSet.open(directory, split)
        try:
            shards.verify()
        except DataError as error:
            yield str(error)
        manifest = shards.manifest
        tokenizer = Tokenizer(
            shards.tokenizer_path.read_bytes(),
            manifest.tokenizer.eos_token,
            os.fspath(shards.tokenizer_path),
            manifest.special_tokens,
        )
    assert manifest is not None, "both splits were opened"
    assert tokenizer is not None, "both splits were opened"
    if (tokenizer.eos_id, tokenizer.max_token_id) != (
        manifest.tokenizer.eos_id,
        manifest.tokenizer.max_token_id,
    ):
        yield f"{directory}: the tokenizer's ids are not those the manifest records"
    documents = [0] * len(manifest.inputs)
    stride = max(1, manifest.totals.documents // max(sample, 1))
    for shard in manifest.shards:
        yield from _check_shard(directory, manifest, shard, tokenizer, documents, stride)
    for entry, count in zip(manifest.inputs, documents, strict=True):
        if count != entry.ledger.documents:
            yield (
                f"{entry.path}: {count:,} documents are in the shards, "
                f"{entry.ledger.documents:,} in the ledger"
            )


def _check_shard(
    directory: Path,
    manifest: Manifest,
    shard: ShardEntry,
    tokenizer: Tokenizer,
    documents: list[int],
    stride: int,
) -> Iterator[str]:
    path = directory / shard.path
    try:
        rows, metadata = read_shard(path)
    except (OSError, ValueError, KeyError) as error:
        yield f"{path}: not a shard ({error})"
        return
    if metadata.get("tokenizer_sha256") != manifest.tokenizer.sha256:
        yield f"{path}: made with another tokenizer"
    if (len(rows.src), len(rows.tokens)) != (shard.rows, shard.tokens):
        yield (
            f"{path}: {len(rows.src):,} rows and {len(rows.tokens):,} tokens, the manifest says "
            f"{shard.rows:,} and {shard.tokens:,}"
        )
        return
    if str(rows.tokens.dtype) != manifest.dtype:
        yield f"{path}: tokens are {rows.tokens.dtype}, the manifest says {manifest.dtype}"
        return
    with path.open("rb") as file:
        file.seek(shard.values_offset)
        if file.read(rows.tokens.nbytes) != rows.tokens.tobytes():
            yield f"{path}: the tokens are not at byte {shard.values_offset:,}"
    if int(rows.tokens.max()) > manifest.tokenizer.max_token_id:
        yield f"{path}: id {rows.tokens.max()} is above {manifest.tokenizer.max_token_id}"
        return
    ends = rows.tokens[rows.offsets[1:] - 1]
    num_eos = int(np.count_nonzero(rows.tokens == manifest.tokenizer.eos_id))
    strays = num_eos - shard.rows
    # Only where text may become a special token can a document hold that id inside.
    if (
        strays < 0
        or (strays and manifest.special_tokens != "id")
        or not bool((ends == manifest.tokenizer.eos_id).all())
    ):
        yield f"{path}: {num_eos:,} end-of-document tokens for {shard.rows:,} documents"
    if int(rows.src.max()) >= len(documents):
        yield f"{path}: names input {rows.src.max()} of {len(documents)}"
        return
    for number, count in zip(*np.unique(rows.src, return_counts=True), strict=True):
        documents[number] += int(count)
    for row in range(0, shard.rows, stride):
        if not _decodes_back(rows, row, tokenizer, manifest):
            yield f"{path}: document {row} does not decode back to its text"


def _decodes_back(rows: ShardRows, row: int, tokenizer: Tokenizer, manifest: Manifest) -> bool:
    """Compare a document with its source, or, if that is gone, with itself encoded again."""
    ids = rows.tokens[rows.offsets[row] : rows.offsets[row + 1] - 1]
    if not tokenizer.is_lossless or len(ids) > LARGEST_SAMPLED_TOKENS:
        return True
    text = tokenizer.decode(ids)
    number = int(rows.src[row])
    entry = manifest.inputs[number]
    source = _source_text(entry, int(rows.row[row]), manifest.text_key_of(entry))
    if source is not None:
        return source == text.encode()
    again, _ = tokenizer.encode_documents([text])
    return bool(np.array_equal(again[:-1], ids))


def _source_text(entry: InputEntry, offset: int, text_key: str) -> bytes | None:
    """The text of a document in its input file; None when it cannot be had quickly."""
    source = InputFile(entry.path, entry.kind, entry.bytes, entry.mtime_ns)
    return read_text(source, offset, Reading(text_key, max(entry.bytes, LARGEST_DOCUMENT_BYTES)))


if __name__ == "__main__":
    sys.exit(main())
