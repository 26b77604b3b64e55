"""Texts that every machine has: the standard library's sources, and documentation."""

import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROSE = (".md", ".rst", ".txt")


def source_code() -> Iterator[Path]:
    """Files of Python's standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    return (p for p in sorted(stdlib.rglob("*.py")) if "site-packages" not in p.parts)


def documentation() -> Iterator[Path]:
    """Files of the system's documentation, and of the installed packages."""
    packages = Path(sysconfig.get_path("purelib"))
    return (
        path
        for root in (Path("/usr/share/doc"), Path("/usr/share/common-licenses"), packages)
        for path in sorted(root.rglob("*"))
        if path.suffix in _PROSE or path.name == "copyright"
    )


def copied(folder: Path, paths: Iterable[Path], most_bytes: int) -> Path:
    """Files that are text, up to a size in all, under plain names."""
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    size = 0
    for number, path in enumerate(paths):
        if size >= most_bytes:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        (unfinished / f"{number:06d}.txt").write_text(text, encoding="utf-8")
        size += len(text)
    unfinished.rename(folder)
    return folder
