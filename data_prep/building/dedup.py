"""Exact deduplication: of all documents with the same text, the first in input order stays.

Texts are compared by their 128-bit hash (xxh3_128), so two different texts count as one with
probability n^2 / 2^129: below 1e-18 for ten billion documents. Three phases, each spread over all
workers and restartable like the encoding itself:

1. every unit writes the hashes of its texts, sorted, each once;
2. every partition, a range of hash values, merges its slice of all units and lists which
   (unit, record) were there before;
3. encoding leaves those records out and counts them as duplicates.

Memory is that of one unit or one partition, whatever the size of the corpus: a text that fills
half of it is in a partition at most once per unit. The files live in journal/dedup until the set
is committed. Each begins with a checksum of its job, its name and its content: what an earlier run
left is believed only when that fits.
"""

import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.building.journal import JOURNAL, is_committed
from data_prep.building.plan import unit_list
from data_prep.inputs.reading import read_unit
from data_prep.inputs.records import Reading, RecordBatch
from data_prep.shards.atomic import whole_file
from data_prep.workers import pulse
from data_prep.workers.phase import Done, Observer, Phase, Workers

FOLDER = "dedup"
PARTITION_TEXTS = 1 << 21
_SUM_BYTES = 16
_COUNTS_BYTES = 16
_TEXT_BYTES = 20
_RECORD_BITS = 32
_BLOCK_BYTES = 1 << 22

Integer = TypeVar("Integer", np.uint32, np.uint64)


@dataclass(frozen=True)
class DedupJob:
    """What every item of both phases shares; `partitions` is known in the second."""

    output: Path
    job_id: str
    readings: tuple[Reading, ...]  # of each source
    num_units: int
    partitions: int = 0


class _UnitHashes(NamedTuple):
    """Hashes of a unit's texts in rising order, each with the index of its first record.

    `repeated` lists the records whose text is in an earlier record of the same unit.
    """

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    record: NDArray[np.uint32]
    repeated: NDArray[np.uint32]


def mark_duplicates(
    job: DedupJob, sizes: NDArray[np.int64], workers: Workers, observer: Observer
) -> None:
    """Do the first two phases; then `find_duplicates` knows the answer for every unit.

    Args:
        job: Without the number of partitions, which follows from the first phase.
        sizes: Input bytes of each unit, `[num_units]`.
        workers: Do the work.
        observer: Notified of the progress.
    """
    workers.run(
        Phase("hash", "hashing", partial(_hash_unit, job), partial(_is_hashed, job), sizes),
        observer,
    )
    try:
        texts = sum(
            _read_counts(_hashes_path(job.output, unit))[0] for unit in range(job.num_units)
        )
    except FileNotFoundError:
        if is_committed(job.output):
            return
        raise
    job = replace(job, partitions=max(1, -(-texts // PARTITION_TEXTS)))
    share = np.full(job.partitions, texts * _TEXT_BYTES // job.partitions, dtype=np.int64)
    workers.run(
        Phase(
            "merge", "comparing hashes", partial(_merge_partition, job),
            partial(_is_merged, job), share,
        ),
        observer,
    )  # fmt: skip


def find_duplicates(output: Path, unit: int) -> frozenset[int]:
    """The records of a unit whose text is in an earlier record of the job."""
    found = set(_read_hashes(_hashes_path(output, unit)).repeated.tolist())
    bounds = np.array([unit << _RECORD_BITS, (unit + 1) << _RECORD_BITS], dtype=np.uint64)
    for path in _folder(output).glob("merged-*[0-9]"):
        if path.stat().st_size > _SUM_BYTES:
            keys = np.memmap(path, dtype=np.uint64, mode="r", offset=_SUM_BYTES)
            first, last = np.searchsorted(keys, bounds)
            found.update((keys[first:last] & np.uint64((1 << _RECORD_BITS) - 1)).tolist())
    return frozenset(found)


def forget_damaged(job: DedupJob, observer: Observer) -> None:
    """Remove what an earlier run left and is not as this job wrote it, with what follows from it.

    Reads the files whole; to be called while nobody else works on the output.
    """
    folder = _folder(job.output)
    damaged = [path for path in sorted(folder.glob("*")) if not _is_intact(job, path)]
    if damaged:
        observer.say(f"note: {damaged[0]} is damaged; documents are compared again")
        for path in (*damaged, *folder.glob("merged-*")):
            path.unlink(missing_ok=True)


def forget_duplicates(output: Path) -> None:
    """Remove the files of a committed job."""
    shutil.rmtree(_folder(output), ignore_errors=True)


def _hash_unit(job: DedupJob, number: int) -> Done:
    """First phase: the hashes of the texts of one unit."""
    planned = unit_list(job.output, job.job_id)[number]
    reading = job.readings[planned.source]
    digests, records = bytearray(), array("I")
    texts = (text for batch in _counted(read_unit(planned.unit, reading)) for text in batch.texts)
    for index, text in enumerate(texts):
        if text:
            digests += xxhash.xxh3_128_digest(text)
            records.append(index)
    pairs = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    high, low = pairs[:, 0].astype(np.uint64), pairs[:, 1].astype(np.uint64)
    record = np.frombuffer(records, dtype=np.uint32)
    # The sort is stable: among equal hashes the earliest record comes first.
    order = np.lexsort((low, high))
    high, low, record = high[order], low[order], record[order]
    first = _starts_group(high, low)
    hashes = _UnitHashes(high[first], low[first], record[first], np.sort(record[~first]))
    counts = np.array([len(hashes.high), len(hashes.repeated)], dtype=np.uint64)
    _write(job, _hashes_path(job.output, number), counts, *hashes)
    return Done()


def _counted(batches: Iterable[RecordBatch]) -> Iterator[RecordBatch]:
    """The batches, while the text that they hold is counted as read."""
    for batch in batches:
        pulse.add(sum(map(len, batch.texts)))
        yield batch


def _merge_partition(job: DedupJob, number: int) -> Done:
    """Second phase: all texts of one range of hashes, over all units."""
    bounds = [(edge << 64) // job.partitions for edge in (number, number + 1)]
    highs, lows, keys = [], [], []
    for unit in range(job.num_units):
        hashes = _read_hashes(_hashes_path(job.output, unit))
        first = int(np.searchsorted(hashes.high, np.uint64(bounds[0])))
        last = len(hashes.high)
        if number + 1 < job.partitions:
            last = int(np.searchsorted(hashes.high, np.uint64(bounds[1])))
        highs.append(np.array(hashes.high[first:last]))
        lows.append(np.array(hashes.low[first:last]))
        record = hashes.record[first:last].astype(np.uint64)
        keys.append(record | np.uint64(unit << _RECORD_BITS))
    high, low, key = np.concatenate(highs), np.concatenate(lows), np.concatenate(keys)
    del highs, lows, keys
    # Slices are in unit order, so the stable sort leaves the earliest of equal texts first.
    order = np.lexsort((low, high))
    duplicates = np.sort(key[order][~_starts_group(high[order], low[order])])
    _write(job, _merged_path(job, number), duplicates)
    return Done()


def _starts_group(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Of sorted hashes, those that differ from the one before."""
    first = np.ones(len(high), dtype=np.bool_)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return first


def _is_hashed(job: DedupJob, number: int) -> bool:
    # Another task of an array may have committed the set, and so have removed the hashes.
    return _hashes_path(job.output, number).is_file() or is_committed(job.output)


def _is_merged(job: DedupJob, number: int) -> bool:
    return _merged_path(job, number).is_file() or is_committed(job.output)


def _folder(output: Path) -> Path:
    return output / JOURNAL / FOLDER


def _hashes_path(output: Path, unit: int) -> Path:
    return _folder(output) / f"{unit:05d}.hashes"


def _merged_path(job: DedupJob, partition: int) -> Path:
    return _folder(job.output) / f"merged-{partition}-of-{job.partitions}"


def _write(job: DedupJob, path: Path, *parts: NDArray[Any]) -> None:
    """Write the checksum of the parts, then the parts."""
    digest = _digest_of(job, path)
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(digest.digest())
        for part in parts:
            part.tofile(file)


def _digest_of(job: DedupJob, path: Path) -> xxhash.xxh3_128:
    """The checksum of nothing yet: files of other jobs, units and partitions do not fit."""
    return xxhash.xxh3_128(f"{job.job_id} {path.name}".encode())


def _is_intact(job: DedupJob, path: Path) -> bool:
    """Whether a file is as this job wrote it."""
    digest = _digest_of(job, path)
    try:
        with path.open("rb") as file:
            known = file.read(_SUM_BYTES)
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return False
    return known == digest.digest()


def _read_counts(path: Path) -> tuple[int, int]:
    """Number of texts and of repeated records in a file of hashes."""
    counts = np.fromfile(path, dtype=np.uint64, count=2, offset=_SUM_BYTES)
    return int(counts[0]), int(counts[1])


def _read_hashes(path: Path) -> _UnitHashes:
    """Map a file of hashes: a search in it reads a few pages."""
    texts, repeated = _read_counts(path)
    position = _SUM_BYTES + _COUNTS_BYTES

    def part(dtype: type[Integer], count: int) -> NDArray[Integer]:
        nonlocal position
        start = position
        position += np.dtype(dtype).itemsize * count
        if not count:
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))

    return _UnitHashes(
        high=part(np.uint64, texts),
        low=part(np.uint64, texts),
        record=part(np.uint32, texts),
        repeated=part(np.uint32, repeated),
    )
