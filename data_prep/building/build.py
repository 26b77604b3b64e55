"""Build a shard set: plan the units, let workers do them, commit the manifest last."""

from functools import partial

from data_prep.building.commit import REJECTS, commit, find_committed
from data_prep.building.dedup import DedupJob, forget_damaged, mark_duplicates
from data_prep.building.identity import claim_output
from data_prep.building.journal import (
    find_finished,
    forget_finished,
    is_intact,
    is_unit_finished,
    withdraw_commit,
)
from data_prep.building.options import BuildOptions
from data_prep.building.output_lock import writing
from data_prep.building.plan import make_plan
from data_prep.building.prepare import PreparedJob, intend, prepare
from data_prep.building.unit import UnitJob, UnitSource, encode_unit
from data_prep.inputs.input_files import LeftOut
from data_prep.inputs.records import Reading
from data_prep.shards.atomic import remove_leftovers
from data_prep.shards.manifest import Manifest
from data_prep.tokenization.encoder import EncoderName, choose_encoder
from data_prep.workers.phase import (
    FAST_BYTES_PER_WORKER,
    SLOW_BYTES_PER_WORKER,
    Observer,
    Phase,
    Workers,
)
from data_prep.workers.pool import LocalWorkers

__all__ = ["REJECTS", "build"]


def build(options: BuildOptions, observer: Observer, workers: Workers | None = None) -> Manifest:
    """Make the shard set that `options` ask for, or finish or keep the one that is there.

    The bytes of the output depend on the inputs and options alone: not on the number or kind of
    workers, and not on how often the build was killed and started again.

    Args:
        options: Inputs, output and settings.
        observer: Notified of the progress.
        workers: Do the work; None = processes of this machine.

    Returns:
        The manifest, which is on disk when this returns.

    Raises:
        DataError: Inputs, options or output cannot be used; or more records are bad than allowed.
    """
    workers = workers or LocalWorkers(options.workers)
    try:
        return _build(options, observer, workers)
    finally:
        workers.close()


def _build(options: BuildOptions, observer: Observer, workers: Workers) -> Manifest:
    options.check()
    left_out = LeftOut()
    plan = make_plan(options, left_out)
    for line in left_out.lines():
        observer.say(line)
    observer.say(f"{len(plan.files):,} input files, {plan.total_bytes / 1e6:,.1f} MB")
    intent = intend(options, plan)
    claim_output(options.output, intent.description)
    with writing(options.output, workers.shares_output, observer):
        if not workers.shares_output:
            remove_leftovers(options.output)
        with workers.claim("prepare"):
            job = prepare(intent, observer)
        del plan, intent
        if not workers.shares_output and find_committed(job) is None:
            _forget_damaged(job, observer)
        _encode(job, workers, observer)
        with workers.claim("commit"):
            committed = find_committed(job) if workers.shares_output else None
            # Tasks of an array do not read what the others wrote before, so it is done here.
            return committed or commit(job, observer, verify=workers.shares_output)


def _forget_damaged(job: PreparedJob, observer: Observer) -> None:
    """Read what an earlier run wrote: units whose shards changed since are to be done again."""
    output = job.options.output
    for unit in range(len(job.sizes)):
        record = find_finished(output, job.job_id, unit)
        if record is not None and not is_intact(output, record):
            observer.say(f"note: the shards of unit {unit} are damaged and are made again")
            forget_finished(output, unit)


def _encode(job: PreparedJob, workers: Workers, observer: Observer) -> None:
    """Bring every unit to disk, after a pass for duplicates when that was asked for."""
    options, output = job.options, job.options.output.absolute()
    unit_job = UnitJob(
        output=output,
        job_id=job.job_id,
        tokenizer_sha256=job.tokenizer.sha256,
        eos_token=job.tokenizer.eos_token,
        sources=tuple(
            UnitSource(source.name, source.text_key or options.text_key, form)
            for source, form in zip(job.plan.sources, job.forms, strict=True)
        ),
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        on_bad=options.on_bad,
        max_bad_fraction=options.max_bad_fraction,
        special_tokens=options.special_tokens,
        max_document_bytes=options.max_document_bytes,
        dedup=options.dedup,
        encoder=_choose_encoder(job, observer),
    )

    is_finished = partial(is_unit_finished, output, job.job_id)
    if options.dedup == "exact" and not all(map(is_finished, range(len(job.sizes)))):
        withdraw_commit(output)
        dedup = DedupJob(
            output=output,
            job_id=job.job_id,
            readings=tuple(
                Reading(source.text_key, options.max_document_bytes, source.form)
                for source in unit_job.sources
            ),
            num_units=len(job.sizes),
        )
        if not workers.shares_output:
            forget_damaged(dedup, observer)
        mark_duplicates(dedup, job.sizes, workers, observer)
    work = partial(encode_unit, unit_job)
    worth = SLOW_BYTES_PER_WORKER if unit_job.encoder == "tokenizers" else FAST_BYTES_PER_WORKER
    workers.run(Phase("encode", "encoding", work, is_finished, job.sizes, worth), observer)


def _choose_encoder(job: PreparedJob, observer: Observer) -> EncoderName:
    """Find the encoder; say why when it is not the fast one, and what cannot be checked."""
    report = choose_encoder(job.tokenizer, job.options.encoder)
    if report.note:
        observer.say(f"note: {report.note}")
    if why := job.tokenizer.why_lossy:
        observer.say(
            f"note: {why}, so text need not come back from its ids: documents that do not are "
            "counted in a sample, not refused"
        )
    return report.name
