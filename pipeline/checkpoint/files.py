"""The files of one checkpoint: written to the disk for sure, listed with sizes and checksums.

Nothing here needs torch or other ranks, so a checkpoint can be looked at anywhere.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from foundation.durable_files import FileEntry, read_entry, write_synced
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
        content = json.loads((checkpoint / MANIFEST).read_bytes())
        files: dict[str, dict[str, Any]] = content["files"]
        if content["version"] != _VERSION or content["xxh3"] != _digest(files):
            raise ValueError("its own checksum")
        return {name: FileEntry(entry["bytes"], entry["xxh3"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{MANIFEST} is damaged") from None


def other_version(checkpoint: Path) -> str | None:
    """Why a checkpoint is not this version's to read, if its manifest or state says so."""
    for name, reads in ((MANIFEST, _VERSION), (STATE_NAME, STATE_VERSION)):
        try:
            version = json.loads((checkpoint / name).read_bytes())["version"]
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
            size = (checkpoint / name).stat().st_size
        except OSError:
            problems.append(f"{name} is missing")
            continue
        if size != entry.size:
            problems.append(f"{name} has {size:,} bytes, not {entry.size:,}")
    folder = checkpoint / WEIGHTS
    found = sorted(f"{WEIGHTS}/{path.name}" for path in folder.iterdir()) if folder.is_dir() else []
    problems += [f"{name} does not belong to it" for name in found if name not in entries]
    return problems + misnaming(checkpoint)


def misnaming(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint's name, if its state is of another step."""
    named = step_of(checkpoint)
    try:
        saved = json.loads((checkpoint / STATE_NAME).read_bytes())["step"]
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
    if (path / STATE_NAME).is_file() or (path / MANIFEST).is_file():
        return path
    for folder in (path, path / FOLDER):
        newest = newest_checkpoint(folder)
        if newest is not None:
            return newest
    raise CheckpointError(
        f"{path} is not a checkpoint: it has neither {STATE_NAME} nor {LATEST}; give a folder such "
        "as runs/NAME/checkpoints/step_00000100, or the run's folder"
    )


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint that `latest` names, or the committed one of the highest step."""
    try:
        named = directory / (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        named = directory
    if step_of(named) is not None and named.is_dir():
        return named
    steps = committed(directory)
    return steps[-1] if steps else None
