"""One unit of work: read its records, encode them, write its shards, then its journal entry."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import orjson
import xxhash

from data_prep.building.columns import Columns
from data_prep.building.dedup import find_duplicates
from data_prep.building.journal import UnitRecord, find_finished, record_finished, rejects_path
from data_prep.building.options import BadRecordPolicy, Dedup
from data_prep.building.plan import unit_list
from data_prep.conversations.forms import ChatForm, RecordForm
from data_prep.conversations.marks import plain_text
from data_prep.errors import BadRecordsError, DataError, shown
from data_prep.inputs.input_files import InputFile
from data_prep.inputs.reading import read_unit, text_keys_of
from data_prep.inputs.records import SAMPLE_CHARACTERS, Reading, RecordBatch, Reject
from data_prep.inputs.units import Unit
from data_prep.shards.arrow_file import ShardRows, write_shard
from data_prep.shards.atomic import whole_file
from data_prep.shards.manifest import (
    FORMAT,
    FORMAT_VERSION,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    Ledger,
    ShardEntry,
)
from data_prep.tokenization.encoder import Encoder, EncoderName
from data_prep.tokenization.tokenizer import SpecialTokens, Tokenizer
from data_prep.workers import pulse
from data_prep.workers.phase import Done

HASH_VALUES = 1 << 64
# So many records without the text key show that the key is wrong.
FEWEST_RECORDS_TO_JUDGE = 100


class UnitSource(NamedTuple):
    """What a unit must know about its source."""

    name: str
    text_key: str
    form: RecordForm | None = None


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
    max_bad_fraction: float
    special_tokens: SpecialTokens
    max_document_bytes: int
    dedup: Dedup
    encoder: EncoderName


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
    encoder = _load_encoder(tokenizer, job.encoder)
    writers = {
        split: _SplitWriter(job, source, unit.number, split, tokenizer, encoder)
        for split in (TRAIN, VALIDATION)
    }
    counts = {segment.file: _Counts() for segment in unit.segments}
    inputs = {segment.file: segment.input for segment in unit.segments}
    before = encoder.sampled, encoder.altered
    duplicates = find_duplicates(job.output, unit.number) if job.dedup == "exact" else frozenset()
    reading = Reading(source.text_key, job.max_document_bytes, source.form)
    first_text = 0
    with _RejectList(rejects_path(job.output, unit.number)) as rejects:
        for batch in read_unit(unit, reading):
            num_texts = len(batch.texts)
            pulse.add(sum(map(len, batch.texts)))
            if duplicates:
                counts[batch.file].duplicates += _drop_duplicates(batch, first_text, duplicates)
            first_text += num_texts
            # What a chat template writes may be special tokens; messages were looked at before it.
            if job.special_tokens == "reject" and not isinstance(source.form, ChatForm):
                _refuse_special(batch, tokenizer)
            counts[batch.file].add(batch, marked=source.form is not None)
            rejects.add(inputs[batch.file].path, batch.rejects)
            if batch.rejects and job.on_bad == "fail":
                raise rejection(inputs[batch.file], batch.rejects[0])
            for split, texts, offsets in _divide(batch, job.validation_fraction):
                writers[split].add(batch.file, texts, offsets)
        _refuse_wrong_key(job, unit, reading, counts)
    shards = [entry for writer in writers.values() for entry in writer.finish()]
    done = UnitRecord(
        unit=unit.number,
        job_id=job.job_id,
        shards=shards,
        ledgers={file: count.ledger() for file, count in counts.items()},
        sampled=encoder.sampled - before[0],
        altered=encoder.altered - before[1],
    )
    record_finished(job.output, done)
    return done


def rejection(file: InputFile, reject: Reject) -> DataError:
    """The error for a bad record when bad records end the job."""
    unit = "row" if file.kind in ("parquet", "arrow") else "byte"
    return DataError(
        f"{shown(file.path)}: record at {unit} {reject.offset} is bad: {reject.reason}; fix it, or "
        "use --on-bad skip to count it and continue"
    )


def is_held_out(content: bytes, fraction: float) -> bool:
    """True when a document belongs to the held-out split: decided by its text, not its position."""
    return xxhash.xxh3_64_intdigest(content) < int(fraction * HASH_VALUES)


def _divide(batch: RecordBatch, fraction: float) -> Iterator[tuple[str, list[bytes], list[int]]]:
    """The documents of each split: texts and offsets."""
    texts, offsets = batch.texts, batch.offsets
    if b"" in texts:
        offsets = [offset for offset, text in zip(offsets, texts, strict=True) if text]
        texts = [text for text in texts if text]
    held_out = [is_held_out(text, fraction) for text in texts] if fraction else []
    if True not in held_out:
        yield TRAIN, texts, offsets
        return
    for split, is_here in ((TRAIN, False), (VALIDATION, True)):
        chosen = [number for number, held in enumerate(held_out) if held is is_here]
        yield split, [texts[number] for number in chosen], [offsets[number] for number in chosen]


def _drop_duplicates(batch: RecordBatch, first_text: int, duplicates: frozenset[int]) -> int:
    """Take the texts out that an earlier record of the job has; give how many.

    Texts count from 0 within a unit, rejects left out; `first_text` is the first of the batch.
    """
    kept = [number for number in range(len(batch.texts)) if number + first_text not in duplicates]
    dropped = len(batch.texts) - len(kept)
    if dropped:
        batch.texts = [batch.texts[number] for number in kept]
        batch.offsets = [batch.offsets[number] for number in kept]
    return dropped


def _refuse_special(batch: RecordBatch, tokenizer: Tokenizer) -> None:
    """Documents that spell a special token become rejects."""
    texts, offsets = batch.texts, batch.offsets
    batch.texts, batch.offsets = [], []
    for text, offset in zip(texts, offsets, strict=True):
        name = tokenizer.find_special(text)
        if name is None:
            batch.add(offset, text)
        else:
            start = max(0, text.find(name.encode()) - SAMPLE_CHARACTERS // 2)
            batch.reject(offset, f"spells {name!r}", text[start : start + SAMPLE_CHARACTERS])
    batch.rejects.sort()


@lru_cache(maxsize=1)
def _load_tokenizer(
    path: Path, eos_token: str, sha256: str, special_tokens: SpecialTokens
) -> Tokenizer:
    """One tokenizer per process, whatever the number of units it works on."""
    tokenizer = Tokenizer(path.read_bytes(), eos_token, os.fspath(path), special_tokens)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{shown(path)} changed while the job was running; name a new --output")
    return tokenizer


@lru_cache(maxsize=1)
def _load_encoder(tokenizer: Tokenizer, name: EncoderName) -> Encoder:
    """One encoder per process: it is faster the more it has seen."""
    return Encoder(tokenizer, name)


@dataclass
class _Counts:
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    text_bytes: int = 0
    rejects: dict[str, int] = field(default_factory=dict)

    def add(self, batch: RecordBatch, *, marked: bool) -> None:
        empty = batch.texts.count(b"")
        self.documents += len(batch.texts) - empty
        self.empty += empty
        texts = map(plain_text, batch.texts) if marked else batch.texts
        self.text_bytes += sum(map(len, texts))
        for reject in batch.rejects:
            self.rejects[reject.reason] = self.rejects.get(reject.reason, 0) + reject.records

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


class _SplitWriter:
    """Writes the shards of one split of a unit: one, or more when over the cap."""

    def __init__(
        self,
        job: UnitJob,
        source: UnitSource,
        unit: int,
        split: str,
        tokenizer: Tokenizer,
        encoder: Encoder,
    ) -> None:
        self._job, self._source, self._unit, self._split = job, source.name, unit, split
        self._columns = Columns(encoder, job.shard_tokens, marked=source.form is not None)
        self._entries: list[ShardEntry] = []
        self._metadata = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": str(tokenizer.vocab_size),
            "dtype": str(tokenizer.dtype),
            "eos_id": str(tokenizer.eos_id),
            "eos": "one after each document",
            "source": source.name,
            "split": split,
        }

    def add(self, file: int, texts: Sequence[bytes], offsets: Sequence[int]) -> None:
        """Append documents; full shards are written at once, so that memory is bounded."""
        for shard in self._columns.add(file, texts, offsets):
            self._write(shard)

    def finish(self) -> list[ShardEntry]:
        """Write what is left; give all shards of the split in order."""
        for shard in self._columns.finish():
            self._write(shard)
        return self._entries

    def _write(self, rows: ShardRows) -> None:
        part = len(self._entries)
        suffix = f"-{part:03d}" if part else ""
        path = f"shards/{self._split}/{self._source}/{self._unit:05d}{suffix}.arrow"
        written = write_shard(self._job.output / path, rows, self._metadata)
        self._entries.append(ShardEntry.of(path, self._split, self._source, self._unit, written))


def _refuse_wrong_key(
    job: UnitJob, unit: Unit, reading: Reading, counts: Mapping[int, "_Counts"]
) -> None:
    """End the job when no record of a unit has the key: the key is wrong, not the records.

    Raises:
        BadRecordsError: Naming the key and the keys that the records do have.
    """
    bad = sum(
        count.rejects.get(reason, 0) for count in counts.values() for reason in reading.key_faults
    )
    all_records = sum(count.ledger().records for count in counts.values())
    if job.max_bad_fraction >= 1 or bad < max(all_records, FEWEST_RECORDS_TO_JUDGE):
        return
    file = unit.segments[0].input
    keys = text_keys_of(file)
    have = (
        f"its records have text at {', '.join(map(shown, keys))}"
        if keys
        else "its records have no text"
    )
    raise BadRecordsError(
        f"{shown(file.path)}: none of {bad:,} records has text at {reading.options}; {have}: "
        "name the key, --exclude the file, or count such records with --max-bad-fraction 1"
    )


class _RejectList:
    """Lists the rejected records of a unit, as they come; no file when there are none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if self._file is None and error[0] is None:
            self._path.unlink(missing_ok=True)
        return self._stack.__exit__(*error)

    def add(self, path: str, rejects: Iterable[Reject]) -> None:
        """Append the rejects of a file."""
        for reject in rejects:
            if self._file is None:
                temporary = self._stack.enter_context(whole_file(self._path))
                self._file = self._stack.enter_context(temporary.open("wb"))
            # Each is written at once: the library takes kilobytes for a line before it shrinks it.
            record = {"file": path, **reject._asdict()}
            self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
