"""What `benchmarks/gpu.sh` has found, on disk: one file for each piece, of one state of the code.

A piece's file counts for a call when it is of the same sources and the same machine. The sources
are known by their content, so that it does not matter whether they are committed, or whether there
is git at all, and that a commit of the results alone makes none of them old.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.tables import replace_section

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, Any]

_SOURCES = ("benchmarks", "configs", "data_prep", "foundation", "model", "pipeline", "tests/gpu")
NO_COMMIT = "unknown"


class Store:
    """A folder of results.

    Args:
        folder: where the files are; it is made.
        machine: hardware and versions; results of another machine do not count.

    """

    def __init__(self, folder: Path, machine: str) -> None:
        self._folder = folder
        self._machine = machine

    def read(self, piece: str) -> Found:
        """What was found of a piece, of whatever sources and machine; empty when nothing was."""
        try:
            found = json.loads((self._folder / f"{piece}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and {"commit", "machine"} <= found.keys() else {}

    def current(self, piece: str) -> Found:
        """What was found of a piece by these sources on this machine."""
        found = self.read(piece)
        is_current = found.get("of") == [sources(), self._machine]
        return found if is_current else {}

    def write(self, piece: str, found: Found) -> None:
        """Replace what was found of a piece."""
        told = found | {
            "commit": commit(),
            "machine": f"{self._machine}; {date.today().isoformat()}.",
            "of": [sources(), self._machine],
        }
        path = self._folder / f"{piece}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other calls out of a folder of results, which is made.

    Raises:
        OSError: the folder cannot be made or written to.
        BlockingIOError: another call measures into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    descriptor = os.open(folder, os.O_RDONLY)  # no process that is started inherits it
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@functools.cache
def sources() -> str:
    """A checksum of everything that is measured, and of what measures it."""
    checksum = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") and path.is_file():
                checksum.update(f"{path.relative_to(ROOT)}\n".encode())
                checksum.update(path.read_bytes())
    return checksum.hexdigest()


@functools.cache
def commit() -> str:
    """Of this clone, marked where files differ from it; `NO_COMMIT` where git does not say."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--", *(f"{name}/**/*.py" for name in _SOURCES)),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return NO_COMMIT
    return f"{head} with changes" if changes else head


def write_tables(readme: Path, section: str) -> None:
    """Put the section between its markers; a file that is not there is made of nothing else."""
    if not readme.exists():
        readme.write_text("<!-- gpu begin -->\n<!-- gpu end -->\n", encoding="utf-8")
    replace_section(readme, "gpu", section)
