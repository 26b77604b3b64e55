"""Write a file so that it is either whole under its name or not there at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DataError

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    The temporary name is random, so that two processes, maybe on two machines, never share one.

    Args:
        path: The final name; its folder is made when missing.

    Yields:
        The temporary path to write.

    Raises:
        DataError: Writing failed (disk full, no permission, ...); nothing is left under `path`.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        _discard(temporary)
        raise unwritable(path, error) from error
    except BaseException:
        _discard(temporary)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` by way of `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files that a killed run left below `directory`."""
    for leftover in directory.rglob(f"*{TEMPORARY_SUFFIX}"):
        _discard(leftover)


def unwritable(path: Path, error: OSError) -> DataError:
    """The one-line error for a file that could not be written."""
    reason = error.strerror or str(error)
    return DataError(
        f"cannot write {path}: {reason}; make room or fix the folder and run the same command "
        "again (finished units are kept), or choose another --output"
    )


def _discard(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
