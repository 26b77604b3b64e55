"""An export folder as files: what it says of itself, written aside, renamed when whole."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from model.config import ModelConfig
from model.errors import CheckpointError

RECORD_NAME = "headway.json"
CARD_NAME = "README.md"
FORMAT: Literal["headway-export"] = "headway-export"

_PARTIAL_SUFFIX = ".partial"
_OLD_SUFFIX = ".old"
_READ_BYTES = 1 << 24


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Entry):
    """Size and checksum of one file."""

    bytes: int
    xxh3_128: str


class ExportDescription(_Entry):
    """What an export is of.

    Attributes:
        model: sizes, the number of heads among them.
        dtype: of the stored weights.
        sequence_length: positions that the model was trained on.
        eos_token: name of the end-of-text token.
        eos_id: its id.
        run: name of the run that trained it.
        step: optimizer steps it was trained for.
    """

    model: ModelConfig
    dtype: Literal["fp32", "bf16"]
    sequence_length: int
    eos_token: str
    eos_id: int
    run: str
    step: int


class ExportRecord(_Entry):
    """headway.json; written last, so that its presence means a whole folder.

    Attributes:
        future_tokens: number of heads that the folder holds.
        description: what the export is of.
        files: every other file by name, without the model card, which is there to be edited.
    """

    format: Literal["headway-export"] = FORMAT
    version: Literal[1] = 1
    future_tokens: int
    description: ExportDescription
    files: dict[str, FileEntry]


def check_target(directory: Path) -> None:
    """Refuse a target that holds something else than an earlier export.

    Raises:
        CheckpointError: it exists and is neither empty nor an export.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; an export is a folder, name another one")
    if any(directory.iterdir()) and not _is_export(directory):
        raise CheckpointError(
            f"{directory} exists and is not an earlier export, so it is not overwritten; "
            "name another folder or remove it"
        )


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """Give a folder beside `directory` to fill; on success it takes the place of `directory`.

    Yields:
        The folder to fill.

    Raises:
        CheckpointError: `directory` may not be replaced, or writing failed (disk full, ...).
            Then `directory` is as it was and nothing is left beside it.
    """
    check_target(directory)
    directory = directory.absolute()
    partial = directory.with_name(directory.name + _PARTIAL_SUFFIX)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            path.chmod(partial.stat().st_mode & 0o666)  # some writers make files private
            _sync(path)
        _sync(partial)
        _replace(partial, directory)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {directory}: {error.strerror or error}; make room or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_record(directory: Path, description: ExportDescription) -> None:
    """Write headway.json over all files that lie in the folder now, without the model card."""
    paths = [path for path in sorted(directory.iterdir()) if path.name != CARD_NAME]
    files = {path.name: _entry(path) for path in paths}
    record = ExportRecord(
        future_tokens=description.model.future_tokens, description=description, files=files
    )
    (directory / RECORD_NAME).write_text(record.model_dump_json(indent=1) + "\n", "utf-8")


def read_record(directory: Path) -> ExportRecord:
    """What an export says of itself.

    Raises:
        CheckpointError: no such folder, not an export, or its record is damaged.
    """
    path = directory / RECORD_NAME
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a folder; give one that python -m pipeline.export has written"
        )
    try:
        return ExportRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{directory} has no readable {RECORD_NAME} ({error.strerror}), so it is not an export "
            "with its heads; give a folder that python -m pipeline.export has written"
        ) from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise CheckpointError(
            f"{path} is damaged ({where}: {fault['msg']}); export again"
        ) from error


def verify_files(directory: Path, record: ExportRecord) -> None:
    """See to it that every file is there, with its size and its checksum.

    Raises:
        CheckpointError: naming the first file that is not.
    """
    for name, entry in record.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; export again")
        if (size := path.stat().st_size) != entry.bytes:
            raise CheckpointError(
                f"{path} has {size} bytes, {RECORD_NAME} says {entry.bytes}; export again"
            )
        if _checksum(path) != entry.xxh3_128:
            raise CheckpointError(
                f"{path} is damaged: its checksum is not the one in {RECORD_NAME}; export again"
            )


def _is_export(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / RECORD_NAME).read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _replace(partial: Path, directory: Path) -> None:
    """Rename `partial` to `directory`, whose earlier content goes once the new one is there."""
    old = directory.with_name(directory.name + _OLD_SUFFIX)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        if old.exists():
            old.rename(directory)
        raise
    _sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, xxh3_128=_checksum(path))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
