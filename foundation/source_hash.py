"""One digest of all source files of some folders: the same code, or not."""

from collections.abc import Sequence
from pathlib import Path

import xxhash


def source_digest(folders: Sequence[Path]) -> str:
    """Digest of every .py file below the folders, by name and content.

    Neither where the folders lie nor in which order they are given counts.

    Args:
        folders: packages; each counts by its own name.

    Raises:
        OSError: a file cannot be read.
    """
    files = {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": path
        for folder in folders
        for path in folder.rglob("*.py")
    }
    digest = xxhash.xxh3_128()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def bytes_digest(content: bytes) -> str:
    """Digest of given bytes, such as a configuration's."""
    return xxhash.xxh3_128_hexdigest(content)
