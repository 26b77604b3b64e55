"""A corpus for benchmarks from what lies on the machine: source code of Python and its packages.

The same files, in the same order, for the same installation: each text once, ordered by its hash,
until the size is reached. Nothing is downloaded.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

SUFFIXES = (".c", ".cpp", ".cuh", ".h", ".hpp", ".js", ".md", ".py", ".pyi", ".pyx", ".rst", ".txt")
LARGEST_FILE_BYTES = 2_000_000


class Corpus(NamedTuple):
    """A .jsonl file and what is in it."""

    path: Path
    documents: int
    text_bytes: int


def default_roots() -> list[Path]:
    """The standard library, the packages beside it and those of this environment, C headers."""
    paths = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/include")
    return [Path(path) for path in paths if Path(path).is_dir()]


def make_corpus(path: Path, megabytes: int, roots: Sequence[Path]) -> Corpus:
    """Write about `megabytes` of .jsonl, unless there is less text below the roots."""
    texts: dict[bytes, Path] = {}
    for file in _files(roots):
        content = _text(file)
        if content:
            texts.setdefault(hashlib.blake2b(content, digest_size=16).digest(), file)
    documents = written = text_bytes = 0
    with path.open("wb") as lines:
        for digest in sorted(texts):
            if written >= megabytes * 1_000_000:
                break
            content = _text(texts[digest])
            line = orjson.dumps({"text": content.decode()}) + b"\n"
            lines.write(line)
            documents += 1
            written += len(line)
            text_bytes += len(content)
    return Corpus(path, documents, text_bytes)


def _files(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        for folder, names, files in os.walk(root):
            names.sort()
            for name in sorted(files):
                if name.endswith(SUFFIXES):
                    yield Path(folder) / name


def _text(file: Path) -> bytes:
    """The content of a file if it is text of a usual size."""
    try:
        if file.stat().st_size > LARGEST_FILE_BYTES:
            return b""
        content = file.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return b""
    return content
