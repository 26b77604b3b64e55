"""The end of a build: check the ledger, gather the rejects, write the manifest."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_prep.building.dedup import forget_duplicates
from data_prep.building.journal import (
    COMMITTED,
    JOURNAL,
    claims_folder,
    find_finished,
    forget_finished,
    is_intact,
    rejects_path,
)
from data_prep.building.options import BuildOptions
from data_prep.building.prepare import PreparedJob
from data_prep.errors import BadRecordsError, DataError
from data_prep.inputs.input_files import check_unchanged
from data_prep.shards.atomic import remove_leftovers, whole_file, write_whole
from data_prep.shards.manifest import (
    MANIFEST,
    TRAIN,
    VALIDATION,
    InputEntry,
    Ledger,
    Manifest,
    ShardEntry,
    SourceEntry,
    TokenizerEntry,
    load_manifest,
    order_fingerprint,
    total_splits,
    write_manifest,
)
from data_prep.workers.phase import Observer

REJECTS = "rejects.jsonl"


def commit(job: PreparedJob, observer: Observer, *, verify: bool = False) -> Manifest:
    """Write the manifest of a job whose units are all on disk; keep it when it is there.

    Args:
        job: Its options also give the limit of bad records and the weights of sources.
        observer: Notified when nothing was left to do.
        verify: Read every shard whole and compare it with its journal entry.

    Raises:
        BadRecordsError: More records are bad than the options allow.
        DataError: An input changed, no record is a document, or a unit is gone.
    """
    output = job.options.output
    for file in job.plan.files:
        check_unchanged(file)
    shards, inputs = _gather(job, verify, observer)
    _check_rejects(job.options, inputs)
    manifest = _describe(job, shards, inputs)
    totals = manifest.totals
    if not totals.documents:
        raise DataError(
            f"none of the {totals.records:,} records is a document ({totals.rejects:,} rejected, "
            f"{totals.empty:,} empty); see {output / REJECTS}, check --text-key and --input"
        )
    rows = sum(split.rows for split in manifest.splits.values())
    assert rows == totals.documents, (rows, totals.documents)
    if (output / MANIFEST).is_file() and load_manifest(output) == manifest:
        observer.say(f"{output} is complete and from the same inputs and options: left as it is")
    else:
        write_manifest(output, manifest)
    note = _note(job)
    if not _is_noted(output, note):
        write_whole(output / JOURNAL / COMMITTED, note)
    # In this order: tasks that still look for work must see that there is none.
    forget_duplicates(output)
    shutil.rmtree(claims_folder(output), ignore_errors=True)
    remove_leftovers(output)
    return manifest


def find_committed(job: PreparedJob) -> Manifest | None:
    """The manifest, when another process has committed exactly this job."""
    output = job.options.output
    try:
        return load_manifest(output) if _is_noted(output, _note(job)) else None
    except (OSError, DataError):
        return None


def _note(job: PreparedJob) -> bytes:
    """What was committed, and with which of the options that no shard depends on."""
    content = (job.options.output / MANIFEST).read_bytes()
    facts = {
        "job_id": job.job_id,
        "manifest_sha256": hashlib.sha256(content).hexdigest(),
        "weights": [source.weight for source in job.plan.sources],
        "on_bad": job.options.on_bad,
        "max_bad_fraction": job.options.max_bad_fraction,
    }
    return json.dumps(facts, indent=1).encode()


def _is_noted(output: Path, note: bytes) -> bool:
    path = output / JOURNAL / COMMITTED
    return path.is_file() and path.read_bytes() == note


def _gather(
    job: PreparedJob, verify: bool, observer: Observer
) -> tuple[list[ShardEntry], list[InputEntry]]:
    """Read the journal once, in order: the shards, a ledger per file, and rejects.jsonl."""
    output, plan = job.options.output, job.plan
    shards: dict[str, list[ShardEntry]] = {TRAIN: [], VALIDATION: []}
    ledgers: dict[int, Ledger] = {}
    sampled = altered = 0
    with whole_file(output / REJECTS) as temporary, open(temporary, "wb") as gathered:
        for unit in range(len(job.sizes)):
            record = find_finished(output, job.job_id, unit)
            if record is not None and verify and not is_intact(output, record):
                forget_finished(output, unit)
                record = None
            if record is None:
                raise DataError(
                    f"unit {unit} of {output} was finished but its files are gone or damaged; run "
                    "the same command again to rebuild it"
                )
            sampled += record.sampled
            altered += record.altered
            for shard in record.shards:
                shards[shard.split].append(shard)
            for file, ledger in record.ledgers.items():
                earlier = ledgers.get(file)
                ledgers[file] = Ledger.total((earlier, ledger)) if earlier else ledger
            if any(ledger.rejects for ledger in record.ledgers.values()):
                with open(rejects_path(output, unit), "rb") as part:
                    shutil.copyfileobj(part, gathered)
    if sampled:
        observer.say(
            f"of {sampled:,} documents that were decoded again, {altered:,} came back as other text"
        )
    inputs = [
        InputEntry(source=plan.sources[source].name, **file._asdict(), ledger=ledgers[number])
        for number, (file, source) in enumerate(zip(plan.files, plan.file_sources, strict=True))
    ]
    return shards[TRAIN] + shards[VALIDATION], inputs


def _describe(
    job: PreparedJob, shards: Sequence[ShardEntry], inputs: Sequence[InputEntry]
) -> Manifest:
    """The manifest of a job."""
    options, tokenizer = job.options, job.tokenizer
    dtype = str(tokenizer.dtype)
    facts = (tokenizer.sha256, tokenizer.eos_id, dtype)
    sources = [
        SourceEntry(
            name=source.name,
            weight=source.weight,
            text_key=source.text_key or options.text_key,
            totals=Ledger.total(entry.ledger for entry in inputs if entry.source == source.name),
            splits=total_splits(*facts, (s for s in shards if s.source == source.name)),
            form=form,
        )
        for source, form in zip(job.plan.sources, job.forms, strict=True)
    ]
    return Manifest(
        fingerprint=order_fingerprint(*facts, shards),
        tokenizer=TokenizerEntry(
            spec=job.spec,
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
        dedup=options.dedup,
        totals=Ledger.total(source.totals for source in sources),
        splits=total_splits(*facts, shards),
        sources=sources,
        shards=list(shards),
        inputs=list(inputs),
    )


def _check_rejects(options: BuildOptions, inputs: Sequence[InputEntry]) -> None:
    """Apply the policy for bad records.

    Files that are one document each do not count against the limit: in a directory some binary
    ones are normal, so they are counted and listed but do not fail the job.
    """
    listed = options.output / REJECTS
    everything = Ledger.total(entry.ledger for entry in inputs)
    if options.on_bad == "fail" and everything.rejects:
        raise DataError(
            f"{everything.rejects:,} records are bad (listed in {listed}); fix them, or use "
            "--on-bad skip"
        )
    lines = Ledger.total(entry.ledger for entry in inputs if entry.kind != "text")
    if lines.rejects > options.max_bad_fraction * lines.records:
        reasons = ", ".join(f"{count:,} {why}" for why, count in lines.rejects_by_reason.items())
        raise BadRecordsError(
            f"{lines.rejects:,} of {lines.records:,} records are bad ({reasons}), more than "
            f"--max-bad-fraction {options.max_bad_fraction:g}; see {listed}, fix them or raise "
            "the limit and run again (finished units are kept)"
        )
