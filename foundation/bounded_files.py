"""Small files of any origin: regular ones inside a folder, read up to a bound.

A name in a list of files may be `/dev/zero`, a pipe that nobody writes to, or `../../somewhere`.
What is refused raises an OSError, as a file that is not there does.
"""

import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 1 << 26
_LONGEST_NAME = 255  # bytes, on the file systems in use


def is_name_inside(name: str) -> bool:
    """Whether a name with forward slashes, of a list of files, stays below the list's folder."""
    return all(
        part.isprintable()
        and part not in ("", ".", "..")
        and len(os.fsencode(part)) <= _LONGEST_NAME
        for part in name.split("/")
    )


def check_regular(path: Path) -> None:
    """See that a path is a file, or a link to one: no pipe, device or folder.

    Raises:
        OSError: it is something else, or is not there.
    """
    _refuse_irregular(path, path.stat())


def check_inside(folder: Path, path: Path) -> None:
    """See that no link on the way leads out of the folder.

    Raises:
        OSError: one does, or the path is not there.
    """
    if not path.resolve(strict=True).is_relative_to(folder.resolve()):
        raise OSError(errno.EPERM, "a link leads out of the folder", str(path))


def read_bounded(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `max_bytes`.
    """
    # Opening a pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        _refuse_irregular(path, facts)
        if facts.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes", str(path))
        return file.read(facts.st_size)  # no more, if it grows meanwhile


def _refuse_irregular(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
