"""Files of JSON lines, compressed with gzip or not, read whole; faults are named by their line."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from foundation.bounded_files import read_bounded
from foundation.json_text import parse_json

MAX_FILE_BYTES = 1 << 31
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonLine(NamedTuple):
    """One object of a file.

    Attributes:
        number: of its line, from 1.
        value: by key.
    """

    number: int
    value: dict[str, Any]


def read_json_lines(path: Path) -> Iterator[JsonLine]:
    """The objects of a file, without empty lines.

    Raises:
        OSError: the file cannot be read, or is too large.
        ValueError: it is damaged, or a line is not a JSON object; says which.
    """
    for number, line in enumerate(read_plain(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield JsonLine(number, value)


def read_plain(path: Path) -> bytes:
    """The content of a file, decompressed where its name ends in .gz, without a byte order mark.

    Raises:
        OSError: the file cannot be read, or is too large.
        ValueError: it is damaged, or too large when decompressed.
    """
    content = read_bounded(path, MAX_FILE_BYTES)
    if path.name.lower().endswith(".gz"):
        content = _decompress(content)
    return content.removeprefix(_BYTE_ORDER_MARK)


def _decompress(content: bytes) -> bytes:
    parts, size = [], 0
    try:
        while content:
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            parts.append(member.decompress(content, MAX_FILE_BYTES - size + 1))
            size += len(parts[-1])
            if size > MAX_FILE_BYTES:
                raise ValueError(f"it decompresses to more than {MAX_FILE_BYTES:,} bytes")
            if not member.eof:
                raise ValueError("its compressed data is cut short")
            content = member.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise ValueError(f"its compressed data is damaged ({error})") from None
    return b"".join(parts)
