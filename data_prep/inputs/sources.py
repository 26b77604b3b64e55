"""Input paths to files, and files to units of work.

A unit is a run of byte ranges that depends on the inputs alone, never on the number of workers.
A record starts in exactly one unit: a range of a .jsonl file holds the lines that START in it,
wherever they end, and one of a .parquet file the row groups; every other file is in one unit.
"""

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.errors import DataError
from data_prep.inputs.arrow_inputs import check_parquet
from data_prep.inputs.file_names import IGNORED_DIRECTORIES, FileFormat, Kind, format_of, is_taken
from data_prep.inputs.hub_dataset import (
    find_dataset_files,
    is_dataset_name,
    is_pinned,
    local_path,
)
from data_prep.inputs.json_inputs import BLOCK_BYTES, starts_like_jsonl
from data_prep.inputs.saved_dataset import files_of_saved_dataset

SMALLEST_UNIT_BYTES = 1 << 20
LARGEST_UNIT_BYTES = 1 << 26
UNITS_WANTED = 64
READ_FORMATS = (
    ".jsonl and .json (also .gz, .zst, .xz), .parquet, .arrow, text files (compressed: .txt and "
    "source suffixes), saved Hugging Face datasets and directories"
)


class InputFile(NamedTuple):
    """One input file as it was when the job was planned."""

    path: str
    kind: Kind
    bytes: int
    mtime_ns: int

    @property
    def codec(self) -> str:
        """The suffix of its compression; empty for none."""
        form = format_of(self.path)
        return form.codec if form else ""

    @property
    def is_splittable(self) -> bool:
        """True when a part of it can be read without what comes before."""
        return self.kind in ("jsonl", "parquet") and not self.codec


class Segment(NamedTuple):
    """The bytes [start, end) of input file number `file`."""

    file: int
    source: InputFile
    start: int
    end: int


@dataclass(frozen=True)
class Unit:
    """One claimable piece of work: its number names its shard files and its journal entry."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def bytes(self) -> int:
        """Input bytes of this unit."""
        return sum(segment.end - segment.start for segment in self.segments)


def find_inputs(
    paths: Sequence[Path],
    globs: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: Path | None = None,
) -> list[InputFile]:
    """List the input files in the order in which their records are stored.

    Args:
        paths: Files, directories, saved Hugging Face datasets and names of datasets (hf:NAME);
            files keep their given order, a directory is walked sorted.
        globs: Patterns for files in directories, matched against the name and the path below the
            directory; none = names that look like text or source.
        exclude: Patterns of files and folders to leave out, matched in the same way.
        output: The folder that the job writes; left out when it lies in an input directory.

    Returns:
        Every file once, with size and modification time.

    Raises:
        DataError: A path is missing, given twice, or of a kind that is not read; or there is none.
    """
    found: dict[str, InputFile] = {}
    for path in paths:
        for entry in _files_of(path, globs, exclude, output):
            if entry.path in found:
                raise DataError(f"{entry.path} is given twice by --input; give each file once")
            found[entry.path] = entry
    if not found:
        given = ", ".join(str(path) for path in paths)
        raise DataError(
            f"no input files in {given}: no file name matches; name the files with --glob '*.ext'"
        )
    return list(found.values())


def plan_units(files: Sequence[InputFile], unit_bytes: int) -> list[Unit]:
    """Cut the inputs into units of about `unit_bytes`, from the inputs alone.

    Example: files of 3, 3 and 10 MiB (jsonl) at 4 MiB give [0:3 + 3:6 of the first two],
    [0:4], [4:8], [8:10] of the third.
    """
    units: list[Unit] = []
    pending: list[Segment] = []
    pending_bytes = 0

    def close() -> None:
        nonlocal pending_bytes
        if pending:
            units.append(Unit(len(units), tuple(pending)))
            pending.clear()
        pending_bytes = 0

    for number, file in enumerate(files):
        if file.bytes > unit_bytes:
            close()
            step = unit_bytes if file.is_splittable else file.bytes
            for start in range(0, file.bytes, step):
                pending.append(Segment(number, file, start, min(start + step, file.bytes)))
                close()
            continue
        pending.append(Segment(number, file, 0, file.bytes))
        pending_bytes += file.bytes
        if pending_bytes >= unit_bytes:
            close()
    close()
    return units


def choose_unit_bytes(total_bytes: int) -> int:
    """A power of two that gives about 64 units, between 1 MiB and 64 MiB."""
    wanted = 1 << max(0, (total_bytes // UNITS_WANTED).bit_length() - 1)
    return min(max(wanted, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


def _files_of(
    path: Path, globs: Sequence[str], exclude: Sequence[str], output: Path | None
) -> Iterator[InputFile]:
    """The files that one --input stands for, described."""
    if not is_dataset_name(path):
        described = map(_describe, _list(path, globs, exclude, output))
        yield from (entry for entry in described if entry is not None)
        return
    for name in find_dataset_files(path):
        entry = _describe(Path(local_path(name)))
        if entry is None:
            raise DataError(f"--input {path} names {name}, which is not a file; check the dataset")
        # A commit never changes, but every machine has its own copy of its own age.
        yield entry._replace(path=name, mtime_ns=0) if is_pinned(name) else entry


def _list(
    path: Path, globs: Sequence[str], exclude: Sequence[str], output: Path | None
) -> Iterator[Path]:
    """The files that one --input stands for."""
    if not path.is_dir():
        yield _explicit(path)
    elif (files := files_of_saved_dataset(path)) is not None:
        yield from files
    else:
        yield from _walk(path, globs, exclude, output)


def _walk(
    directory: Path, globs: Sequence[str], exclude: Sequence[str], output: Path | None
) -> Iterator[Path]:
    """Files below a directory, sorted by path; directory links are not followed."""
    skipped = os.path.abspath(output) if output else None
    for folder, names, files in os.walk(directory):
        relative = Path(folder).relative_to(directory)
        names[:] = sorted(
            name
            for name in names
            if name not in IGNORED_DIRECTORIES
            and not _matches(relative / name, exclude)
            and os.path.abspath(os.path.join(folder, name)) != skipped
        )
        if saved := files_of_saved_dataset(Path(folder)):
            names.clear()
            yield from saved
            continue
        for name in sorted(files):
            below = relative / name
            wanted = _matches(below, globs) if globs else is_taken(name)
            if wanted and not _matches(below, exclude):
                yield Path(folder) / name


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    whole = path.as_posix()
    return any(
        fnmatch.fnmatchcase(path.name, pattern.removeprefix("**/"))
        or fnmatch.fnmatchcase(whole, pattern)
        for pattern in patterns
    )


def _explicit(path: Path) -> Path:
    """A file named by the user must exist."""
    if not path.exists():
        raise DataError(f"--input {path} does not exist; check the path")
    return path


def _describe(path: Path) -> InputFile | None:
    """Size, time and kind of a regular file; None for devices, pipes and dangling links."""
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the file name {os.fsencode(path)!r} is not UTF-8; rename the file or --exclude it"
        ) from error
    form = format_of(path.name)
    if form is None:
        raise DataError(
            f"--input {path} is not read: {''.join(path.suffixes)} names no format that is. Read "
            f"are {READ_FORMATS}; convert or rename it"
        )
    kind = _look_inside(path, form)
    return InputFile(os.path.abspath(path), kind, status.st_size, status.st_mtime_ns)


def _look_inside(path: Path, form: FileFormat) -> Kind:
    """The kind of a file of records by its first bytes, before any work is done.

    Raises:
        DataError: It cannot be opened, or has no end. A text file that cannot be opened is one
            reject, but how many records a file of records would have given is not known.
    """
    if form.kind == "text":
        return form.kind
    try:
        with open(path, "rb") as file:
            content = file.read(BLOCK_BYTES) if form.kind == "json" and not form.codec else b""
        if form.kind == "parquet":
            check_parquet(os.fspath(path))
    except OSError as error:
        raise unreadable(path, error) from error
    return "jsonl" if content and starts_like_jsonl(content) else form.kind


def unreadable(path: Path | str, error: OSError) -> DataError:
    """The error for a file whose records cannot be counted."""
    return DataError(f"cannot read {path}: {error.strerror or error}; fix the file or --exclude it")


def open_unchanged(source: InputFile) -> BinaryIO:
    """Open a file, refusing it when it is not the one that was planned."""
    with ExitStack() as stack:
        file = stack.enter_context(open(local_path(source.path), "rb"))
        status = os.fstat(file.fileno())
        mtime_ns = 0 if is_pinned(source.path) else status.st_mtime_ns
        if (status.st_size, mtime_ns) != (source.bytes, source.mtime_ns):
            raise DataError(
                f"{source.path} changed while the job was running; leave the inputs alone and "
                "start again with a new --output"
            )
        stack.pop_all()
        return file
