"""Open files of a shard set, read with `preadv`; checked when first opened, closed when unused."""

import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import DataError
from data_prep.shards.manifest import ShardEntry
from foundation.bounded_files import check_inside, check_regular

MAX_OPEN_FILES = 256
# Up to so many files are asked for their size when a set is opened. Beyond, asking takes a parallel
# file system longer than it is worth (once per rank and shard): each is asked when first read.
MAX_SIZES_AT_OPEN = 1024


class ShardFiles:
    """The files of some shards. Safe to share between threads.

    Args:
        directory: The shard set.
        shards: Entries of its manifest.

    Attributes:
        lock: Keeps descriptors from being closed; held by whoever uses them.
        descriptors: Of each shard, in order; -1 when its file is not open.
    """

    def __init__(self, directory: Path, shards: Sequence[ShardEntry]) -> None:
        self.directory = directory
        self._shards = shards
        self.lock = threading.Lock()
        self.descriptors = [-1] * len(shards)
        self._opened: deque[int] = deque()

    def check(self) -> None:
        """See that every file is there: one listing per folder; sizes too, when files are few.

        Raises:
            DataError: Naming the first file that is missing or of another size.
        """
        few = len(self._shards) <= MAX_SIZES_AT_OPEN
        listed: dict[str, set[str]] = {}
        for shard in self._shards:
            folder, _, name = shard.path.rpartition("/")
            if folder not in listed:
                listed[folder] = self._list(folder)
            path = self.directory / shard.path
            if name not in listed[folder] or (few and not path.is_file()):
                raise DataError(
                    f"{path} is missing; run the same data_prep/shard.py command again to make "
                    "it, or copy the set again"
                )
            if few:
                self._check_place(path)
                self._check_size(shard, path.stat().st_size)

    def read(self, number: int, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes of file `number` from `position` on.

        Raises:
            DataError: The file cannot be read, or is not the one the manifest describes.
        """
        path = self._shards[number].path
        with self.lock:
            try:
                descriptor = self._descriptor(number)
                while buffer:
                    size = os.preadv(descriptor, [buffer], position)
                    if size == 0:
                        raise DataError(
                            f"{self.directory / path} ends at byte {position:,}; it was cut while "
                            "in use: copy the set again"
                        )
                    buffer = buffer[size:]
                    position += size
            except OSError as error:
                raise DataError(
                    f"cannot read {self.directory / path}: {error.strerror or error}"
                ) from error

    def close(self) -> None:
        """Close all files; they open again when read."""
        with self.lock:
            while self._opened:
                self._close_oldest()

    def _list(self, folder: str) -> set[str]:
        try:
            return set(os.listdir(self.directory / folder))
        except OSError:
            return set()

    def _check_place(self, path: Path) -> None:
        """A file of somebody else, a device or a pipe is not read, whatever the set calls it."""
        try:
            check_regular(path)
            check_inside(self.directory, path)
        except OSError as error:
            raise DataError(
                f"{path} is no file of the set ({error.strerror}); copy the set again, whole and "
                "without links"
            ) from error

    def _check_size(self, shard: ShardEntry, size: int) -> None:
        if size != shard.bytes:
            raise DataError(
                f"{self.directory / shard.path} has {size:,} bytes, the manifest says "
                f"{shard.bytes:,}; run the same data_prep/shard.py command again to rebuild it, "
                "or copy the set again"
            )

    def _descriptor(self, number: int) -> int:
        """An open file of a shard; the one that was opened first is closed to stay in bounds."""
        if self.descriptors[number] >= 0:
            return self.descriptors[number]
        if len(self._opened) >= MAX_OPEN_FILES:
            self._close_oldest()
        shard = self._shards[number]
        self._check_place(self.directory / shard.path)
        descriptor = os.open(self.directory / shard.path, os.O_RDONLY)
        try:
            self._check_size(shard, os.fstat(descriptor).st_size)
            # Read-ahead at random offsets would read many times what is needed.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptors[number] = descriptor
        self._opened.append(number)
        return descriptor

    def _close_oldest(self) -> None:
        number = self._opened.popleft()
        os.close(self.descriptors[number])
        self.descriptors[number] = -1
