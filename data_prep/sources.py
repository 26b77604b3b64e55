"""Input paths to files, files to units of work, units to records.

A unit is a run of byte ranges that depends on the inputs alone, never on the number of workers.
A record starts in exactly one unit: a .jsonl range holds the lines that START in it, wherever
they end; every other file is one record.
"""

import fnmatch
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import orjson

from data_prep.errors import DataError
from data_prep.file_names import (
    IGNORED_DIRECTORIES,
    JSONL_SUFFIXES,
    UNREADABLE_SUFFIXES,
    looks_like_text,
)

Kind = Literal["jsonl", "json", "text", "parquet", "arrow"]

SMALLEST_UNIT_BYTES = 1 << 20
LARGEST_UNIT_BYTES = 1 << 26
UNITS_WANTED = 128
SAMPLE_CHARACTERS = 80
LARGEST_DOCUMENT_BYTES = 1 << 26
SKIPPED_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class InputFile(NamedTuple):
    """One input file as it was when the job was planned."""

    path: str
    kind: Kind
    bytes: int
    mtime_ns: int


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


class Reading(NamedTuple):
    """How records are read: the key of the text, and the size above which one is rejected."""

    text_key: str
    max_document_bytes: int = LARGEST_DOCUMENT_BYTES

    @property
    def too_long(self) -> str:
        """The reason of a reject above the limit."""
        return f"longer than --max-document-bytes {self.max_document_bytes}"


class Record(NamedTuple):
    """One record: a text (maybe empty), or the reason why there is none.

    `offset` is the byte offset of the record in its file; `sample` the start of a rejected one.
    """

    file: int
    offset: int
    text: str | None
    reason: str = ""
    sample: str = ""


def find_inputs(
    paths: Sequence[Path],
    globs: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: Path | None = None,
) -> list[InputFile]:
    """List the input files in the order in which their records are stored.

    Args:
        paths: Files and directories; files keep their given order, a directory is walked sorted.
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
        names = _walk(path, globs, exclude, output) if path.is_dir() else [_explicit(path)]
        for name in names:
            entry = _describe(name)
            if entry is None:
                continue
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
        splittable = file.kind == "jsonl"
        if file.bytes > unit_bytes:
            close()
            step = unit_bytes if splittable else file.bytes
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
    """A power of two that gives about 128 units, between 1 MiB and 64 MiB."""
    wanted = 1 << max(0, (total_bytes // UNITS_WANTED).bit_length() - 1)
    return min(max(wanted, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)


def read_unit(unit: Unit, reading: Reading) -> Iterator[Record]:
    """Yield every record of a unit in order, the bad ones with a reason.

    Raises:
        DataError: A file changed after the job was planned, or a .jsonl file cannot be read.
    """
    for segment in unit.segments:
        if segment.source.kind == "jsonl":
            yield from _read_lines(segment, reading)
        else:
            yield _read_document(segment, reading)


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
        for name in sorted(files):
            below = relative / name
            wanted = _matches(below, globs) if globs else looks_like_text(name)
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
    """A file named by the user: it must exist and be of a kind that is read."""
    if not path.exists():
        raise DataError(f"--input {path} does not exist; check the path")
    if path.suffix.lower() in UNREADABLE_SUFFIXES:
        raise DataError(
            f"--input {path} is a {path.suffix} file; read are .jsonl (one JSON object per line), "
            "text files and directories: convert it to .jsonl first"
        )
    return path


def _describe(path: Path) -> InputFile | None:
    """Size and time of a regular file; None for devices, pipes and dangling links."""
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
    kind: Kind = "jsonl" if path.suffix.lower() in JSONL_SUFFIXES else "text"
    return InputFile(os.path.abspath(path), kind, status.st_size, status.st_mtime_ns)


def _open_unchanged(source: InputFile) -> BinaryIO:
    """Open a file, refusing it when it is not the one that was planned."""
    with ExitStack() as stack:
        file = stack.enter_context(open(source.path, "rb"))
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (source.bytes, source.mtime_ns):
            raise DataError(
                f"{source.path} changed while the job was running; leave the inputs alone and "
                "start again with a new --output"
            )
        stack.pop_all()
        return file


def _read_document(segment: Segment, reading: Reading) -> Record:
    """A whole file as one record."""
    try:
        with _open_unchanged(segment.source) as file:
            content = file.read(reading.max_document_bytes + 1)
    except OSError as error:
        return Record(segment.file, 0, None, f"unreadable: {error.strerror}")
    if len(content) > reading.max_document_bytes:
        return Record(segment.file, 0, None, reading.too_long, _sample(content))
    content = content.removeprefix(BYTE_ORDER_MARK)
    if b"\0" in content:
        return Record(segment.file, 0, None, "binary", _sample(content))
    try:
        return Record(segment.file, 0, content.decode("utf-8"))
    except UnicodeDecodeError:
        return Record(segment.file, 0, None, "not UTF-8", _sample(content))


def _read_lines(segment: Segment, reading: Reading) -> Iterator[Record]:
    """The lines that start in the segment's byte range."""
    try:
        with _open_unchanged(segment.source) as file:
            offset = segment.start
            if offset:
                file.seek(offset - 1)
                offset += _skip_line(file) - 1
            while offset < segment.end:
                line = file.readline(reading.max_document_bytes + 1)
                if not line:
                    break
                if len(line) > reading.max_document_bytes:
                    yield Record(segment.file, offset, None, reading.too_long, _sample(line))
                    if not line.endswith(b"\n"):
                        offset += _skip_line(file)
                else:
                    content = line.removeprefix(BYTE_ORDER_MARK) if offset == 0 else line
                    yield _parse_line(segment.file, offset, content, reading.text_key)
                offset += len(line)
    except OSError as error:
        raise DataError(f"cannot read {segment.source.path}: {error.strerror or error}") from error


def _skip_line(file: BinaryIO) -> int:
    """Go behind the next line end without holding the line; give the bytes passed."""
    passed = 0
    while part := file.readline(SKIPPED_BYTES):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _parse_line(file: int, offset: int, line: bytes, text_key: str) -> Record:
    """One line of JSON to a record; a blank line is an empty record."""
    if not line.strip():
        return Record(file, offset, "")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = _parse_leniently(line)
    if isinstance(value, _Unparsable):
        return Record(file, offset, None, value.reason, _sample(line))
    if not isinstance(value, dict):
        return Record(file, offset, None, "not a JSON object", _sample(line))
    if text_key not in value:
        return Record(file, offset, None, f"no {text_key!r}", _sample(line))
    text = value[text_key]
    if not isinstance(text, str):
        return Record(file, offset, None, f"{text_key!r} is not a string", _sample(line))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Record(file, offset, None, "lone surrogate", _sample(line))
    return Record(file, offset, text)


class _Unparsable(NamedTuple):
    reason: str


def _parse_leniently(line: bytes) -> object:
    """What the fast parser refuses may still hold a good text: huge numbers, NaN, other fields."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _Unparsable("not UTF-8")
    except (ValueError, RecursionError):
        return _Unparsable("malformed JSON")


def _sample(content: bytes) -> str:
    return content[: 4 * SAMPLE_CHARACTERS].decode("utf-8", "replace")[:SAMPLE_CHARACTERS]
