"""The files of one checkpoint: written to the disk for sure, listed with sizes and checksums.

Nothing here needs torch or other ranks, so a checkpoint can be looked at anywhere.
"""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from foundation.bounded_files import check_inside, is_name_inside, read_bounded
from foundation.durable_files import FileEntry, read_entry, write_synced
from foundation.json_text import read_json
from foundation.shown_text import printable, reason
from model.errors import CheckpointError
from pipeline.checkpoint.crash_points import crash_point
from pipeline.checkpoint.file_names import (
    FOLDER,
    LATEST,
    MANIFEST,
    STATE_NAME,
    WEIGHTS,
    committed,
    step_of,
)

# To be raised when what is written can no longer be read by what was there before.
_VERSION = 2
STATE_VERSION = 1
_LATEST_BYTES = 1 << 12

Entries = dict[str, FileEntry]


def write_manifest(checkpoint: Path, entries: Entries) -> None:
    """List all files of a checkpoint.

    Raises:
        OSError: it cannot be written.
    """
    files = {name: {"bytes": e.size, "xxh3": e.xxh3} for name, e in sorted(entries.items())}
    content = {"version": _VERSION, "xxh3": _digest(files), "files": files}
    text = json.dumps(content, indent=1) + "\n"
    write_synced(checkpoint / MANIFEST, text.encode())
    crash_point("manifest-half-written", halve=checkpoint / MANIFEST)


def read_manifest(checkpoint: Path) -> Entries:
    """All files of a checkpoint.

    Raises:
        CheckpointError: there is no list, or it is damaged.
    """
    try:
        content = read_json(checkpoint / MANIFEST)
        files: dict[str, dict[str, Any]] = content["files"]
        if content["version"] != _VERSION or content["xxh3"] != _digest(files):
            raise ValueError("its own checksum")
        return {name: _entry(name, entry) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None


def _entry(name: str, entry: dict[str, Any]) -> FileEntry:
    size, checksum = entry["bytes"], entry["xxh3"]
    if type(size) is not int or not isinstance(checksum, str) or not is_name_inside(name):
        raise ValueError("a name, size or checksum that no save writes")
    return FileEntry(size, checksum)


def other_version(checkpoint: Path) -> str | None:
    """Why a checkpoint is not this version's to read, if its manifest or state says so."""
    for name, reads in ((MANIFEST, _VERSION), (STATE_NAME, STATE_VERSION)):
        try:
            version = read_json(checkpoint / name)["version"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged, which is another matter
        if isinstance(version, int) and not isinstance(version, bool) and version != reads:
            advice = (
                "use the Headway that wrote it, or a later one"
                if version > reads
                else "export it with the Headway that wrote it and begin with train.init_from"
            )
            return (
                f"{checkpoint / name} has version {version}, and this Headway reads version "
                f"{reads}; {advice}"
            )
    return None


def _digest(files: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())


def size_problems(checkpoint: Path) -> list[str]:
    """What is missing from a checkpoint, has another size than its manifest says, or is extra."""
    try:
        entries = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, entry in entries.items():
        try:
            facts = (checkpoint / name).stat()
        except OSError:
            problems.append(f"{name} is missing")
            continue
        if not _is_file_of(checkpoint, name, facts):
            problems.append(f"{name} is not a regular file in the checkpoint")
        elif facts.st_size != entry.size:
            problems.append(f"{name} has {facts.st_size:,} bytes, not {entry.size:,}")
    folder = checkpoint / WEIGHTS
    found = sorted(f"{WEIGHTS}/{path.name}" for path in folder.iterdir()) if folder.is_dir() else []
    problems += [f"{name} does not belong to it" for name in found if name not in entries]
    return problems + misnaming(checkpoint)


def _is_file_of(checkpoint: Path, name: str, facts: os.stat_result) -> bool:
    """Whether it is a file, no device or pipe, and no link to a place outside."""
    if not stat.S_ISREG(facts.st_mode):
        return False
    try:
        check_inside(checkpoint, checkpoint / name)
    except OSError:
        return False
    return True


def misnaming(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint's name, if its state is of another step."""
    named = step_of(checkpoint)
    try:
        saved = read_json(checkpoint / STATE_NAME)["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    if named is None or saved == named:
        return []
    return [f"{STATE_NAME} says step {saved!r:.30}, so it was renamed; give it that name back"]


def content_problems(checkpoint: Path, entries: Entries, names: Iterable[str]) -> list[str]:
    """Which of the named files are not what the manifest's entries say."""
    problems = []
    for name in names:
        try:
            if read_entry(checkpoint / name) != entries[name]:
                problems.append(f"{name} differs from its checksum")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint: sizes, then every checksum; empty when it is whole."""
    if problems := size_problems(checkpoint):
        return problems
    entries = read_manifest(checkpoint)
    return content_problems(checkpoint, entries, entries)


def checkpoint_path(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest of a run or checkpoints folder.

    The newest is the one that `latest` names; when that file is missing or names none that is
    there, the one of the highest step.

    Raises:
        CheckpointError: there is none.
    """
    try:
        if (path / STATE_NAME).is_file() or (path / MANIFEST).is_file():
            return path
        for folder in (path, path / FOLDER):
            newest = newest_checkpoint(folder)
            if newest is not None:
                return newest
    except OSError as error:
        raise CheckpointError(
            f"{printable(str(path))} cannot be read ({reason(error)}); give a folder such as "
            "runs/NAME/checkpoints/step_00000100, or the run's folder"
        ) from error
    raise CheckpointError(
        f"{path} is not a checkpoint: it has neither {STATE_NAME} nor {LATEST}; give a folder such "
        "as runs/NAME/checkpoints/step_00000100, or the run's folder"
    )


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` names, or the committed one of the highest step."""
    try:
        name = read_bounded(directory / LATEST, _LATEST_BYTES).decode("utf-8").strip()
    except (OSError, ValueError):
        name = ""
    named = directory / name
    if "/" not in name and step_of(named) is not None and named.is_dir():
        return named
    steps = committed(directory)
    return steps[-1] if steps else None
