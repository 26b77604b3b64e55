"""Decompress .gz, .zst and .xz as a stream: all members or frames, and never a silent cut."""

import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from backports import zstd

from data_prep.errors import DataError

COMPRESSED_BLOCK_BYTES = 1 << 18
GZIP_FORMAT = 31
LARGEST_XZ_MEMORY_BYTES = 1 << 28
# As `zstd --long=31` writes. The library takes the memory, but only what text fills is touched.
LARGEST_ZSTD_WINDOW_BITS = 31


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
    ".zst": lambda: zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: LARGEST_ZSTD_WINDOW_BITS}
    ),
}
CODECS = frozenset(_CODECS)
_ERRORS = (zlib.error, lzma.LZMAError, zstd.ZstdError, MemoryError)


class DecompressedStream:
    """The content of a compressed file, one member or frame after the other.

    Example: two .gz files written one after the other give the content of both. When the file
    ends inside a member or is damaged, everything before the fault is given first.

    Args:
        file: The compressed bytes, from the start of a file that can be read again.
        codec: The suffix that names the compression.
    """

    def __init__(self, file: BinaryIO, codec: str) -> None:
        self._file = file
        self._codec = codec
        self._member: _Decompressor | None = None
        self._pending = b""
        self._damage = ""
        self._read_bytes = 0
        self._member_start = 0
        self._member_bytes = 0
        self._rescued: Iterator[bytes] = iter(())
        self._rest = b""

    def read(self, size: int, /) -> bytes:
        """Give 1 to `size` bytes; nothing at the end.

        Raises:
            DamagedInputError: The file ends inside a member, or its bytes are damaged; again at
                every further call.
        """
        if not self._damage:
            try:
                return self._read(size)
            except DamagedInputError as error:
                self._damage = str(error)
            except _ERRORS as error:
                self._damage = f"damaged {self._codec} ({error})"
                self._rescued = _in_blocks(self._read_up_to_fault())
        self._rest = self._rest or next(self._rescued, b"")
        if not self._rest:
            raise DamagedInputError(self._damage)
        content, self._rest = self._rest[:size], self._rest[size:]
        return content

    def _read(self, size: int) -> bytes:
        while True:
            if self._member is None and not self._start_member():
                return b""
            assert self._member is not None
            if self._member.needs_input and not self._pending:
                self._pending = self._next_block()
                if not self._pending:
                    raise DamagedInputError(f"truncated {self._codec}")
            data, self._pending = self._pending, b""
            content = self._member.decompress(data, size)
            self._member_bytes += len(content)
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
                self._member_start = self._read_bytes - len(self._pending)
                self._member_bytes = 0
                return True
            self._pending = self._next_block()
            if not self._pending:
                return False

    def _next_block(self) -> bytes:
        block = self._file.read(COMPRESSED_BLOCK_BYTES)
        self._read_bytes += len(block)
        return block

    def _read_up_to_fault(self) -> Iterator[bytes]:
        """What a damaged member holds between what was given of it and the fault.

        A library that finds a fault gives nothing of the bytes that it was handed with it. So the
        member is read again from its start, and its last block byte by byte.
        """
        member = _CODECS[self._codec]()
        given = self._member_bytes
        position = self._member_start
        self._file.seek(position)
        good_until = self._read_bytes - COMPRESSED_BLOCK_BYTES
        try:
            while position < self._read_bytes and not member.eof:
                wanted = min(COMPRESSED_BLOCK_BYTES, max(1, good_until - position))
                data = self._file.read(wanted)
                if not data:
                    return
                position += len(data)
                while content := member.decompress(data, COMPRESSED_BLOCK_BYTES):
                    known = min(given, len(content))
                    given -= known
                    if known < len(content):
                        yield content[known:]
                    if member.eof or member.needs_input:
                        break
                    data = b""
        except _ERRORS:
            return


def _in_blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer pieces: those before a fault come one by one."""
    gathered = bytearray()
    for piece in pieces:
        gathered += piece
        if len(gathered) >= COMPRESSED_BLOCK_BYTES:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)


def open_stream(file: BinaryIO, codec: str) -> Stream:
    """The content of `file`, decompressed when `codec` names a compression."""
    if not codec:
        return file
    if codec not in CODECS:
        raise DataError(f"{codec} is not one of {', '.join(sorted(CODECS))}")
    return DecompressedStream(file, codec)
