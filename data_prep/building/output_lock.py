"""One build writes to an output at a time; the tasks of one array write to it together."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.building.journal import JOURNAL
from data_prep.errors import DataError
from data_prep.shards.atomic import unwritable
from data_prep.workers.phase import Observer

LOCK = "lock"
# Some parallel file systems are mounted without locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextmanager
def writing(output: Path, shared: bool, observer: Observer) -> Iterator[None]:
    """Lock the output against other builds; the system unlocks it when this process ends.

    The lock only saves work: two builds of the same job write the same bytes, each file whole. On a
    file system without locks the build continues with a note.

    Args:
        output: Folder of the shard set, with its journal.
        shared: True for a task of an array, which works alongside the others.
        observer: Notified when there are no locks.

    Raises:
        DataError: Another build holds it.
    """
    path = output / JOURNAL / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise DataError(
                    f"another process is writing to {output}; wait for it, or name another --output"
                ) from error
            observer.say(f"{output}: this file system has no locks; start one build at a time")
        yield
    finally:
        os.close(descriptor)
