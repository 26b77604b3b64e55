"""Write a file so that it is either whole under its name or not there at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import DataError, shown
from foundation import durable_files
from foundation.durable_files import remove_leftovers

__all__ = ["remove_leftovers", "unwritable", "whole_file", "write_whole"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`foundation.durable_files.whole_file` with this package's error.

    Raises:
        DataError: Writing failed (disk full, no permission, ...); nothing is left under `path`.
    """
    if "\0" in os.fspath(path):
        raise unwritable(path, OSError(errno.EINVAL, "a name cannot hold the character NUL"))
    try:
        with durable_files.whole_file(path) as temporary:
            yield temporary
    except OSError as error:
        raise unwritable(path, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` by way of `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def unwritable(path: Path, error: OSError) -> DataError:
    """The one-line error for a file that could not be written."""
    reason = error.strerror or str(error)
    return DataError(
        f"cannot write {shown(path)}: {reason}; make room or fix the folder and run the same "
        "command again (finished units are kept), or choose another --output"
    )
