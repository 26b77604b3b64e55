"""The start of a build: claim the output, store the tokenizer and the unit list in it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.building.identity import claim_output, describe_job, hash_description
from data_prep.building.journal import JOURNAL, is_unit_finished
from data_prep.building.options import BuildOptions, Source
from data_prep.building.plan import Plan, PlannedUnit, are_units_written, write_units
from data_prep.building.unit import is_held_out
from data_prep.conversations.declared import chat_form, prompt_form, with_tokenizer
from data_prep.conversations.forms import RecordForm
from data_prep.conversations.marks import plain_text
from data_prep.errors import DataError
from data_prep.inputs.reading import read_unit
from data_prep.inputs.records import Reading
from data_prep.shards.atomic import write_whole
from data_prep.shards.manifest import TOKENIZER
from data_prep.tokenization.tokenizer import (
    Tokenizer,
    bytes_tokenizer,
    check_vocabulary,
    read_tokenizer,
)
from data_prep.tokenization.training import train_watched
from data_prep.workers.phase import Observer

TRAIN_PREFIX = "train:"
TRAINED = "trained.json"
TRAINING_SAMPLE_CHARACTERS = 1 << 26
TRAINING_SAMPLE_UNITS = 64
LONGEST_VOCABULARY_DIGITS = 9


class PreparedJob(NamedTuple):
    """A job whose units can be worked on.

    Attributes:
        options: As given.
        plan: Sources and files; its units are on disk.
        sizes: Input bytes of each unit, `[units]`.
        job_id: In the journal entry of each unit.
        spec: How the tokenizer was asked for: "file", "bytes" or "train:VOCABULARY".
        tokenizer: Of the shards.
        forms: Of the records of each source; None = they are texts.
    """

    options: BuildOptions
    plan: Plan
    sizes: NDArray[np.int64]
    job_id: str
    spec: str
    tokenizer: Tokenizer
    forms: tuple[RecordForm | None, ...]


class Intent(NamedTuple):
    """A job before anything is written: what it is, and its tokenizer unless that is trained."""

    options: BuildOptions
    plan: Plan
    description: dict[str, object]
    spec: str
    given: Tokenizer | None
    forms: tuple[RecordForm | None, ...]

    def forms_for(self, tokenizer: Tokenizer | None) -> tuple[RecordForm | None, ...]:
        """The forms with what they must know of the tokenizer; None = it is still to be trained."""
        special_tokens = self.options.special_tokens
        return tuple(with_tokenizer(form, tokenizer, special_tokens) for form in self.forms)


def intend(options: BuildOptions, plan: Plan) -> Intent:
    """Work out what identifies a job; nothing is written.

    Raises:
        DataError: The tokenizer cannot be used.
    """
    given = _given_tokenizer(options)
    spec = "file" if given and options.tokenizer != "bytes" else options.tokenizer
    facts = {
        "spec": spec,
        "sha256": given.sha256 if given else None,
        "eos_token": given.eos_token if given else options.eos_token,
    }
    forms = tuple(_form_of(source, options.tokenizer) for source in plan.sources)
    return Intent(options, plan, describe_job(options, plan, forms, facts), spec, given, forms)


def _form_of(source: Source, tokenizer_spec: str) -> RecordForm | None:
    if source.messages_key is not None:
        return chat_form(source.messages_key, source.chat_template, tokenizer_spec)
    return prompt_form(source.prompt_key, source.completion_key)


def prepare(intent: Intent, observer: Observer) -> PreparedJob:
    """Put tokenizer and unit list into the output, which the caller holds.

    Raises:
        DataError: The output is of another job, or cannot be written.
    """
    options, plan = intent.options, intent.plan
    claim_output(options.output, intent.description, may_clear=True)
    tokenizer = _store_tokenizer(intent, observer)
    # The list on disk is for the workers; it follows from the plan and is not believed.
    if not are_units_written(options.output, plan.units):
        write_units(options.output, plan.units)
    sizes = np.array([planned.unit.bytes for planned in plan.units], dtype=np.int64)
    return PreparedJob(
        options=options,
        plan=plan._replace(units=[]),
        sizes=sizes,
        job_id=_job_id(intent, tokenizer),
        spec=intent.spec,
        tokenizer=tokenizer,
        forms=intent.forms_for(tokenizer),
    )


def _given_tokenizer(options: BuildOptions) -> Tokenizer | None:
    """The tokenizer, unless it is still to be trained."""
    spec = options.tokenizer
    if spec == "bytes":
        tokenizer = Tokenizer(bytes_tokenizer(), options.eos_token, spec, options.special_tokens)
        tokenizer.check_end("--tokenizer bytes")
        return tokenizer
    if not spec.startswith(TRAIN_PREFIX):
        tokenizer = read_tokenizer(Path(spec), options.eos_token, options.special_tokens)
        tokenizer.check_end(f"--tokenizer {spec}")
        return tokenizer
    digits = spec.removeprefix(TRAIN_PREFIX)
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= LONGEST_VOCABULARY_DIGITS):
        raise DataError(f"--tokenizer {spec}: the vocabulary is not a number; e.g. train:8192")
    check_vocabulary(int(digits))
    return None


def _job_id(intent: Intent, tokenizer: Tokenizer) -> str:
    described = hash_description(intent.description) + tokenizer.sha256
    return hashlib.sha256(described.encode()).hexdigest()


def _store_tokenizer(intent: Intent, observer: Observer) -> Tokenizer:
    """Put tokenizer.json into the output; the one that an earlier run trained there is kept."""
    path, given = intent.options.output / TOKENIZER, intent.given
    if given is not None:
        if not path.is_file() or path.read_bytes() != given.content:
            write_whole(path, given.content)
        return given
    tokenizer = _find_trained(intent)
    if tokenizer is None:
        if path.exists():
            observer.say(f"note: {path} is not the tokenizer that was trained here")
        tokenizer = _train(intent, observer)
    tokenizer.check_end(f"--tokenizer {intent.options.tokenizer}")
    return tokenizer


def _find_trained(intent: Intent) -> Tokenizer | None:
    """The tokenizer that an earlier run of this job trained, if the journal knows it."""
    output, options = intent.options.output, intent.options
    try:
        tokenizer = read_tokenizer(output / TOKENIZER, options.eos_token, options.special_tokens)
    except DataError:
        return None
    note = output / JOURNAL / TRAINED
    noted = note.read_bytes() if note.is_file() else b""
    if noted == _trained_note(intent, tokenizer):
        return tokenizer
    # Builds of earlier versions have no such note, but the id of their job depends on the file.
    job_id = _job_id(intent, tokenizer)
    units = range(len(intent.plan.units))
    is_known = any(is_unit_finished(output, job_id, unit) for unit in units)
    return tokenizer if is_known else None


def _trained_note(intent: Intent, tokenizer: Tokenizer) -> bytes:
    return json.dumps({"job_id": _job_id(intent, tokenizer), "sha256": tokenizer.sha256}).encode()


def _train(intent: Intent, observer: Observer) -> Tokenizer:
    """Train the tokenizer of a job, and note which one it is."""
    options = intent.options
    path = options.output / TOKENIZER
    vocabulary = int(options.tokenizer.removeprefix(TRAIN_PREFIX))
    observer.say(f"training a tokenizer of {vocabulary:,} tokens on a sample of the input")
    texts = _training_texts(intent)
    write_whole(path, train_watched(texts, vocabulary, observer.say))
    tokenizer = read_tokenizer(path, options.eos_token, options.special_tokens)
    if tokenizer.vocab_size < vocabulary:
        observer.say(
            f"note: the input gives a vocabulary of {tokenizer.vocab_size:,} tokens, not of "
            f"{vocabulary:,}: it holds no more pieces that occur twice"
        )
    write_whole(options.output / JOURNAL / TRAINED, _trained_note(intent, tokenizer))
    return tokenizer


def _training_texts(intent: Intent) -> Iterator[str]:
    """Documents from the starts of evenly spread units, without those that are held out."""
    options, plan, forms = intent.options, intent.plan, intent.forms_for(None)
    units: Sequence[PlannedUnit] = plan.units
    sampled = min(len(units), TRAINING_SAMPLE_UNITS)
    for number in range(sampled):
        budget = TRAINING_SAMPLE_CHARACTERS // sampled
        planned = units[number * len(units) // sampled]
        text_key = plan.sources[planned.source].text_key or options.text_key
        form = forms[planned.source]
        reading = Reading(text_key, options.max_document_bytes, form)
        for content in (text for batch in read_unit(planned.unit, reading) for text in batch.texts):
            if content and not is_held_out(content, options.validation_fraction):
                text = (plain_text(content) if form else content).decode("utf-8")
                yield text[:budget]
                budget -= len(text)
            if budget <= 0:
                break
