r"""Marked text: UTF-8 with bytes that UTF-8 never has, which say what of a document is a target.

A document of prompts and completions goes from its reader to the encoder as one run of bytes, so
that everything between them (hashes, duplicates, the held-out split, rejects) need not know that it
has parts:

    TOGGLE               from here on tokens are targets, or no longer; a document begins without
    SPECIAL name SPECIAL a special token, by its name; the same letters elsewhere are text

Example: `b"2 + 2?\xff4"` is a prompt whose loss is on `4` and the end of the document.
As `str` the marks are the halves of characters that `surrogateescape` makes of these bytes.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

TOGGLE = "\udcff"
SPECIAL = "\udcfe"
_TOGGLE_BYTE = b"\xff"
_MARKS = b"\xff\xfe"
_PARTS = re.compile(rb"(\xff|\xfe[^\xfe]*\xfe)")


class Piece(NamedTuple):
    """A part of a document that is encoded by itself.

    Attributes:
        text: UTF-8, or the name of a special token.
        is_target: Whether its tokens are targets.
        is_special: Whether it is the name of a special token.
    """

    text: bytes
    is_target: bool
    is_special: bool = False


def to_bytes(marked: str) -> bytes:
    """Marked text as bytes; other halves of characters than the marks are an error."""
    return marked.encode("utf-8", "surrogateescape")


def pieces_of(marked: bytes) -> Iterator[Piece]:
    """The parts of a document in order; none is empty."""
    is_target = False
    for part in _PARTS.split(marked):
        if part == _TOGGLE_BYTE:
            is_target = not is_target
        elif part[:1] == _MARKS[1:]:
            yield Piece(part[1:-1], is_target, is_special=True)
        elif part:
            yield Piece(part, is_target)


def plain_text(marked: bytes) -> bytes:
    """The text without its marks: what the document's tokens decode to."""
    return marked.translate(None, _MARKS)
