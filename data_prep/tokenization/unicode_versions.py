"""Characters on which two libraries with different Unicode tables may disagree.

Split patterns ask whether a character is a letter, a number, a blank or a sign. Of all characters
up to U+3FFFF, gigatoken 0.10 and tokenizers 0.23 answer differently for 4,657: the letters and
numbers that Unicode 17.0 added, which one of them takes for punctuation. The newer patterns ask
for marks, too, of which 42 are as new.

The normalizer NFC orders the marks that follow a letter and composes what has a character of its
own. tokenizers 0.23 has the tables of Unicode 9 for that: 154 later marks it leaves where they are,
and pairs with 15 later letters it does not compose.

Documents that hold any of them are rare; they are encoded by the library that defines the ids.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

DISPUTED = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7),
    (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3),
    (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2),
    (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED),
    (0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479),
)  # fmt: skip
DISPUTED_MARKS = (
    (0x7FD, 0x7FD), (0x897, 0x89F), (0x8CA, 0x8D3), (0x9FE, 0x9FE), (0xC3C, 0xC3C), (0xD3B, 0xD3C),
    (0xEBA, 0xEBA), (0x1715, 0x1715), (0x1ABF, 0x1ADD), (0x1AE0, 0x1AEB), (0x1DF6, 0x1DFA),
    (0xA82C, 0xA82C), (0x105D2, 0x105D2), (0x105DA, 0x105DA), (0x10D24, 0x10D27),
    (0x10D69, 0x10D6D), (0x10EAB, 0x10EAC), (0x10EFA, 0x10EFB), (0x10EFD, 0x10EFF),
    (0x10F46, 0x10F50), (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B),
    (0x11382, 0x11382), (0x11384, 0x11384), (0x1138B, 0x1138B), (0x11390, 0x11390),
    (0x113C2, 0x113C2), (0x113CE, 0x113D0), (0x1145E, 0x1145E), (0x11839, 0x1183A),
    (0x11935, 0x11935), (0x1193D, 0x1193E), (0x11943, 0x11943), (0x119E0, 0x119E0),
    (0x11A34, 0x11A34), (0x11A47, 0x11A47), (0x11A99, 0x11A99), (0x11B60, 0x11B67),
    (0x11D42, 0x11D42), (0x11D44, 0x11D45), (0x11D97, 0x11D97), (0x11F41, 0x11F42),
    (0x1611E, 0x1611E), (0x16121, 0x16122), (0x16129, 0x16129), (0x1612F, 0x1612F),
    (0x16D63, 0x16D63), (0x16D67, 0x16D67), (0x16D69, 0x16D69), (0x16FF0, 0x16FF1),
    (0x1E08F, 0x1E08F), (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF),
    (0x1E4EC, 0x1E4EF), (0x1E5EE, 0x1E5EF), (0x1E6E3, 0x1E6E3), (0x1E6E6, 0x1E6E6),
    (0x1E6EE, 0x1E6EF), (0x1E6F5, 0x1E6F5),
)  # fmt: skip


def asks_for_marks(layout: Mapping[str, Any]) -> bool:
    """Whether the parsed tokenizer.json normalizes, or splits by a pattern with marks in it."""
    return layout.get("normalizer") is not None or "p{M" in json.dumps(layout.get("pre_tokenizer"))


def is_disputed(text: bytes, with_marks: bool) -> bool:
    """True when a text in UTF-8 holds a character that libraries may take differently.

    Args:
        text: The text.
        with_marks: The tokenizer normalizes, or its pattern asks for marks.
    """
    # Most texts have none of the bytes that these characters begin with; looking costs nothing.
    if not any(first in text for first in _first_bytes(with_marks)):
        return False
    return _disputed(with_marks).search(text) is not None


def disputed_characters(with_marks: bool) -> list[str]:
    """All of them."""
    ranges = (*DISPUTED, *DISPUTED_MARKS) if with_marks else DISPUTED
    return [chr(number) for first, last in ranges for number in range(first, last + 1)]


@lru_cache(maxsize=2)
def _first_bytes(with_marks: bool) -> tuple[bytes, ...]:
    return tuple(sorted({character.encode()[:1] for character in disputed_characters(with_marks)}))


@lru_cache(maxsize=2)
def _disputed(with_marks: bool) -> re.Pattern[bytes]:
    return re.compile(_match_any(sign.encode() for sign in disputed_characters(with_marks)))


def _match_any(words: Iterable[bytes]) -> bytes:
    """A pattern for any of some byte strings of which none begins another, branched by byte.

    Example: ab, ac and b give (?:a(?:b|c)|b), with every byte escaped.
    """
    rests: dict[int, list[bytes]] = {}
    for word in words:
        rests.setdefault(word[0], []).append(word[1:])
    branches = [
        re.escape(bytes([first])) + (_match_any(rest) if rest != [b""] else b"")
        for first, rest in rests.items()
    ]
    return b"(?:" + b"|".join(branches) + b")"
