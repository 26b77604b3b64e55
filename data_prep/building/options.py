"""The options of a build: what the command line, or a YAML file for it, can say."""

import math
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_prep.errors import DataError
from data_prep.inputs.records import LARGEST_DOCUMENT_BYTES
from data_prep.tokenization.encoder import EncoderChoice
from data_prep.tokenization.tokenizer import SpecialTokens

BadRecordPolicy = Literal["skip", "fail"]
Dedup = Literal["none", "exact"]
STDLIB_PREFIX = "python:stdlib"
LONGEST_NAME_BYTES = 200
LONGEST_SHOWN = 80


FormKeys = tuple[str | None, str | None, str | None]  # of prompt, completion, messages


@dataclass(frozen=True)
class Source:
    """One named corpus of a job.

    Attributes:
        name: The folder of its shards below each split.
        inputs: Files, directories and names of datasets (hf:NAME).
        weight: Its share of a mixture, relative to the other sources; None = by tokens. It goes
            into the manifest and changes no shard.
        globs: Patterns of the files to take from directories; None = those of the job.
        exclude: Patterns of files and folders to leave out; None = those of the job.
        text_key: The key of the text in its records; None = that of the job.
        prompt_key: Instead, that of a prompt, on which there is no loss.
        completion_key: That of the completion to it.
        messages_key: Instead, that of a list of messages.
        chat_template: File of the template that writes them out; None = that of the job.
    """

    name: str
    inputs: tuple[Path, ...]
    weight: float | None = None
    globs: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    text_key: str | None = None
    prompt_key: str | None = None
    completion_key: str | None = None
    messages_key: str | None = None
    chat_template: Path | None = None

    @property
    def form_keys(self) -> FormKeys:
        """The keys of records that are not one text."""
        return self.prompt_key, self.completion_key, self.messages_key


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build, as the command line gives them.

    Attributes:
        output: Directory of the shard set.
        tokenizer: A tokenizer.json, a directory that holds one, "train:VOCABULARY" or "bytes".
        inputs: Files and directories of a single source.
        sources: Several sources instead.
        workers: Processes; None = the cores this process may use. Never changes the result.
        validation_fraction: Share of the documents that is held out, chosen by a hash of the text.
        globs: Patterns of the files to take from directories; none = text and source code.
        exclude: Patterns of files and folders to leave out of directories.
        text_key: The key or column of the text; one with dots is nested.
        prompt_key: Instead, that of a prompt, on which there is no loss.
        completion_key: That of the completion to it.
        messages_key: Instead, that of a list of messages; the loss is on the assistant's.
        chat_template: File of the template that writes them out; None = the tokenizer's.
        dedup: "exact" keeps the first of documents with the same text, over all sources.
        on_bad: "skip" counts bad records and continues; "fail" ends the job at the first.
        max_bad_fraction: Largest share of bad records in files of records that is still committed.
        shard_tokens: Most tokens in one shard (a single longer document still gets one).
        unit_bytes: Input bytes in one unit of work; None = by the size of the input.
        eos_token: Name of the end-of-document token; None = the usual names.
        source: Name of the single source.
        special_tokens: Text that spells a special token is ordinary text, becomes the token's id,
            or rejects the document.
        max_document_bytes: A longer text file or record is rejected; it bounds the memory.
        encoder: The library that encodes; never changes the result. "auto" is the fastest that
            proves equal.
    """

    output: Path
    tokenizer: str
    inputs: tuple[Path, ...] = ()
    sources: tuple[Source, ...] = ()
    workers: int | None = None
    validation_fraction: float = 0.01
    globs: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_key: str = "text"
    prompt_key: str | None = None
    completion_key: str | None = None
    messages_key: str | None = None
    chat_template: Path | None = None
    dedup: Dedup = "none"
    on_bad: BadRecordPolicy = "skip"
    max_bad_fraction: float = 0.001
    shard_tokens: int = 1 << 24
    unit_bytes: int | None = None
    eos_token: str | None = None
    source: str = "corpus"
    special_tokens: SpecialTokens = "text"
    max_document_bytes: int = LARGEST_DOCUMENT_BYTES
    encoder: EncoderChoice = "auto"

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """The sources, with what they inherit from the job filled in."""
        given = self.sources or (Source(self.source, self.inputs),)
        own = (self.prompt_key, self.completion_key, self.messages_key)
        return tuple(
            replace(
                source,
                prompt_key=prompt_key,
                completion_key=completion_key,
                messages_key=messages_key,
                chat_template=source.chat_template or self.chat_template,
                inputs=tuple(_resolve(path) for path in source.inputs),
                globs=self.globs if source.globs is None else source.globs,
                exclude=self.exclude if source.exclude is None else source.exclude,
                text_key=source.text_key or self.text_key,
            )
            for source in given
            for prompt_key, completion_key, messages_key in (_inherited_keys(source, own),)
        )

    def check(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            DataError: Naming all of them, one line each.
        """
        problems = list(self._problems())
        if problems:
            raise DataError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if not 0.0 <= self.validation_fraction < 1.0:
            yield (
                f"--validation-fraction {self.validation_fraction} is not in [0, 1); 0.01 holds "
                "out one document in a hundred"
            )
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            yield f"--max-bad-fraction {self.max_bad_fraction} is not in [0, 1]"
        for name, value in (
            ("workers", self.workers),
            ("shard-tokens", self.shard_tokens),
            ("unit-bytes", self.unit_bytes),
            ("max-document-bytes", self.max_document_bytes),
        ):
            if value is not None and value < 1:
                yield f"--{name} {value} is not a positive number"
        for option, text in (
            ("output", os.fspath(self.output)),
            ("tokenizer", self.tokenizer),
            ("eos-token", self.eos_token or ""),
            ("text-key", self.text_key),
            ("prompt-key", self.prompt_key or ""),
            ("completion-key", self.completion_key or ""),
            ("messages-key", self.messages_key or ""),
        ):
            if problem := _why_no_text(text):
                yield f"--{option} {text[:LONGEST_SHOWN]!a} {problem}; write it another way"
        if not self.sources and not self.inputs:
            yield "no input: name files or directories with --input, or sources in a --config"
        if self.sources and self.inputs:
            yield "--input and sources are both given; name the inputs in one of them"
        yield from _source_problems(self.sources or (Source(self.source, self.inputs),))
        yield from _form_problems(self.all_sources)


def _source_problems(sources: tuple[Source, ...]) -> Iterator[str]:
    for source in sources:
        name = source.name
        is_plain = name.isprintable() and len(os.fsencode(name)) <= LONGEST_NAME_BYTES
        if not name or not is_plain or "/" in name or name.startswith("."):
            yield f"--source {name[:LONGEST_SHOWN]!a} is not a folder name; use letters or digits"
        if source.weight is not None and not 0.0 < source.weight < math.inf:
            yield (
                f"source {source.name}: weight {source.weight:g} is not a positive number; leave "
                "the source out to give it no share"
            )
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            yield f"{count} sources are named {name!r}; give each its own name"
    weighted = [source.name for source in sources if source.weight is not None]
    if 0 < len(weighted) < len(sources):
        missing = ", ".join(source.name for source in sources if source.weight is None)
        yield (
            f"{', '.join(weighted)} with a weight but {missing} without one; give every source a "
            "weight, or none to mix by tokens"
        )


def _inherited_keys(source: Source, own: FormKeys) -> FormKeys:
    """The keys of a source's form: its own if it names any key, else those of the job."""
    names_one = source.text_key is not None or any(source.form_keys)
    return source.form_keys if names_one else own


def _form_problems(sources: tuple[Source, ...]) -> Iterator[str]:
    """What is wrong with the keys of sources that have inherited those of the job."""
    for source in sources:
        where = f"source {source.name}: " if len(sources) > 1 else ""
        prompt, completion, messages = source.form_keys
        if (prompt is None) != (completion is None):
            given, missing = (
                ("completion", "prompt") if prompt is None else ("prompt", "completion")
            )
            yield f"{where}--{given}-key is given without --{missing}-key; give both"
        if messages is not None and (prompt is not None or completion is not None):
            yield (
                f"{where}--messages-key and --prompt-key are both given; records are chats, or "
                "prompts and completions: keep one"
            )
    with_template = [source for source in sources if source.chat_template is not None]
    if with_template and not any(source.messages_key for source in sources):
        yield "--chat-template has no effect without --messages-key; add it or leave both out"


def _why_no_text(text: str) -> str:
    """Why a value cannot be passed on to the libraries; empty when it can."""
    if "\0" in text:
        return "holds the character NUL"
    return "is not UTF-8" if any("\ud800" <= sign <= "\udfff" for sign in text) else ""


def _resolve(path: Path) -> Path:
    """A path as given, or below the interpreter's standard library after "python:stdlib"."""
    text = os.fspath(path)
    if text != STDLIB_PREFIX and not text.startswith(f"{STDLIB_PREFIX}/"):
        return path
    return Path(sysconfig.get_path("stdlib") + text.removeprefix(STDLIB_PREFIX))
