"""The folder that an export is to become: what may be replaced, and how it is."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foundation.durable_files import sync_file, sync_folder
from foundation.json_text import read_json
from model.errors import CheckpointError
from model.hugging_face.folder import CARD_NAME, FORMAT, RECORD_NAME

# Folders of this name are made by exports alone; one that is there belongs to a killed export.
TEMPORARY_PREFIX = ".headway-export-"
_OLD_SUFFIX = "-replaced"
_SHOWN = 3


def check_target(directory: Path) -> None:
    """Refuse a target that holds something else than an earlier export.

    A link to a folder is written through: the folder is replaced, the link stays.

    Raises:
        CheckpointError: it exists and is neither empty nor an export, or it is an export with files
            that no export wrote.
    """
    if directory.is_symlink() and not directory.exists():
        raise CheckpointError(
            f"{directory} is a link to {directory.readlink()}, which does not exist; make that "
            "folder, or remove the link"
        )
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; an export is a folder, name another one")
    found = {path.name for path in directory.iterdir()}
    if not found:
        return
    exported = _exported_names(directory)
    if exported is None:
        raise CheckpointError(
            f"{directory} exists and is not an earlier export, so it is not overwritten; "
            "name another folder or remove it"
        )
    if foreign := sorted(found - exported):
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise CheckpointError(
            f"{directory} holds {', '.join(foreign[:_SHOWN])}{more}, which no export wrote, so it "
            "is not replaced; move them elsewhere or name another folder"
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
    directory = directory.resolve()  # a link stays a link
    partial = directory.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    made = False
    try:
        partial.mkdir(parents=True)
        made = True
        yield partial
        for path in partial.iterdir():
            path.chmod(partial.stat().st_mode & 0o666)  # some writers make files private
            sync_file(path)
        sync_folder(partial)
        check_target(directory)  # again: writing may have taken hours
        _replace(partial, directory)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {directory}: {error.strerror or error}; make room or name another folder"
        ) from error
    finally:
        if made:
            shutil.rmtree(partial, ignore_errors=True)


def _exported_names(directory: Path) -> set[str] | None:
    """The files that an export wrote into a folder, by its record; None when it is not one."""
    try:
        record: Any = read_json(directory / RECORD_NAME)
        if record["format"] != FORMAT:
            return None
        return {RECORD_NAME, CARD_NAME, *record["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _replace(partial: Path, directory: Path) -> None:
    """Rename `partial` to `directory`, whose earlier content goes once the new one is there."""
    if not directory.exists():
        partial.rename(directory)
        sync_folder(directory.parent)
        return
    old = partial.with_name(partial.name + _OLD_SUFFIX)
    directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    sync_folder(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
