"""What identifies a job: the inputs and options that determine the bytes of its shards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.atomic import write_whole
from data_prep.errors import DataError
from data_prep.manifest import FORMAT_VERSION
from data_prep.sources import LARGEST_DOCUMENT_BYTES, InputFile
from data_prep.tokenizer import SpecialTokens
from data_prep.unit import JOURNAL, BadRecordPolicy

DESCRIPTION = "job.json"
NAMED_INPUTS = 3


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build, as the command line gives them.

    Attributes:
        inputs: Files and directories.
        output: Directory of the shard set.
        tokenizer: A tokenizer.json, a directory that holds one, "train:VOCABULARY" or "bytes".
        workers: Processes; None = the cores this process may use. Never changes the result.
        validation_fraction: Share of the documents that is held out, chosen by a hash of the text.
        globs: Patterns of the files to take from directories; none = text and source files.
        exclude: Patterns of files and folders to leave out of directories.
        text_key: The key of the text in a .jsonl record.
        on_bad: "skip" counts bad records and goes on; "fail" ends the job at the first.
        max_bad_fraction: Largest share of bad .jsonl records that is still committed.
        shard_tokens: Most tokens in one shard (a single longer document still gets one).
        unit_bytes: Input bytes in one unit of work; None = by the size of the input.
        eos_token: Name of the end-of-document token; None = the usual names.
        source: Name of this corpus in the paths of the shards.
        special_tokens: Text that spells a special token is ordinary text, becomes the token's id,
            or rejects the document.
        max_document_bytes: A longer text file or record is rejected; it bounds the memory.
    """

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: str
    workers: int | None = None
    validation_fraction: float = 0.01
    globs: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_key: str = "text"
    on_bad: BadRecordPolicy = "skip"
    max_bad_fraction: float = 0.001
    shard_tokens: int = 1 << 27
    unit_bytes: int | None = None
    eos_token: str | None = None
    source: str = "corpus"
    special_tokens: SpecialTokens = "text"
    max_document_bytes: int = LARGEST_DOCUMENT_BYTES

    def check(self) -> None:
        """Refuse values that cannot be meant.

        Raises:
            DataError: Naming the first one.
        """
        if not 0.0 <= self.validation_fraction < 1.0:
            raise DataError(
                f"--validation-fraction {self.validation_fraction} is not in [0, 1); 0.01 holds "
                "out one document in a hundred"
            )
        if not 0.0 <= self.max_bad_fraction <= 1.0:
            raise DataError(f"--max-bad-fraction {self.max_bad_fraction} is not in [0, 1]")
        for name, value in (
            ("workers", self.workers),
            ("shard-tokens", self.shard_tokens),
            ("unit-bytes", self.unit_bytes),
            ("max-document-bytes", self.max_document_bytes),
        ):
            if value is not None and value < 1:
                raise DataError(f"--{name} {value} is not a positive number")
        if not self.source or "/" in self.source or self.source.startswith("."):
            raise DataError(f"--source {self.source!r} is not a folder name; use letters or digits")


def describe_job(
    options: BuildOptions,
    files: Sequence[InputFile],
    unit_bytes: int,
    tokenizer: Mapping[str, str | None],
) -> dict[str, Any]:
    """Everything that determines the bytes of the shards, as it is kept in journal/job.json."""
    return {
        "version": FORMAT_VERSION,
        "tokenizer": dict(tokenizer),
        "text_key": options.text_key,
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_tokens,
        "unit_bytes": unit_bytes,
        "source": options.source,
        "special_tokens": options.special_tokens,
        "max_document_bytes": options.max_document_bytes,
        "inputs": {file.path: [file.kind, file.bytes, file.mtime_ns] for file in files},
    }


def job_id(description: Mapping[str, Any]) -> str:
    """sha256 of a description; input order counts."""
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def claim_output(output: Path, description: Mapping[str, Any]) -> None:
    """Make `output` the folder of this job, or find that it already is.

    Raises:
        DataError: The folder holds something else, or shards from other inputs or options; the
            message says what differs.
    """
    path = output / JOURNAL / DESCRIPTION
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output} is a file; name a directory")
    if not path.exists():
        if output.is_dir() and any(entry.name != JOURNAL for entry in output.iterdir()):
            raise DataError(
                f"--output {output} is not empty and holds no shards of this program; name a new "
                "directory"
            )
        write_whole(path, json.dumps(description, indent=1).encode())
        return
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a new --output") from error
    if job_id(earlier) != job_id(description):
        raise DataError(
            f"--output {output} holds shards from other inputs or options "
            f"({'; '.join(_differences(earlier, description))}); name a new --output, or delete "
            "this one to make it again"
        )


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in a few words each."""
    found = [
        f"{key}: {earlier.get(key)!r} then, {now[key]!r} now"
        for key in now
        if key not in ("inputs", "tokenizer") and earlier.get(key) != now[key]
    ]
    before, after = earlier.get("tokenizer", {}), now["tokenizer"]
    found += [
        f"tokenizer {key}: {before.get(key)} then, {after[key]} now"
        for key in after
        if before.get(key) != after[key]
    ]
    then_inputs, now_inputs = earlier.get("inputs", {}), now["inputs"]
    changes = {
        "new": [path for path in now_inputs if path not in then_inputs],
        "gone": [path for path in then_inputs if path not in now_inputs],
        "changed": [
            path
            for path, state in now_inputs.items()
            if path in then_inputs and list(then_inputs[path]) != list(state)
        ],
    }
    for kind, paths in changes.items():
        if paths:
            named = ", ".join(paths[:NAMED_INPUTS])
            more = f" and {len(paths) - NAMED_INPUTS} more" if len(paths) > NAMED_INPUTS else ""
            found.append(f"{kind} inputs: {named}{more}")
    return found or ["the order of the inputs"]
