"""Decompress .gz, .zst and .xz as a stream: all members or frames, and never a silent cut."""

import lzma
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

from backports import zstd

from data_prep.errors import DataError

COMPRESSED_BLOCK_BYTES = 1 << 18
GZIP_FORMAT = 31
LARGEST_XZ_MEMORY_BYTES = 1 << 28


class DamagedInputError(Exception):
    """The rest of a file cannot be read: it is cut short, or its bytes are damaged."""


class Stream(Protocol):
    """Bytes in order; `read` gives at most `size`, and nothing only at the end."""

    def read(self, size: int, /) -> bytes:
        """The next bytes."""


class _Decompressor(Protocol):
    """What `lzma` and `zstd` offer for one member or frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gunzip:
    """One gzip member with the interface of the other two."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(GZIP_FORMAT)
        self._is_full = False

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._is_full and not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        content = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self._is_full = len(content) == max_length
        return content


_CODECS: dict[str, Callable[[], _Decompressor]] = {
    ".gz": _Gunzip,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LARGEST_XZ_MEMORY_BYTES),
    ".zst": zstd.ZstdDecompressor,
}
CODECS = frozenset(_CODECS)


class DecompressedStream:
    """The content of a compressed file, one member or frame after the other.

    Example: two .gz files written one after the other give the content of both. When the file
    ends inside a member, everything before the cut is given first.

    Args:
        file: The compressed bytes.
        codec: The suffix that names the compression.
    """

    def __init__(self, file: BinaryIO, codec: str) -> None:
        self._file = file
        self._codec = codec
        self._member: _Decompressor | None = None
        self._pending = b""
        self._damage = ""

    def read(self, size: int, /) -> bytes:
        """Give 1 to `size` bytes; nothing at the end.

        Raises:
            DamagedInputError: The file ends inside a member, or its bytes are damaged; again at
                every further call.
        """
        if self._damage:
            raise DamagedInputError(self._damage)
        try:
            return self._read(size)
        except DamagedInputError as error:
            self._damage = str(error)
            raise
        except (zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
            self._damage = f"damaged {self._codec} ({error})"
            raise DamagedInputError(self._damage) from error

    def _read(self, size: int) -> bytes:
        while True:
            if self._member is None and not self._start_member():
                return b""
            assert self._member is not None
            if self._member.needs_input and not self._pending:
                self._pending = self._file.read(COMPRESSED_BLOCK_BYTES)
                if not self._pending:
                    raise DamagedInputError(f"truncated {self._codec}")
            data, self._pending = self._pending, b""
            content = self._member.decompress(data, size)
            if self._member.eof:
                self._pending = self._member.unused_data
                self._member = None
            if content:
                return content

    def _start_member(self) -> bool:
        """Begin the next member, if there is one; zeros between members are padding."""
        while True:
            self._pending = self._pending.lstrip(b"\0")
            if self._pending:
                self._member = _CODECS[self._codec]()
                return True
            self._pending = self._file.read(COMPRESSED_BLOCK_BYTES)
            if not self._pending:
                return False


def open_stream(file: BinaryIO, codec: str) -> Stream:
    """The content of `file`, decompressed when `codec` names a compression."""
    if not codec:
        return file
    if codec not in CODECS:
        raise DataError(f"{codec} is not one of {', '.join(sorted(CODECS))}")
    return DecompressedStream(file, codec)
