"""Decompression: everything before a cut, all members, and never silence about the rest."""

import bz2
import gzip
import io
import lzma
import random
import struct
from collections.abc import Callable

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.inputs.codecs import DamagedInputError, DecompressedStream, open_stream

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}
SKIPPABLE_FRAME = struct.pack("<II", 0x184D2A50, 5) + b"hello"


def read_all(content: bytes, codec: str, size: int) -> tuple[bytes, str]:
    """What a stream gives before its end, and the damage it ends with."""
    stream = DecompressedStream(io.BytesIO(content), codec)
    found = bytearray()
    while True:
        try:
            block = stream.read(size)
        except DamagedInputError as error:
            with pytest.raises(DamagedInputError, match=str(error).split("(")[0]):
                stream.read(size)
            return bytes(found), str(error)
        assert len(block) <= size
        if not block:
            return bytes(found), ""
        found += block


@settings(deadline=None, max_examples=25)
@given(
    parts=st.lists(st.binary(max_size=300), max_size=4),
    size=st.integers(1, 100),
    padding=st.integers(0, 2),
)
@pytest.mark.parametrize("codec", COMPRESS)
def test_all_members_are_read(codec: str, parts: list[bytes], size: int, padding: int) -> None:
    """However many members a file has, and however little is read at once, all content comes."""
    zeros = bytes(4 * padding)
    content = b"".join(COMPRESS[codec](part) + zeros for part in parts)
    assert read_all(content, codec, size) == (b"".join(parts), "")


@pytest.mark.parametrize("codec", COMPRESS)
def test_every_cut_is_told(codec: str) -> None:
    """Cut at any byte, a prefix of the content comes, and then the news that it is cut."""
    text = random.Random(3).randbytes(2000)
    content = COMPRESS[codec](text) + COMPRESS[codec](b"second")
    first = len(COMPRESS[codec](text))
    for cut in range(1, len(content), 37):
        found, damage = read_all(content[:cut], codec, 512)
        assert (text + b"second").startswith(found)
        assert damage == ("" if cut == first else f"truncated {codec}")
        if cut >= first:
            assert found.startswith(text)


@pytest.mark.parametrize("codec", COMPRESS)
def test_damage_is_told(codec: str) -> None:
    """A flipped byte ends the stream with a reason; so does another format under the name."""
    text = random.Random(5).randbytes(3000)
    summed: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}
    content = bytearray(
        zstd.compress(text, options=summed) if codec == ".zst" else COMPRESS[codec](text)
    )
    content[len(content) - 6] ^= 0xFF
    _, damage = read_all(bytes(content), codec, 512)
    assert damage.startswith(f"damaged {codec} (")
    assert read_all(bz2.compress(b"x"), codec, 512)[1].startswith(f"damaged {codec} (")


@pytest.mark.parametrize("size", [100, 1 << 20])
@pytest.mark.parametrize("codec", COMPRESS)
def test_everything_before_a_wrong_checksum_is_given(codec: str, size: int) -> None:
    """The sum is at the end of a member, so all of its content is there, and the member before."""
    text = random.Random(6).randbytes(700_000)
    summed: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1}
    member = zstd.compress(text, options=summed) if codec == ".zst" else COMPRESS[codec](text)
    content = bytearray(COMPRESS[codec](b"first") + member)
    content[-30 if codec == ".xz" else -6 if codec == ".gz" else -2] ^= 0xFF
    found, damage = read_all(bytes(content), codec, size)
    assert damage.startswith(f"damaged {codec} (")
    if codec == ".xz":  # the sum stands before the index, whose length varies
        assert found.startswith(b"first" + text[: len(text) - (1 << 16)])
    else:
        assert found == b"first" + text


@pytest.mark.parametrize("codec", COMPRESS)
def test_everything_before_a_fault_is_given(codec: str) -> None:
    """A fault in the middle costs no more than a cut there would."""
    text = b"".join(b"line %d\n" % number for number in range(200_000))
    content = bytearray(COMPRESS[codec](text))
    middle = len(content) // 2
    content[middle : middle + 8] = b"\xff" * 8
    found, damage = read_all(bytes(content), codec, 1 << 20)
    assert damage.startswith(f"damaged {codec} (")
    before_cut, _ = read_all(bytes(content[:middle]), codec, 1 << 20)
    assert len(before_cut) > 500_000
    assert found.startswith(before_cut)


def test_skippable_frames_hold_no_content() -> None:
    """Frames that some compressors put between the others for themselves are passed over."""
    content = SKIPPABLE_FRAME + zstd.compress(b"a") + SKIPPABLE_FRAME + zstd.compress(b"b")
    assert read_all(content, ".zst", 100) == (b"ab", "")


def test_highly_compressed_content_comes_in_pieces() -> None:
    """A small file of much content never comes at once, so that memory is bounded."""
    for codec, compress in COMPRESS.items():
        stream = DecompressedStream(io.BytesIO(compress(bytes(1 << 24))), codec)
        sizes = []
        while block := stream.read(1 << 16):
            sizes.append(len(block))
        assert sum(sizes) == 1 << 24
        assert max(sizes) <= 1 << 16


def test_unknown_compressions_are_refused() -> None:
    """What has no decompressor is an error, not the compressed bytes."""
    assert open_stream(io.BytesIO(b"plain"), "").read(9) == b"plain"
    with pytest.raises(DataError, match=r"\.bz2 is not one of \.gz, \.xz, \.zst"):
        open_stream(io.BytesIO(b""), ".bz2")


@pytest.mark.parametrize("bits", [27, 28, 31])
def test_long_windows_are_read(bits: int) -> None:
    """What `zstd --long=31` writes is read; above 27 bits the library refuses it by itself."""
    parameters = zstd.CompressionParameter
    writer = zstd.ZstdCompressor(
        options={parameters.window_log: bits, parameters.content_size_flag: 0}
    )
    content = writer.compress(b"text " * 1000) + writer.flush()
    assert read_all(content, ".zst", 512) == (b"text " * 1000, "")
