"""The folder that an export is to become: what may be replaced, and how it is."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foundation.durable_files import sync_file, sync_folder
from model.errors import CheckpointError
from model.hugging_face.folder import FORMAT, RECORD_NAME

_PARTIAL_SUFFIX = ".partial"
_OLD_SUFFIX = ".old"


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
            sync_file(path)
        sync_folder(partial)
        _replace(partial, directory)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {directory}: {error.strerror or error}; make room or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    sync_folder(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
