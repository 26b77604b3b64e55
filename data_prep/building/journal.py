"""The journal of a job: one entry per finished unit, from which a build resumes and commits."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.shards.atomic import write_whole
from data_prep.shards.manifest import MANIFEST, TOKENIZER, Ledger, ShardEntry
from foundation.durable_files import entry_of, read_entry

JOURNAL = "journal"
COMMITTED = "committed.json"
CLAIMS = "claims"


class UnitRecord(BaseModel):
    """The journal entry of a finished unit: its shards, and a ledger per input file.

    `xxh3` is the checksum of the rest: an entry that does not match it counts as not there. Of a
    tokenizer that may change text, `sampled` documents were decoded again, and `altered` of them
    came back as other text; entries of other tokenizers do not have these keys. Nor have entries of
    texts the key `targets` of shards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: int
    job_id: str
    shards: list[ShardEntry]
    ledgers: dict[int, Ledger]
    sampled: int = 0
    altered: int = 0
    xxh3: str = ""

    def checksum(self) -> str:
        """What `xxh3` is to be."""
        return entry_of(self._as_json({"xxh3"})).xxh3

    def with_checksum(self) -> bytes:
        """The content of its file."""
        return self.model_copy(update={"xxh3": self.checksum()})._as_json(set())

    def _as_json(self, left_out: set[str]) -> bytes:
        without: dict[str, Any] = dict.fromkeys(left_out, True)
        if not self.sampled:
            without |= {"sampled": True, "altered": True}
        if not any(shard.targets for shard in self.shards):
            without["shards"] = {"__all__": {"targets"}}
        return self.model_dump_json(exclude=without).encode()


def record_finished(output: Path, record: UnitRecord) -> None:
    """Write the journal entry of a unit; its shards are on disk already."""
    write_whole(_entry_path(output, record.unit), record.with_checksum())


def find_finished(output: Path, job_id: str, unit: int) -> UnitRecord | None:
    """The journal entry of a unit, if it is of this job and its files are there in full size."""
    try:
        done = UnitRecord.model_validate_json(_entry_path(output, unit).read_bytes())
        whole = all((output / entry.path).stat().st_size == entry.bytes for entry in done.shards)
    except (OSError, ValidationError):
        return None
    if done.xxh3 != done.checksum():
        return None
    rejected = sum(ledger.rejects for ledger in done.ledgers.values())
    if rejected and not rejects_path(output, unit).is_file():
        return None
    return done if whole and done.unit == unit and done.job_id == job_id else None


def is_unit_finished(output: Path, job_id: str, unit: int) -> bool:
    """Whether a unit of this job is on disk."""
    return find_finished(output, job_id, unit) is not None


def is_intact(output: Path, record: UnitRecord) -> bool:
    """Whether the shards of a unit are, byte for byte, those of its entry; reads them whole."""
    try:
        return all(
            read_entry(output / shard.path, from_disk=False).xxh3 == shard.file_xxh3_128
            for shard in record.shards
        )
    except OSError:
        return False


def forget_finished(output: Path, unit: int) -> None:
    """Remove the entry of a unit, which is then to be done again."""
    _entry_path(output, unit).unlink(missing_ok=True)


def find_edit(output: Path) -> str:
    """How the manifest differs from the one that was committed, as one line; empty if it does not.

    A set that was copied without its journal has nothing to compare.
    """
    path = output / JOURNAL / COMMITTED
    if not path.is_file():
        return ""
    try:
        committed = json.loads(path.read_bytes())["manifest_sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return f"{path} cannot be read; run the same data_prep/shard.py command again"
    if hashlib.sha256((output / MANIFEST).read_bytes()).hexdigest() == committed:
        return ""
    return (
        f"{output / MANIFEST} was edited: it is not the one that the build wrote; run the same "
        "data_prep/shard.py command again"
    )


def has_shards(output: Path) -> bool:
    """Whether any job put a shard or a manifest into a folder."""
    return (output / MANIFEST).exists() or any((output / "shards").rglob("*.arrow"))


def forget_job(output: Path) -> None:
    """Remove what a job without shards left: its journal, but for the lock, and its tokenizer."""
    journal = output / JOURNAL
    left = [output / TOKENIZER, output / "rejects.jsonl", *journal.glob("*.json*")]
    for path in left:
        path.unlink(missing_ok=True)
    for folder in (claims_folder(output), journal / "dedup"):
        shutil.rmtree(folder, ignore_errors=True)


def claims_folder(output: Path) -> Path:
    """Where the tasks of a job array claim their work."""
    return output / JOURNAL / CLAIMS


def is_committed(output: Path) -> bool:
    """Whether a job was committed here and no build has found anything to do since."""
    return (output / JOURNAL / COMMITTED).is_file()


def withdraw_commit(output: Path) -> None:
    """There is something to do again; the manifest stays until the next commit."""
    (output / JOURNAL / COMMITTED).unlink(missing_ok=True)


def rejects_path(output: Path, unit: int) -> Path:
    """Where a unit lists its rejected records, until they are gathered into one file."""
    return output / JOURNAL / f"{unit:05d}.rejects.jsonl"


def _entry_path(output: Path, unit: int) -> Path:
    return output / JOURNAL / f"{unit:05d}.json"
