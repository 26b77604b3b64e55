"""Files that outlive a power cut, and the sizes and checksums that show that they did.

Errors are the OSErrors of the system; each package turns them into its own at its border.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import xxhash

from foundation.bounded_files import check_regular

BLOCK_BYTES = 1 << 22
TEMPORARY_SUFFIX = ".tmp"

_TOKEN_BYTES = 4
_TEMPORARY = re.compile(rf".+\.[0-9a-f]{{{2 * _TOKEN_BYTES}}}{re.escape(TEMPORARY_SUFFIX)}")


class FileEntry(NamedTuple):
    """What a list of files says of one of them.

    Attributes:
        size: in bytes.
        xxh3: 128-bit checksum of the contents, in hexadecimal.
    """

    size: int
    xxh3: str


def entry_of(content: bytes) -> FileEntry:
    """Size and checksum of a file with this content."""
    return FileEntry(len(content), xxhash.xxh3_128_hexdigest(content))


def read_entry(path: Path, *, from_disk: bool = True) -> FileEntry:
    """Size and checksum of a file.

    Args:
        path: the file.
        from_disk: read what the disk has of a synced file, not what this machine remembers of it.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    check_regular(path)  # a device may have no end
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def sync_file(path: Path) -> None:
    """Bring what was written to a file to the disk.

    Raises:
        OSError: the disk does not take it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk; the files in it are not synced by that.

    Raises:
        OSError: the disk does not take it.
    """
    sync_file(folder)  # to the system a folder is a file of names


def write_synced(path: Path, content: bytes) -> FileEntry:
    """Write a small file through to the disk, under its final name.

    For files in a folder that does not count before it is renamed; others take `write_whole`.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return entry_of(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success sync it and rename it to `path`.

    After a kill or a power cut `path` is what it was before, or all of the new content. The
    temporary name is random, so that two processes, maybe on two machines, never share one. Where
    `path` is a link, the file that it names is written and the link stays.

    Args:
        path: the final name; its folder is made when missing.

    Yields:
        The temporary path to write.

    Raises:
        OSError: writing failed; `path` is as it was, and nothing is left beside it.
    """
    path = path.resolve() if path.is_symlink() else path
    token = secrets.token_hex(_TOKEN_BYTES)
    temporary = path.with_name(f"{path.name}.{token}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        discard(temporary)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` by way of `whole_file`.

    Raises:
        OSError: writing failed; `path` is as it was.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed process left below `folder`, and no others."""
    for leftover in folder.rglob(f"*{TEMPORARY_SUFFIX}"):
        if _TEMPORARY.fullmatch(leftover.name) and leftover.is_file() and not leftover.is_symlink():
            discard(leftover)


def discard(path: Path) -> None:
    """Remove a file, if it is there and can be removed."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return
