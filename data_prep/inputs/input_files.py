"""Input paths to input files: found, described, and opened only while they are unchanged."""

import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_prep.errors import DataError, shown
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

LONGEST_SHOWN_SUFFIX = 12
_SHARD = re.compile(r"(\d{5,})(-\d{3,})?\.arrow")
MOST_REASONS = 10
READ_FORMATS = (
    ".jsonl and .json (also .gz, .zst, .xz), .parquet, .arrow, text files (compressed: .txt and "
    "source code), saved Hugging Face datasets and directories"
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


class LeftOut:
    """What the folders of the input hold and is not read, by the reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Path] = {}

    def add(self, reason: str, path: Path) -> None:
        """Count a file or folder; the first of each reason is kept by name."""
        self._counts[reason] += 1
        self._first.setdefault(reason, path)

    def lines(self) -> list[str]:
        """One line per reason, the most frequent first."""
        return [
            f"note: not read: {os.fsencode(self._first[reason]).decode(errors='replace')} {reason}"
            + (f" (and {count - 1:,} more)" if count > 1 else "")
            for reason, count in self._counts.most_common(MOST_REASONS)
        ]


def find_inputs(
    paths: Sequence[Path],
    globs: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: Path | None = None,
    left_out: "LeftOut | None" = None,
) -> list[InputFile]:
    """List the input files in the order in which their records are stored.

    Args:
        paths: Files, directories, saved Hugging Face datasets and names of datasets (hf:NAME);
            files keep their given order, a directory is walked sorted.
        globs: Patterns for files in directories, matched against the name and the path below the
            directory; none = names that look like text or source
            code.
        exclude: Patterns of files and folders to leave out, matched in the same way.
        output: The folder that the job writes; left out when it is inside an input directory.
        left_out: Gathers what a directory holds and is not taken.

    Returns:
        Every file once, with size and modification time.

    Raises:
        DataError: A path is missing, given twice, or of a kind that is not read; or there is none.
    """
    found: dict[str, InputFile] = {}
    left_out = LeftOut() if left_out is None else left_out
    for path in paths:
        try:
            for entry in _files_of(path, globs, exclude, output, left_out):
                if entry.path in found:
                    raise DataError(
                        f"{shown(entry.path)} is given twice by --input; give each file once"
                    )
                found[entry.path] = entry
        except OSError as error:
            raise unreadable(error.filename or path, error) from error
    if not found:
        given = ", ".join(map(shown, paths))
        raise DataError(
            f"no input files in {given}: no file name matches; name the files with --glob '*.ext'"
        )
    return list(found.values())


def _files_of(
    path: Path,
    globs: Sequence[str],
    exclude: Sequence[str],
    output: Path | None,
    left_out: LeftOut,
) -> Iterator[InputFile]:
    """The files that one --input stands for, described."""
    if not is_dataset_name(path):
        is_folder = os.path.isdir(path)
        for file in _list(path, globs, exclude, output, left_out):
            if problem := _why_no_file(file):
                if not is_folder:
                    raise DataError(f"--input {shown(file)} {problem}; give a regular file")
                left_out.add(problem, file)
                continue
            yield _describe(file)
        return
    for name in find_dataset_files(path):
        copy = Path(local_path(name))
        if problem := _why_no_file(copy):
            raise DataError(
                f"--input {path} names {shown(name)}, which {problem}; check the dataset"
            )
        entry = _describe(copy)
        # A commit never changes, but every machine has its own copy of its own age.
        yield entry._replace(path=name, mtime_ns=0) if is_pinned(name) else entry


def _list(
    path: Path,
    globs: Sequence[str],
    exclude: Sequence[str],
    output: Path | None,
    left_out: LeftOut,
) -> Iterator[Path]:
    """The files of one --input."""
    if not os.path.isdir(path):
        yield _explicit(path)
    elif (files := files_of_saved_dataset(path)) is not None:
        yield from files
    else:
        yield from _walk(path, globs, exclude, output, left_out)


def _walk(
    directory: Path,
    globs: Sequence[str],
    exclude: Sequence[str],
    output: Path | None,
    left_out: LeftOut,
) -> Iterator[Path]:
    """Files below a directory, sorted by path; directory links are not followed."""
    skipped = os.path.abspath(output) if output else None
    for folder, names, files in os.walk(directory, onerror=_refuse_folder):
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
        for name in names:
            if os.path.islink(os.path.join(folder, name)):
                left_out.add("is a link to a folder", Path(folder) / name)
        for name in sorted(files, key=_place):
            below = relative / name
            wanted = _matches(below, globs) if globs else is_taken(name)
            if _matches(below, exclude):
                continue
            if wanted:
                yield Path(folder) / name
            else:
                left_out.add(_why_not_taken(name, globs), Path(folder) / name)


def _place(name: str) -> str:
    """What files of a folder are sorted by: their names, but parts of a shard behind its start."""
    shard = _SHARD.fullmatch(name)
    return f"{shard[1]}.arrow{shard[2] or ''}" if shard else name


def _refuse_folder(error: OSError) -> None:
    """A folder that cannot be listed may hold anything: leaving it out is for the user to say."""
    raise unreadable(error.filename, error)


def _why_not_taken(name: str, globs: Sequence[str]) -> str:
    if globs:
        return "matches no --glob"
    suffix = "".join(Path(name).suffixes[-1:])
    if not suffix:
        return "has no suffix"
    shown = suffix if suffix.isprintable() and len(suffix) <= LONGEST_SHOWN_SUFFIX else "unusual"
    return f"has the suffix {shown}, which is taken only by --glob"


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    whole = path.as_posix()
    return any(
        fnmatch.fnmatchcase(path.name, pattern.removeprefix("**/"))
        or fnmatch.fnmatchcase(whole, pattern)
        for pattern in patterns
    )


def _explicit(path: Path) -> Path:
    """A file named by the user must exist."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise DataError(f"--input {shown(path)} is a link to nothing; check it") from error
        raise DataError(f"--input {shown(path)} does not exist; check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--input {shown(path)[:200]}: {reason}; check the path") from error
    return path


def _why_no_file(path: Path) -> str:
    """Why a name is not one of a regular file; empty when it is."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a link to nothing"
    except OSError as error:
        raise unreadable(path, error) from error
    if stat.S_ISREG(mode):
        return ""
    if stat.S_ISFIFO(mode):
        return "is a pipe"
    return "is a folder" if stat.S_ISDIR(mode) else "is a device or socket"


def _describe(path: Path) -> InputFile:
    """Size, time and kind of a regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the file name {os.fsencode(path)!r} is not UTF-8; rename the file or --exclude it"
        ) from error
    form = format_of(path.name)
    if form is None:
        raise DataError(
            f"--input {shown(path)}: {shown(''.join(path.suffixes))[:80]} is not a format that can "
            f"be read; these are: {READ_FORMATS}. Convert or rename it"
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
    return DataError(
        f"cannot read {shown(path)}: {error.strerror or error}; fix the file or --exclude it"
    )


def open_unchanged(file: InputFile) -> BinaryIO:
    """Open a file, refusing it when it is not the one that was planned.

    Whoever reads it calls `check_unchanged` afterwards: it may be written to in between.

    Raises:
        DataError: It is not.
        OSError: It cannot be opened.
    """
    with ExitStack() as stack:
        opened = stack.enter_context(open(local_path(file.path), "rb"))
        _compare(file, os.fstat(opened.fileno()))
        stack.pop_all()
        return opened


def check_unchanged(file: InputFile) -> None:
    """Refuse a file that is no longer the one that was planned.

    Raises:
        DataError: It is not, or it is gone.
    """
    try:
        status = os.stat(local_path(file.path))
    except FileNotFoundError:
        if is_pinned(file.path):
            return  # the cache let its copy go; the name determines the content
        raise _changed(file, "it is gone") from None
    except OSError as error:
        raise unreadable(file.path, error) from error
    _compare(file, status)


def _compare(file: InputFile, status: os.stat_result) -> None:
    if status.st_size != file.bytes:
        raise _changed(file, f"from {file.bytes:,} to {status.st_size:,} bytes")
    if not is_pinned(file.path) and status.st_mtime_ns != file.mtime_ns:
        raise _changed(file, "it was written to")


def _changed(file: InputFile, how: str) -> DataError:
    return DataError(
        f"{shown(file.path)} changed while the job was running ({how}); leave the inputs alone and "
        "start again with a new --output"
    )
