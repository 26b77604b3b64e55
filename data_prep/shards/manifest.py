"""manifest.json: what a shard set holds; written last, so that its presence means complete."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from data_prep.conversations.forms import RecordForm
from data_prep.errors import DataError
from data_prep.shards.arrow_file import ShardFile, TargetsColumn
from data_prep.shards.atomic import write_whole
from foundation.bounded_files import is_name_inside, read_bounded
from foundation.shown_text import printable

FORMAT = "headway-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TRAIN = "train"
VALIDATION = "validation"
_LARGEST_NUMBER = 1 << 62
_LARGEST_BYTES = 1 << 32  # a set of a million shards has some hundred megabytes


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard file; `path` is relative to the manifest, offsets are absolute in the file.

    A set may have 10^5 of them: with slots they take a third of the memory of a model.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    path: str
    split: str
    source: str
    unit: int
    bytes: int
    rows: int
    tokens: int
    values_offset: int
    offsets_offset: int
    tokens_xxh3_128: str
    file_xxh3_128: str
    # Last, and written only where there is one: sets without targets keep their bytes.
    targets: TargetsColumn | None = None

    @classmethod
    def of(cls, path: str, split: str, source: str, unit: int, file: ShardFile) -> Self:
        """Entry of a file that was just written."""
        return cls(path=path, split=split, source=source, unit=unit, **file._asdict())


class Ledger(_Entry):
    """Counts that add up: records = documents + empty + duplicates + rejects."""

    records: int = 0
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    rejects: int = 0
    rejects_by_reason: dict[str, int] = {}
    text_bytes: int = 0

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.records != self.documents + self.empty + self.duplicates + self.rejects:
            raise ValueError("records is not documents + empty + duplicates + rejects")
        if self.rejects != sum(self.rejects_by_reason.values()):
            raise ValueError("rejects is not the sum over its reasons")
        return self

    @classmethod
    def total(cls, parts: Iterable["Ledger"]) -> Self:
        """Sum of several ledgers."""
        entries = list(parts)
        reasons: dict[str, int] = {}
        for entry in entries:
            for reason, count in entry.rejects_by_reason.items():
                reasons[reason] = reasons.get(reason, 0) + count
        return cls(
            records=sum(entry.records for entry in entries),
            documents=sum(entry.documents for entry in entries),
            empty=sum(entry.empty for entry in entries),
            duplicates=sum(entry.duplicates for entry in entries),
            rejects=sum(entry.rejects for entry in entries),
            rejects_by_reason=dict(sorted(reasons.items())),
            text_bytes=sum(entry.text_bytes for entry in entries),
        )


class InputEntry(_Entry):
    """One input file: its source, how it was read, and what became of its records."""

    source: str = ""
    path: str
    kind: Literal["jsonl", "json", "text", "parquet", "arrow"]
    bytes: int
    mtime_ns: int
    ledger: Ledger


class TokenizerEntry(_Entry):
    """The tokenizer of the set; its tokenizer.json is next to the manifest."""

    spec: str
    sha256: str
    vocab_size: int
    max_token_id: int
    eos_id: int
    eos_token: str


class SplitEntry(_Entry):
    """Totals of one split; the fingerprint covers all that determines its token order."""

    shards: int
    rows: int
    tokens: int
    bytes: int
    fingerprint: str


class SourceEntry(_Entry):
    """Totals of one source.

    Attributes:
        name: The folder of its shards below each split.
        weight: Its share of a mixture, relative to the other sources; None = by tokens. No shard
            depends on it.
        text_key: The key of the text in its records.
        totals: Its ledger.
        splits: Totals and fingerprint of its part of each split.
        form: How its records become prompts and completions; None = they are texts.
    """

    name: str
    weight: float | None = None
    text_key: str = "text"
    totals: Ledger
    splits: dict[str, SplitEntry]
    form: RecordForm | None = None


class Manifest(_Entry):
    """The whole description of a shard set; shards and inputs follow the order of the sources."""

    format: Literal["headway-shards"] = "headway-shards"
    version: Literal[1] = 1
    fingerprint: str
    tokenizer: TokenizerEntry
    dtype: Literal["uint16", "uint32"]
    text_key: str
    validation_fraction: float
    special_tokens: Literal["text", "id", "reject"] = "text"
    dedup: Literal["none", "exact"] = "none"
    totals: Ledger
    splits: dict[str, SplitEntry]
    sources: list[SourceEntry] = []
    shards: list[ShardEntry]
    inputs: list[InputEntry]

    def text_key_of(self, entry: InputEntry) -> str:
        """The key of the text in the records of one input file."""
        return next(
            (source.text_key for source in self.sources if source.name == entry.source),
            self.text_key,
        )

    def form_of(self, entry: InputEntry) -> RecordForm | None:
        """The form of the records of one input file."""
        return next((source.form for source in self.sources if source.name == entry.source), None)

    @property
    def has_targets(self) -> bool:
        """Whether some shards say which tokens are targets."""
        return any(shard.targets for shard in self.shards)

    def as_json(self) -> bytes:
        """The content of its file; a set of texts alone does not name what only others have."""
        absent: dict[str, Any] = {}
        if not self.has_targets:
            absent["shards"] = {"__all__": {"targets"}}
        if not any(source.form for source in self.sources):
            absent["sources"] = {"__all__": {"form"}}
        return self.model_dump_json(indent=1, exclude=absent).encode() + b"\n"

    @property
    def itemsize(self) -> int:
        """Bytes per stored token."""
        return 2 if self.dtype == "uint16" else 4


def order_fingerprint(
    tokenizer_sha256: str, eos_id: int, dtype: str, shards: Iterable[ShardEntry]
) -> str:
    """sha256 of everything that determines tokens and targets: contents in order, not names."""
    head = json.dumps([FORMAT_VERSION, tokenizer_sha256, eos_id, dtype], separators=(",", ":"))
    digest = hashlib.sha256(head.removesuffix("]").encode() + b",[")
    # One piece per shard, so that the JSON of a large set is never in memory.
    for number, shard in enumerate(shards):
        facts = [shard.split, shard.rows, shard.tokens, shard.tokens_xxh3_128]
        if shard.targets is not None:
            facts.append(shard.targets.xxh3_128)
        piece = json.dumps(facts, separators=(",", ":"))
        digest.update((b"," if number else b"") + piece.encode())
    digest.update(b"]]")
    return digest.hexdigest()


def total_splits(
    tokenizer_sha256: str, eos_id: int, dtype: str, shards: Iterable[ShardEntry]
) -> dict[str, SplitEntry]:
    """Totals and fingerprint per split; both splits are named even when one is empty."""
    members: dict[str, list[ShardEntry]] = {split: [] for split in (TRAIN, VALIDATION)}
    for shard in shards:
        members.setdefault(shard.split, []).append(shard)
    return {
        split: SplitEntry(
            shards=len(entries),
            rows=sum(shard.rows for shard in entries),
            tokens=sum(shard.tokens for shard in entries),
            bytes=sum(shard.bytes for shard in entries),
            fingerprint=order_fingerprint(tokenizer_sha256, eos_id, dtype, entries),
        )
        for split, entries in members.items()
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit the set: after this call, and not before, it can be opened."""
    write_whole(directory / MANIFEST, manifest.as_json())


def load_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a shard set.

    Raises:
        DataError: The directory or the manifest is missing, unreadable, or contradicts itself.
    """
    manifest = read_manifest(directory)
    if contradiction := find_contradiction(directory, manifest):
        raise DataError(contradiction)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a shard set, even if it contradicts itself.

    Raises:
        DataError: The directory or the manifest is missing or unreadable, or names files that are
            not below the directory.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not a directory; make the shards with "
            f"python data_prep/shard.py --input ... --output {directory}"
        )
    if not path.is_file():
        raise DataError(
            f"{directory} has no {MANIFEST}, so its shards are incomplete; run the same "
            "data_prep/shard.py command again to finish them"
        )
    try:
        manifest = Manifest.model_validate_json(read_bounded(path, _LARGEST_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(str(part) for part in first["loc"]) or "file")
        raise DataError(
            f"{path} is not a valid manifest ({where}: {printable(first['msg'])}); make the shards "
            "again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    faults = (*map(_find_fault, manifest.shards), *map(_find_name_fault, _names_of(manifest)))
    if fault := next(filter(None, faults), ""):
        raise DataError(f"{path} is not a valid manifest ({fault}); make the shards again")
    return manifest


def find_contradiction(directory: Path, manifest: Manifest) -> str:
    """In which a manifest contradicts itself, as one line; empty when it does not."""
    if _is_consistent(manifest):
        return ""
    return (
        f"{directory / MANIFEST} was edited: its totals or fingerprint do not follow from its "
        "shards; make the shards again"
    )


def _find_fault(shard: ShardEntry) -> str:
    """What is impossible about a shard whatever is on the disk; empty for nothing."""
    if not is_name_inside(shard.path):
        return f"the shard path {shard.path[:80]!a} does not stay in the folder of the set"
    counts = (shard.unit, shard.bytes, shard.rows, shard.tokens)
    targets = (shard.targets.count, shard.targets.offset) if shard.targets else ()
    for number in (*counts, shard.values_offset, shard.offsets_offset, *targets):
        if not 0 <= number < _LARGEST_NUMBER:
            return f"{shard.path}: {number} is not a count of anything in a file"
    return ""


def _names_of(manifest: Manifest) -> Iterator[str]:
    """What is shown of a manifest beside the paths of shards."""
    yield from manifest.splits
    for source in manifest.sources:
        yield from (source.name, *source.splits)
    yield from dict.fromkeys(shard.source for shard in manifest.shards)
    yield manifest.tokenizer.eos_token


def _find_name_fault(name: str) -> str:
    return "" if name.isprintable() else f"{name[:80]!a} holds what cannot be shown"


def _is_consistent(manifest: Manifest) -> bool:
    """True when fingerprint and totals follow from the shards."""
    facts = (manifest.tokenizer.sha256, manifest.tokenizer.eos_id, manifest.dtype)
    by_source: dict[str, list[ShardEntry]] = {source.name: [] for source in manifest.sources}
    if manifest.sources and not {shard.source for shard in manifest.shards} <= by_source.keys():
        return False
    if manifest.sources:
        for shard in manifest.shards:
            by_source[shard.source].append(shard)
    return (
        manifest.fingerprint == order_fingerprint(*facts, manifest.shards)
        and manifest.splits == total_splits(*facts, manifest.shards)
        and all(
            source.splits == total_splits(*facts, by_source[source.name])
            for source in manifest.sources
        )
    )
