"""Shard sets of made-up documents for benchmarks of reading: any size, in seconds."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.arrow_file import ShardRows, write_shard
from data_prep.shards.manifest import (
    TOKENIZER,
    TRAIN,
    InputEntry,
    Ledger,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    order_fingerprint,
    total_splits,
    write_manifest,
)
from data_prep.tokenization.tokenizer import Tokenizer, bytes_tokenizer


def document_lengths(tokens: int, seed: int) -> NDArray[np.int64]:
    """Lengths with the spread of a corpus of code (median 250, some far longer) for `tokens`."""
    generator = np.random.default_rng(seed)
    count = tokens // 400 + 100
    lengths = np.ceil(generator.lognormal(5.5, 1.6, size=count)).astype(np.int64)
    ends = np.cumsum(lengths)
    while ends[-1] < tokens:
        lengths = np.concatenate([lengths, lengths])
        ends = np.cumsum(lengths)
    last = int(np.searchsorted(ends, tokens))
    lengths = lengths[: last + 1]
    lengths[-1] -= int(lengths.sum()) - tokens
    return lengths


def make_set(directory: Path, *, shards: int, tokens: int) -> None:
    """Write a set of `shards` files of `tokens` random bytes as tokens each.

    Files after the first two are other names of those two: what is measured reads them alike, and
    ten thousand need no more room than two.
    """
    tokenizer = Tokenizer(bytes_tokenizer(), None, "bytes")
    folder = directory / "shards" / TRAIN / "corpus"
    folder.mkdir(parents=True)
    (directory / TOKENIZER).write_bytes(tokenizer.content)
    metadata = {"tokenizer_sha256": tokenizer.sha256, "split": TRAIN, "source": "corpus"}
    entries: list[ShardEntry] = []
    for number in range(shards):
        path = f"shards/{TRAIN}/corpus/{number:05d}.arrow"
        if number < 2:
            written = write_shard(directory / path, _rows(tokens, number, tokenizer), metadata)
            entries.append(ShardEntry.of(path, TRAIN, "corpus", number, written))
        else:
            twin = entries[number % 2]
            os.link(directory / twin.path, directory / path)
            entries.append(replace(twin, path=path, unit=number))
    facts = (tokenizer.sha256, tokenizer.eos_id, "uint16", entries)
    documents = sum(entry.rows for entry in entries)
    ledger = Ledger(records=documents, documents=documents)
    manifest = Manifest(
        fingerprint=order_fingerprint(*facts),
        tokenizer=TokenizerEntry(
            spec="bytes",
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            max_token_id=tokenizer.max_token_id,
            eos_id=tokenizer.eos_id,
            eos_token=tokenizer.eos_token,
        ),
        dtype="uint16",
        text_key="text",
        validation_fraction=0.0,
        totals=ledger,
        splits=total_splits(*facts),
        shards=entries,
        inputs=[InputEntry(path="made up", kind="text", bytes=0, mtime_ns=0, ledger=ledger)],
    )
    write_manifest(directory, manifest)


def _rows(tokens: int, seed: int, tokenizer: Tokenizer) -> ShardRows:
    offsets = np.concatenate([[0], np.cumsum(document_lengths(tokens, seed))])
    values = np.random.default_rng(seed).integers(0, 256, size=tokens, dtype=np.uint16)
    values[offsets[1:] - 1] = tokenizer.eos_id
    count = len(offsets) - 1
    return ShardRows(values, offsets, np.zeros(count, np.uint32), np.arange(count, dtype=np.uint64))
