"""Build a shard set: plan the units, spread them over processes, commit the manifest last."""

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_sentinel
from pathlib import Path
from typing import Protocol

from data_prep.atomic import remove_leftovers, unwritable, whole_file, write_whole
from data_prep.errors import DataError
from data_prep.job import BuildOptions, claim_output, describe_job, job_id
from data_prep.manifest import (
    MANIFEST,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    InputEntry,
    Ledger,
    Manifest,
    TokenizerEntry,
    load_manifest,
    order_fingerprint,
    total_splits,
    write_manifest,
)
from data_prep.sources import (
    InputFile,
    Reading,
    Unit,
    choose_unit_bytes,
    find_inputs,
    plan_units,
    read_unit,
)
from data_prep.tokenizer import Tokenizer, bytes_tokenizer, read_tokenizer, train_tokenizer
from data_prep.unit import (
    JOURNAL,
    UnitJob,
    UnitRecord,
    find_finished,
    is_held_out,
    process_unit,
    rejects_path,
)

REJECTS = "rejects.jsonl"
TRAIN_PREFIX = "train:"
TRAINING_SAMPLE_CHARACTERS = 1 << 26
TRAINING_SAMPLE_UNITS = 64


class Observer(Protocol):
    """Watches a build; the command line shows a progress line with it."""

    def say(self, message: str) -> None:
        """A step of the build, in words."""

    def start(self, total_bytes: int, units: int) -> None:
        """Encoding starts; `total_bytes` of input are still to be read."""

    def finish_unit(self, input_bytes: int, tokens: int, rejects: int) -> None:
        """A unit is on disk."""


def build(options: BuildOptions, observer: Observer) -> Manifest:
    """Make the shard set that `options` ask for, or finish or keep the one that is there.

    The bytes of the output depend on the inputs and options alone: not on the number of workers,
    and not on how often the build was killed and started again.

    Args:
        options: Inputs, output and settings.
        observer: Told of the progress.

    Returns:
        The manifest, which is on disk when this returns.

    Raises:
        DataError: Inputs, options or output cannot be used; or more records are bad than allowed.
    """
    options.check()
    files = find_inputs(options.inputs, options.globs, options.exclude, options.output)
    total_bytes = sum(file.bytes for file in files)
    observer.say(f"{len(files):,} input files, {total_bytes / 1e6:,.1f} MB")
    unit_bytes = options.unit_bytes or choose_unit_bytes(total_bytes)
    units = plan_units(files, unit_bytes)
    given = _given_tokenizer(options)
    facts = {
        "spec": "file" if given and options.tokenizer != "bytes" else options.tokenizer,
        "sha256": given.sha256 if given else None,
        "eos_token": given.eos_token if given else options.eos_token,
    }
    description = describe_job(options, files, unit_bytes, facts)
    claim_output(options.output, description)
    with _sole_writer(options.output):
        remove_leftovers(options.output)
        tokenizer = _place_tokenizer(options, given, units, observer)
        job = UnitJob(
            output=options.output.absolute(),
            job_id=hashlib.sha256((job_id(description) + tokenizer.sha256).encode()).hexdigest(),
            tokenizer_sha256=tokenizer.sha256,
            eos_token=tokenizer.eos_token,
            text_key=options.text_key,
            validation_fraction=options.validation_fraction,
            shard_tokens=options.shard_tokens,
            source=options.source,
            on_bad=options.on_bad,
            special_tokens=options.special_tokens,
            max_document_bytes=options.max_document_bytes,
        )
        records = _run_units(job, units, options.workers or default_workers(), observer)
        return _commit(options, str(facts["spec"]), tokenizer, files, records, observer)


def default_workers() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def _given_tokenizer(options: BuildOptions) -> Tokenizer | None:
    """The tokenizer, unless it is still to be trained."""
    spec = options.tokenizer
    if spec == "bytes":
        return Tokenizer(bytes_tokenizer(), options.eos_token, "bytes", options.special_tokens)
    if not spec.startswith(TRAIN_PREFIX):
        return read_tokenizer(Path(spec), options.eos_token, options.special_tokens)
    if not spec.removeprefix(TRAIN_PREFIX).isdecimal():
        raise DataError(f"--tokenizer {spec}: the vocabulary is not a number; e.g. train:8192")
    return None


def _place_tokenizer(
    options: BuildOptions, given: Tokenizer | None, units: Sequence[Unit], observer: Observer
) -> Tokenizer:
    """Put tokenizer.json into the output; one that an earlier run trained there is kept."""
    path = options.output / TOKENIZER
    if given is None:
        if not path.is_file():
            vocabulary = int(options.tokenizer.removeprefix(TRAIN_PREFIX))
            observer.say(f"training a tokenizer of {vocabulary:,} tokens on a sample of the input")
            write_whole(path, train_tokenizer(_training_texts(options, units), vocabulary))
        return read_tokenizer(path, options.eos_token, options.special_tokens)
    if not path.is_file() or path.read_bytes() != given.content:
        write_whole(path, given.content)
    return given


def _training_texts(options: BuildOptions, units: Sequence[Unit]) -> Iterator[str]:
    """Documents from the starts of evenly spread units, without those that are held out."""
    sampled = min(len(units), TRAINING_SAMPLE_UNITS)
    reading = Reading(options.text_key, options.max_document_bytes)
    for number in range(sampled):
        budget = TRAINING_SAMPLE_CHARACTERS // sampled
        for record in read_unit(units[number * len(units) // sampled], reading):
            if not record.text:
                continue
            if not is_held_out(record.text.encode("utf-8"), options.validation_fraction):
                yield record.text[:budget]
                budget -= len(record.text)
            if budget <= 0:
                break


@contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    """Hold the output against a second build; the system lets go when this process ends."""
    path = output / JOURNAL / "lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise DataError(
            f"another process is writing to {output}; wait for it, or name another --output"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _run_units(
    job: UnitJob, units: Sequence[Unit], workers: int, observer: Observer
) -> list[UnitRecord]:
    """Do the units that are not finished; give the records of all in order."""
    records: dict[int, UnitRecord] = {}
    missing: list[Unit] = []
    for unit in units:
        finished = find_finished(job.output, job.job_id, unit.number)
        if finished is None:
            missing.append(unit)
        else:
            records[unit.number] = finished
    if records and missing:
        observer.say(f"{len(records):,} of {len(units):,} units are already on disk")
    if missing:
        observer.start(sum(unit.bytes for unit in missing), len(missing))
    sizes = {unit.number: unit.bytes for unit in missing}

    def collect(record: UnitRecord) -> None:
        records[record.unit] = record
        observer.finish_unit(
            sizes[record.unit],
            sum(shard.tokens for shard in record.shards),
            sum(ledger.rejects for ledger in record.ledgers.values()),
        )

    if min(workers, len(missing)) <= 1:
        for unit in missing:
            collect(process_unit(job, unit))
    else:
        _spread(job, missing, min(workers, len(missing)), collect)
    return [records[unit.number] for unit in units]


def _spread(
    job: UnitJob, units: Sequence[Unit], workers: int, collect: Callable[[UnitRecord], None]
) -> None:
    """Do units in worker processes; the first failure ends all."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting = iter(units)
    running: set[Future[UnitRecord]] = set()
    try:
        while True:
            # Two per worker keeps all busy without queueing a whole corpus of tasks.
            while len(running) < 2 * workers and (unit := next(waiting, None)) is not None:
                running.add(pool.submit(process_unit, job, unit))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                collect(future.result())
    except KeyboardInterrupt:
        # Units in work would take long to finish, and a killed build loses only those.
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, most likely for lack of memory; run the same command "
            "again with fewer --workers (finished units are kept)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Set up a worker: one thread of encoding, and an end when (and only when) the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


def _commit(
    options: BuildOptions,
    spec: str,
    tokenizer: Tokenizer,
    files: Sequence[InputFile],
    records: Sequence[UnitRecord],
    observer: Observer,
) -> Manifest:
    """Check the ledger, gather the rejects, write the manifest."""
    output = options.output
    inputs = _total_inputs(files, records)
    _gather_rejects(output, records)
    _check_rejects(options, inputs)
    shards = [
        shard
        for split in (TRAIN, VALIDATION)
        for record in records
        for shard in record.shards
        if shard.split == split
    ]
    dtype = str(tokenizer.dtype)
    totals = Ledger.total(entry.ledger for entry in inputs)
    manifest = Manifest(
        fingerprint=order_fingerprint(tokenizer.sha256, tokenizer.eos_id, dtype, shards),
        tokenizer=TokenizerEntry(
            spec=spec,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            max_token_id=tokenizer.max_token_id,
            eos_id=tokenizer.eos_id,
            eos_token=tokenizer.eos_token,
        ),
        dtype="uint16" if dtype == "uint16" else "uint32",
        text_key=options.text_key,
        validation_fraction=options.validation_fraction,
        special_tokens=options.special_tokens,
        totals=totals,
        splits=total_splits(tokenizer.sha256, tokenizer.eos_id, dtype, shards),
        shards=shards,
        inputs=inputs,
    )
    if not totals.documents:
        raise DataError(
            f"none of the {totals.records:,} records is a document ({totals.rejects:,} rejected, "
            f"{totals.empty:,} empty); see {output / REJECTS}, check --text-key and --input"
        )
    rows = sum(split.rows for split in manifest.splits.values())
    assert rows == totals.documents, (rows, totals.documents)
    if (output / MANIFEST).is_file() and load_manifest(output) == manifest:
        observer.say(f"{output} is complete and from the same inputs and options: left as it is")
        return manifest
    write_manifest(output, manifest)
    return manifest


def _total_inputs(files: Sequence[InputFile], records: Sequence[UnitRecord]) -> list[InputEntry]:
    """The ledger of each input file over all units that read it."""
    parts: dict[int, list[Ledger]] = {number: [] for number in range(len(files))}
    for record in records:
        for number, ledger in record.ledgers.items():
            parts[number].append(ledger)
    return [
        InputEntry(**file._asdict(), ledger=Ledger.total(parts[number]))
        for number, file in enumerate(files)
    ]


def _gather_rejects(output: Path, records: Sequence[UnitRecord]) -> None:
    """One rejects.jsonl in input order; an empty one says that nothing was rejected."""
    with whole_file(output / REJECTS) as temporary, open(temporary, "wb") as gathered:
        for record in records:
            if any(ledger.rejects for ledger in record.ledgers.values()):
                with open(rejects_path(output, record.unit), "rb") as part:
                    shutil.copyfileobj(part, gathered)


def _check_rejects(options: BuildOptions, inputs: Sequence[InputEntry]) -> None:
    """Hold the bad records against the policy.

    Files that are one document each do not count against the limit: in a directory some binary
    ones are normal, so they are counted and listed but do not fail the job.
    """
    listed = options.output / REJECTS
    everything = Ledger.total(entry.ledger for entry in inputs)
    if options.on_bad == "fail" and everything.rejects:
        raise DataError(
            f"{everything.rejects:,} records are bad (listed in {listed}); mend them, or use "
            "--on-bad skip"
        )
    lines = Ledger.total(entry.ledger for entry in inputs if entry.kind != "text")
    if lines.rejects > options.max_bad_fraction * lines.records:
        reasons = ", ".join(f"{count:,} {why}" for why, count in lines.rejects_by_reason.items())
        raise DataError(
            f"{lines.rejects:,} of {lines.records:,} records are bad ({reasons}), more than "
            f"--max-bad-fraction {options.max_bad_fraction:g}; see {listed}, mend them or raise "
            "the limit and run again (finished units are kept)"
        )
