"""One unit of work: read its records, encode them, write its shards, then its journal entry."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from data_prep.atomic import whole_file
from data_prep.dedup import find_duplicates
from data_prep.errors import DataError
from data_prep.journal import UnitRecord, find_finished, record_finished, rejects_path
from data_prep.manifest import (
    FORMAT,
    FORMAT_VERSION,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    Ledger,
    ShardEntry,
)
from data_prep.options import BadRecordPolicy, Dedup
from data_prep.phase import Done
from data_prep.plan import unit_list
from data_prep.shards import ShardRows, write_shard
from data_prep.sources import Reading, Record, Segment, Unit, read_unit
from data_prep.tokenizer import SpecialTokens, TokenArray, Tokenizer

BATCH_CHARACTERS = 1 << 20
SAMPLE_CHARACTERS = 80
HASH_VALUES = 1 << 64


class UnitSource(NamedTuple):
    """What a unit must know about its source."""

    name: str
    text_key: str


@dataclass(frozen=True)
class UnitJob:
    """What every unit of a job shares; small, so that it travels to each worker with the task."""

    output: Path
    job_id: str
    tokenizer_sha256: str
    eos_token: str
    sources: tuple[UnitSource, ...]
    validation_fraction: float
    shard_tokens: int
    on_bad: BadRecordPolicy
    special_tokens: SpecialTokens
    max_document_bytes: int
    dedup: Dedup


def encode_unit(job: UnitJob, number: int) -> Done:
    """Do the unit of this number, unless its journal entry is there already."""
    done = find_finished(job.output, job.job_id, number)
    if done is None:
        planned = unit_list(job.output, job.job_id)[number]
        done = process_unit(job, planned.unit, job.sources[planned.source])
    return Done(
        tokens=sum(shard.tokens for shard in done.shards),
        rejects=sum(ledger.rejects for ledger in done.ledgers.values()),
    )


def process_unit(job: UnitJob, unit: Unit, source: UnitSource) -> UnitRecord:
    """Do one unit; when this returns, its shards and its journal entry are on disk.

    Raises:
        DataError: A record was rejected under `on_bad="fail"`, an input changed, or the output
            cannot be written.
    """
    tokenizer = _load_tokenizer(
        job.output / TOKENIZER, job.eos_token, job.tokenizer_sha256, job.special_tokens
    )
    columns = {split: _Columns(tokenizer) for split in (TRAIN, VALIDATION)}
    counts = {segment.file: _Counts() for segment in unit.segments}
    rejects: list[tuple[Segment, Record]] = []
    sources = {segment.file: segment for segment in unit.segments}
    duplicates = find_duplicates(job.output, unit.number) if job.dedup == "exact" else frozenset()
    reading = Reading(source.text_key, job.max_document_bytes)
    for index, record in enumerate(read_unit(unit, reading)):
        count = counts[record.file]
        if index in duplicates:
            count.duplicates += 1
            continue
        if job.special_tokens == "reject":
            record = _refuse_special(record, tokenizer)
        if record.text is None:
            count.rejects[record.reason] = count.rejects.get(record.reason, 0) + 1
            rejects.append((sources[record.file], record))
            if job.on_bad == "fail":
                raise rejection(sources[record.file].source.path, record)
        elif not record.text:
            count.empty += 1
        else:
            content = record.text.encode("utf-8")
            count.documents += 1
            count.text_bytes += len(content)
            columns[_choose_split(content, job.validation_fraction)].add(record)
    shards = [
        entry
        for split, documents in columns.items()
        for entry in _write_split(
            job, source.name, unit.number, tokenizer, split, documents.finish()
        )
    ]
    _write_rejects(job.output, unit.number, rejects)
    done = UnitRecord(
        unit=unit.number,
        job_id=job.job_id,
        shards=shards,
        ledgers={file: count.ledger() for file, count in counts.items()},
    )
    record_finished(job.output, done)
    return done


def rejection(path: str, record: Record) -> DataError:
    """The error for a bad record when bad records end the job."""
    return DataError(
        f"{path}: record at byte {record.offset} is bad: {record.reason}; mend it, or use "
        "--on-bad skip to count it and go on"
    )


def is_held_out(content: bytes, fraction: float) -> bool:
    """True when a document belongs to the held-out split: decided by its text, not its place."""
    return xxhash.xxh3_64_intdigest(content) < int(fraction * HASH_VALUES)


def _refuse_special(record: Record, tokenizer: Tokenizer) -> Record:
    """A document that spells a special token becomes a reject."""
    name = tokenizer.find_special(record.text) if record.text else None
    if record.text is None or name is None:
        return record
    start = max(0, record.text.find(name) - SAMPLE_CHARACTERS // 2)
    sample = record.text[start : start + SAMPLE_CHARACTERS]
    return record._replace(text=None, reason=f"spells {name!r}", sample=sample)


def _choose_split(content: bytes, fraction: float) -> str:
    return VALIDATION if is_held_out(content, fraction) else TRAIN


@lru_cache(maxsize=1)
def _load_tokenizer(
    path: Path, eos_token: str, sha256: str, special_tokens: SpecialTokens
) -> Tokenizer:
    """One tokenizer per process, whatever the number of units it works on."""
    tokenizer = Tokenizer(path.read_bytes(), eos_token, os.fspath(path), special_tokens)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path} changed while the job was running; name a new --output")
    return tokenizer


@dataclass
class _Counts:
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    text_bytes: int = 0
    rejects: dict[str, int] = field(default_factory=dict)

    def ledger(self) -> Ledger:
        rejected = sum(self.rejects.values())
        return Ledger(
            records=self.documents + self.empty + self.duplicates + rejected,
            documents=self.documents,
            empty=self.empty,
            duplicates=self.duplicates,
            rejects=rejected,
            rejects_by_reason=dict(sorted(self.rejects.items())),
            text_bytes=self.text_bytes,
        )


class _Columns:
    """The documents of one split of one unit: texts are encoded about a megabyte at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._characters = 0
        self._tokens: list[TokenArray] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._src: list[int] = []
        self._row: list[int] = []

    def add(self, record: Record) -> None:
        """Append a document."""
        assert record.text, record
        self._texts.append(record.text)
        self._src.append(record.file)
        self._row.append(record.offset)
        self._characters += len(record.text)
        if self._characters >= BATCH_CHARACTERS:
            self._encode()

    def finish(self) -> ShardRows | None:
        """All documents as columns; None when there are none."""
        self._encode()
        if not self._src:
            return None
        lengths = np.concatenate(self._lengths)
        return ShardRows(
            tokens=np.concatenate(self._tokens),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            src=np.array(self._src, dtype=np.uint32),
            row=np.array(self._row, dtype=np.uint64),
        )

    def _encode(self) -> None:
        if self._texts:
            tokens, lengths = self._tokenizer.encode_documents(self._texts)
            self._tokens.append(tokens)
            self._lengths.append(lengths)
            self._texts.clear()
            self._characters = 0


def _write_split(
    job: UnitJob, source: str, unit: int, tokenizer: Tokenizer, split: str, rows: ShardRows | None
) -> Iterator[ShardEntry]:
    """Write the shards of one split of a unit: one, or more when over the cap."""
    if rows is None:
        return
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": str(tokenizer.vocab_size),
        "dtype": str(rows.tokens.dtype),
        "eos_id": str(tokenizer.eos_id),
        "eos": "one after each document",
        "source": source,
        "split": split,
    }
    for part, piece in enumerate(_cut(rows, job.shard_tokens)):
        suffix = f"-{part:03d}" if part else ""
        path = f"shards/{split}/{source}/{unit:05d}{suffix}.arrow"
        written = write_shard(job.output / path, piece, metadata)
        yield ShardEntry.of(path, split, source, unit, written)


def _cut(rows: ShardRows, limit_tokens: int) -> Iterator[ShardRows]:
    """Cut columns between documents into pieces of at most `limit_tokens`, one document at least.

    Example: lengths 3, 3, 9, 1 with a limit of 6 give rows [0:2], [2:3], [3:4].
    """
    first, num_rows = 0, len(rows.src)
    while first < num_rows:
        base = rows.offsets[first]
        last = int(np.searchsorted(rows.offsets, base + limit_tokens, side="right")) - 1
        last = min(max(last, first + 1), num_rows)
        yield ShardRows(
            tokens=rows.tokens[base : rows.offsets[last]],
            offsets=rows.offsets[first : last + 1] - base,
            src=rows.src[first:last],
            row=rows.row[first:last],
        )
        first = last


def _write_rejects(output: Path, unit: int, rejects: Iterable[tuple[Segment, Record]]) -> None:
    """List the rejected records of a unit; no file when there are none."""
    path = rejects_path(output, unit)
    lines = [
        orjson.dumps(
            {
                "file": segment.source.path,
                "offset": record.offset,
                "reason": record.reason,
                "sample": record.sample,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for segment, record in rejects
    ]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as temporary:
        temporary.write_bytes(b"".join(lines))
